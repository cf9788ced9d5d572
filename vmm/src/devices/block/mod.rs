//! The block device (virtio 1.3, 5.2): a disk in a regular file or a block device of the host. One queue,
//! [`REQUEST_QUEUE`], or up to [`MAX_QUEUES`] from it on. Configuration space: capacity, block sizes, number of queues and the
//! limits of DISCARD and WRITE_ZEROES. Features: FLUSH, SEG_MAX, BLK_SIZE, TOPOLOGY, indirect descriptors, MQ with several
//! queues; RO, or else DISCARD and WRITE_ZEROES.

mod device;
mod disk;
mod job;
mod metrics;
mod request;
mod ring;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{BlockConfig, BlockDevice, BlockError, BlockState, MAX_QUEUES, REQUEST_QUEUE};
pub use metrics::BlockMetrics;
