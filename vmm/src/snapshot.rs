//! How the state of a device leaves it and comes back: as plain data.
//!
//! Snapshots, templates and migrations are made of these. A device is quiet when it is saved or restored: the vCPUs are
//! paused, and a virtio device has given its queues back ([`crate::virtio::VirtioDevice::pause`]). The positions of the
//! queues are the transport's to save; a device saves only what makes it this device. What refers to the host
//! (descriptors, paths, threads) is no state: the restored device is built from its configuration first.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a saved state does not fit the device that shall take it.
#[derive(Debug, thiserror::Error)]
#[error("the saved state of {device} does not fit: {reason}")]
pub struct RestoreError {
    /// Name of the device.
    pub device: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// A device whose state can be saved and restored.
pub trait Snapshot {
    /// The state, as plain data.
    type State: Serialize + DeserializeOwned;

    /// Copies the state out of the quiet device, and leaves the device as it is.
    fn save(&self) -> Self::State;

    /// Puts a saved state into a device that was made from the same configuration and is inactive. On failure the
    /// device is as it was before.
    ///
    /// # Errors
    /// When the state was saved by a device of another configuration, or contradicts itself. A saved state is input
    /// like any other: nothing in it is trusted.
    fn restore(&mut self, state: Self::State) -> Result<(), RestoreError>;
}
