//! The door of the VMM on real KVM. Where there is none, each test says so and ends; in the node, which has it, none may.

mod boot;
mod ends;
mod probe;
#[path = "../support/mod.rs"]
mod support;
