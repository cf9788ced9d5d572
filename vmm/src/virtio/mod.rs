//! What all virtio devices share: the [`VirtioDevice`] trait that the PCI transport drives, and its parts.

pub mod counter;
mod device;
pub mod queue;
#[cfg(test)]
pub mod testing;
pub mod worker;

pub use device::{ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice};
