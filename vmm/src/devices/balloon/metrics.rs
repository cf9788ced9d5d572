//! What the memory balloon counts.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of the memory balloon.
#[derive(Debug, Default)]
pub struct BalloonMetrics {
    /// Reports of unused memory.
    pub reports: Counter,
    /// Bytes of them given back to the host.
    pub reported_bytes: Counter,
    /// Pieces that the host did not take back.
    pub failures: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl BalloonMetrics {
    /// Adds the counters under their names.
    pub fn collect(&self, into: &mut BTreeMap<String, u64>) {
        into.insert("balloon_reports".to_owned(), self.reports.get());
        into.insert(
            "balloon_reported_bytes".to_owned(),
            self.reported_bytes.get(),
        );
        into.insert("balloon_failures".to_owned(), self.failures.get());
        into.insert("balloon_bad_chains".to_owned(), self.bad_chains.get());
    }
}
