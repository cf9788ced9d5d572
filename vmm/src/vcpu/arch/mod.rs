//! What is particular to a processor architecture.

mod cpuid;
pub(super) mod x86_64;
