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

/// [`Snapshot`] for a caller that does not know the type of the device. Every [`Snapshot`] is one.
pub trait AnySnapshot {
    /// [`Snapshot::save`], as JSON's data model.
    fn save_value(&self) -> serde_json::Value;

    /// [`Snapshot::restore`].
    ///
    /// # Errors
    /// As there, and when the value is not the state of a device of this type.
    fn restore_value(&mut self, value: serde_json::Value) -> Result<(), RestoreError>;
}

impl<T: Snapshot> AnySnapshot for T {
    fn save_value(&self) -> serde_json::Value {
        serde_json::to_value(self.save()).expect("a state is plain data with text for keys")
    }

    fn restore_value(&mut self, value: serde_json::Value) -> Result<(), RestoreError> {
        let state = serde_json::from_value(value).map_err(|err| RestoreError {
            device: "device",
            reason: err.to_string(),
        })?;
        self.restore(state)
    }
}
