//! The network device (virtio 1.3, 5.1): an Ethernet interface whose other end is a tap of the host; packets
//! are moved by the device's threads or by the host's kernel (vhost-net), with the same features. Queues in pairs, for
//! each pair n [`receive_queue`] and [`transmit_queue`], and one for control behind the last. Configuration space: MAC
//! address, status, number of pairs, MTU. Features: MAC, MTU, STATUS, MRG_RXBUF, indirect descriptors, checksums and
//! segmentation in both directions as far as the tap has them, CTRL_VQ with CTRL_RX, CTRL_GUEST_OFFLOADS and MQ.

mod control;
mod device;
mod metrics;
mod pair;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;
mod worker;

pub use device::{NetDevice, NetError, NetState};
pub use metrics::NetMetrics;
pub use vhost::VhostError;

/// Index of the receive queue of a pair.
pub const fn receive_queue(pair: u16) -> u16 {
    2 * pair
}

/// Index of the transmit queue of a pair.
pub const fn transmit_queue(pair: u16) -> u16 {
    2 * pair + 1
}
