//! The memory balloon (virtio 1.3, 5.5), for what it does beside ballooning: VIRTIO_BALLOON_F_PAGE_REPORTING, by which the
//! guest says what memory it does not use, and the host takes it back until the guest touches it again. The balloon itself
//! stays empty (its target, `num_pages`, is 0 for ever): memory that a VM shall not have any more is taken by [`super::mem`].
//!
//! Queues: [`INFLATE_QUEUE`], [`DEFLATE_QUEUE`], [`REPORTING_QUEUE`]. The specification (5.5.2) numbers the last one 4, with
//! room for two queues of features that are not offered; Linux's drivers, and with them the devices of other VMMs, number
//! the queues that there are.

mod device;
mod metrics;

pub use device::{BalloonDevice, BalloonError, DEFLATE_QUEUE, INFLATE_QUEUE, REPORTING_QUEUE};
pub use metrics::BalloonMetrics;
