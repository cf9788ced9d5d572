//! What the network device counts. "Received" and "transmitted" are the guest's view. Of what the host's kernel moves
//! (vhost-net) only the commands are counted here; the tap itself counts the packets.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of one network device.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Packets given to the guest.
    pub received_packets: Counter,
    /// Bytes of them, without headers of virtio's.
    pub received_bytes: Counter,
    /// Packets that no buffer of the guest was large enough for.
    pub received_dropped: Counter,
    /// Failed reads from the tap.
    pub received_errors: Counter,
    /// Packets that the tap took from the guest.
    pub transmitted_packets: Counter,
    /// Bytes of them, without headers of virtio's.
    pub transmitted_bytes: Counter,
    /// Packets that the tap refused: it is down or full, or their header makes no sense.
    pub transmitted_dropped: Counter,
    /// Commands of the driver that were refused.
    pub refused_commands: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl NetMetrics {
    /// Adds the counters under their names, of which the device's address is a part.
    pub fn collect(&self, address: &str, into: &mut BTreeMap<String, u64>) {
        for (name, counter) in [
            ("received_packets", &self.received_packets),
            ("received_bytes", &self.received_bytes),
            ("received_dropped", &self.received_dropped),
            ("received_errors", &self.received_errors),
            ("transmitted_packets", &self.transmitted_packets),
            ("transmitted_bytes", &self.transmitted_bytes),
            ("transmitted_dropped", &self.transmitted_dropped),
            ("refused_commands", &self.refused_commands),
            ("bad_chains", &self.bad_chains),
        ] {
            into.insert(format!("net_{address}_{name}"), counter.get());
        }
    }
}
