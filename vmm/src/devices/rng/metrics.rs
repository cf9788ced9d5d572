//! What the entropy device counts.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of one entropy device.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Requests answered.
    pub requests: Counter,
    /// Random bytes given.
    pub bytes: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl RngMetrics {
    /// Adds the counters under their names.
    pub fn collect(&self, into: &mut BTreeMap<String, u64>) {
        into.insert("rng_requests".to_owned(), self.requests.get());
        into.insert("rng_bytes".to_owned(), self.bytes.get());
        into.insert("rng_bad_chains".to_owned(), self.bad_chains.get());
    }
}
