//! The virtio devices. Each is a folder of its own and knows no other, but that [`p9`] serves the
//! folder that [`fs`] has, and `vhost_fs` is to the guest what that is; what they share is in [`crate::virtio`].

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod mem;
pub mod net;
pub mod p9;
pub mod rng;
pub(crate) mod vhost_fs;
pub mod vsock;
