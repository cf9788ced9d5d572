//! What the memory device counts.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of the memory device.
#[derive(Debug, Default)]
pub struct MemMetrics {
    /// Requests answered, whatever the answer.
    pub requests: Counter,
    /// Of them, those that the guest should not have made.
    pub refused: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl MemMetrics {
    /// Adds the counters under their names.
    pub fn collect(&self, into: &mut BTreeMap<String, u64>) {
        into.insert("mem_requests".to_owned(), self.requests.get());
        into.insert("mem_refused".to_owned(), self.refused.get());
        into.insert("mem_bad_chains".to_owned(), self.bad_chains.get());
    }
}
