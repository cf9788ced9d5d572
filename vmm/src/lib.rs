//! The hypervisor of Husk.
//!
//! It knows virtual machines and devices, and nothing of containers, OCI or containerd. The shim uses it through
//! [`control`], the protocol of the jailed worker process in which a VM runs.

pub mod config;
pub mod control;
pub mod devices;
pub mod snapshot;
pub mod virtio;
