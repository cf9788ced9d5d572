//! What the socket device counts. "Sent" and "received" are the host's view.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of one socket device.
#[derive(Debug, Default)]
pub struct VsockMetrics {
    /// Connections that the guest accepted.
    pub connections: Counter,
    /// Connections that the guest refused.
    pub refused: Counter,
    /// Packets put into the receive queue of the guest.
    pub sent_packets: Counter,
    /// Bytes of streams in them.
    pub sent_bytes: Counter,
    /// Packets taken from the transmit queue of the guest.
    pub received_packets: Counter,
    /// Bytes of streams in them.
    pub received_bytes: Counter,
    /// Packets that did nothing but grant credit.
    pub credit_updates: Counter,
    /// RST packets sent: for connections that do not exist, or whose packets broke the protocol.
    pub resets: Counter,
    /// Connections of which the guest sent more than it had credit for.
    pub credit_abuses: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl VsockMetrics {
    /// Adds the counters under their names.
    pub fn collect(&self, into: &mut BTreeMap<String, u64>) {
        for (name, counter) in [
            ("vsock_connections", &self.connections),
            ("vsock_refused", &self.refused),
            ("vsock_sent_packets", &self.sent_packets),
            ("vsock_sent_bytes", &self.sent_bytes),
            ("vsock_received_packets", &self.received_packets),
            ("vsock_received_bytes", &self.received_bytes),
            ("vsock_credit_updates", &self.credit_updates),
            ("vsock_resets", &self.resets),
            ("vsock_credit_abuses", &self.credit_abuses),
            ("vsock_bad_chains", &self.bad_chains),
        ] {
            into.insert(name.to_owned(), counter.get());
        }
    }
}
