//! What the 9P device counts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::virtio::counter::Counter;

/// Counters of one 9P device.
#[derive(Debug, Default)]
pub struct P9Metrics {
    /// Requests answered, those that failed included.
    pub requests: Counter,
    /// Requests answered with an error.
    pub errors: Counter,
    /// Chains returned unserved because they were malformed, too long, or had no room for an answer.
    pub bad_chains: Counter,
    /// Fids that the guest has now.
    pub fids: AtomicU64,
    /// Files and folders that the guest has open now.
    pub open_files: AtomicU64,
}

impl P9Metrics {
    /// Adds the counters under their names, of which the device's tag is a part.
    pub fn collect(&self, tag: &str, into: &mut BTreeMap<String, u64>) {
        into.insert(format!("p9_{tag}_requests"), self.requests.get());
        into.insert(format!("p9_{tag}_errors"), self.errors.get());
        into.insert(format!("p9_{tag}_bad_chains"), self.bad_chains.get());
        let now = |gauge: &AtomicU64| gauge.load(Ordering::Relaxed);
        into.insert(format!("p9_{tag}_fids"), now(&self.fids));
        into.insert(format!("p9_{tag}_open_files"), now(&self.open_files));
    }
}
