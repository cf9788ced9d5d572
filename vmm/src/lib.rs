//! The hypervisor of Husk.
//!
//! It knows virtual machines and devices, and nothing of containers, OCI or containerd. The shim uses it through
//! [`control`], the protocol of the jailed worker process in which a VM runs.

mod board;
mod boot;
mod bus;
mod changes;
pub mod config;
pub mod control;
pub mod devices;
mod end;
mod error;
mod faults;
mod irq;
mod kvm;
mod layout;
mod memory;
mod pci;
mod platform;
mod probe;
pub mod snapshot;
mod vcpu;
pub mod virtio;
mod vmm;
mod windows;
pub mod worker;
mod workshop;

pub use error::Error;
pub use probe::{ProbeError, probe};
pub use vcpu::VcpuSetup;
pub use vmm::{Confinement, NicFiles, RestoreFiles, VmFiles, VmState, Vmm};
