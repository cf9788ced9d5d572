//! The virtio devices. Each is a folder of its own and knows no other; what they share is in [`crate::virtio`].

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;
