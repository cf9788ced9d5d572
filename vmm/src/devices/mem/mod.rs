//! The memory device (virtio 1.3, 5.15): a range of addresses above the memory of the start, of which the guest may use as
//! many blocks as the device asks it to. The guest decides which, and when; the host learns it request by request.
//!
//! One queue, [`REQUEST_QUEUE`]. No features: unplugged blocks lie in the same KVM memory slot as plugged ones and could be
//! read and written by a guest that breaks the rules, which costs the host no more than the guest's control group allows.

mod device;
mod metrics;
mod region;

pub use device::{MemDevice, MemError, MemHandle, REQUEST_QUEUE};
pub use metrics::MemMetrics;
pub use region::{BLOCK_SIZE, RegionState};
