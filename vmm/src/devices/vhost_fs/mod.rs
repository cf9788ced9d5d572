//! The file system device (virtio 1.3, 5.11) of a folder that another process serves, by vhost-user: to the guest it is what
//! [`super::fs`] is, with the same queues, configuration space and features, as far as the server has them.
//!
//! The messages are those of the crate `vhost`.

mod device;
mod server;
#[cfg(test)]
mod tests;
mod worker;

pub(crate) use device::VhostFsDevice;
