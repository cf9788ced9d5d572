//! What all virtio devices share: the [`VirtioDevice`] trait that the PCI transport drives, and its parts.

mod device;

pub use device::{ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice};
