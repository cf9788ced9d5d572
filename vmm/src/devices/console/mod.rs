//! The console device (virtio 1.3, 5.3): one port, of which only the output is used. Queues: [`RECEIVE_QUEUE`], whose
//! buffers stay where they are, and [`TRANSMIT_QUEUE`]. No features: no size, no further ports.

mod device;
mod metrics;

pub use device::{ConsoleDevice, ConsoleError, RECEIVE_QUEUE, TRANSMIT_QUEUE};
pub use metrics::ConsoleMetrics;
