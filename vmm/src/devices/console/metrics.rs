//! What the console device counts.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of one console device.
#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    /// Bytes written to the console's descriptor.
    pub bytes: Counter,
    /// Bytes dropped because the descriptor did not take them.
    pub dropped_bytes: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl ConsoleMetrics {
    /// Adds the counters under their names.
    pub fn collect(&self, into: &mut BTreeMap<String, u64>) {
        into.insert("console_bytes".to_owned(), self.bytes.get());
        into.insert("console_dropped_bytes".to_owned(), self.dropped_bytes.get());
        into.insert("console_bad_chains".to_owned(), self.bad_chains.get());
    }
}
