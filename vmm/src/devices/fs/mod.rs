//! The file system device (virtio 1.3, 5.11): a folder of the host, served to the guest's FUSE client. Queues:
//! [`HIPRIO_QUEUE`] and, from [`REQUEST_QUEUE`] on, one for each vCPU, four at most. Configuration space: the tag and the
//! number of request queues. Features: indirect descriptors; no notification queue.
//!
//! The protocol is fuse-backend-rs's; [`Share`] is the file system.

mod device;
mod metrics;
mod share;
#[cfg(test)]
pub(in crate::devices) mod tests;
mod watch;
mod worker;

pub(super) use device::{CONFIG_LEN, MAX_REQUEST_QUEUES, config_space, for_users, queue_sizes};
pub use device::{FsDevice, FsError, FsState, HIPRIO_QUEUE, REQUEST_QUEUE, Tag};
pub use metrics::FsMetrics;
pub(super) use share::MAX_NODES;
pub use share::Share;
