//! The file system device (virtio 1.3, 5.11): a folder of the host, served to the guest's FUSE client. Queues:
//! [`HIPRIO_QUEUE`] and one [`REQUEST_QUEUE`]. Configuration space: the tag and the number of request queues. Features:
//! indirect descriptors; no notification queue, no DAX window.
//!
//! FUSE is fuse-backend-rs's; [`Share`] is what makes its passthrough file system fit for a hostile guest.

mod device;
mod metrics;
mod share;
#[cfg(test)]
mod tests;
mod worker;

pub(super) use device::for_users;
pub use device::{FsDevice, FsError, FsState, HIPRIO_QUEUE, REQUEST_QUEUE, Tag};
pub use metrics::FsMetrics;
pub use share::Share;
