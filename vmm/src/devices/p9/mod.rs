//! The 9P transport (virtio 1.3, 5.9): a folder of the host, served to the guest's 9P client in the dialect of Linux,
//! 9P2000.L. Queue: [`REQUEST_QUEUE`]. Configuration space: the tag. Features: the tag, indirect descriptors.
//!
//! The files are those of the file system device, and so is all care for what a guest may do to them: what is here
//! translates 9P to the same [`Share`](super::fs::Share), which knows files by number and name, never by path.

mod data;
mod device;
mod failures;
mod fid;
mod message;
mod metrics;
mod server;
#[cfg(test)]
mod tests;
mod translate;
mod worker;

pub use device::{P9Device, P9Error, P9State, REQUEST_QUEUE};
pub use metrics::P9Metrics;
