//! What all virtio devices share: the [`VirtioDevice`] trait that the PCI transport drives, and its parts.

pub mod counter;
mod device;
pub mod queue;
mod shared_memory;
#[cfg(any(test, feature = "fuzzing"))]
#[allow(
    clippy::unwrap_used,
    reason = "it is part of tests, where a failure is to panic"
)]
pub mod testing;
pub mod worker;

pub use device::{ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice};
pub use shared_memory::SharedMemory;

/// Reads at `offset` of a configuration space; what lies past its end is zero.
pub(crate) fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..));
    if let Some(rest) = rest {
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
    }
}
