//! What the file system device counts.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of one file system device.
#[derive(Debug, Default)]
pub struct FsMetrics {
    /// Requests answered, those that failed included.
    pub requests: Counter,
    /// Pieces of files that were mapped in the DAX window.
    pub mappings: Counter,
    /// Requests that cannot be FUSE, answered with EIO where an answer is due.
    pub bad_requests: Counter,
    /// Chains returned unserved because they were malformed or too long.
    pub bad_chains: Counter,
}

impl FsMetrics {
    /// Adds the counters under their names, of which the device's tag is a part.
    pub fn collect(&self, tag: &str, into: &mut BTreeMap<String, u64>) {
        into.insert(format!("fs_{tag}_requests"), self.requests.get());
        into.insert(format!("fs_{tag}_mappings"), self.mappings.get());
        into.insert(format!("fs_{tag}_bad_requests"), self.bad_requests.get());
        into.insert(format!("fs_{tag}_bad_chains"), self.bad_chains.get());
    }
}
