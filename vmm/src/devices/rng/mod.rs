//! The entropy device (virtio 1.3, 5.4): one queue, whose chains the device fills with random bytes. No features, no
//! configuration space.

mod device;
mod metrics;

pub use device::{REQUEST_QUEUE, RngDevice, RngError};
pub use metrics::RngMetrics;
