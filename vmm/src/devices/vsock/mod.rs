//! The socket device (virtio 1.3, 5.10): stream sockets between the guest and this process, without a kernel module on
//! the host. Queues: [`RX_QUEUE`] (to the guest), [`TX_QUEUE`] (from the guest), [`EVENT_QUEUE`]. Configuration space:
//! the guest's CID. Features: streams only, and indirect descriptors.
//!
//! The host opens connections, through a [`VsockHandle`], and has the far end of each as a unix stream socket. The guest
//! may open one, to the ready port, which carries nothing. Whatever else it tries is answered with RST.

mod connection;
mod device;
mod handle;
mod metrics;
mod packet;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{
    EVENT_QUEUE, RX_QUEUE, TX_QUEUE, VsockConfig, VsockDevice, VsockError, VsockState,
};
pub use handle::{ConnectError, VsockHandle, VsockStream};
pub use metrics::VsockMetrics;
