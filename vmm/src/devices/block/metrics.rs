//! What the block device counts.

use std::collections::BTreeMap;

use crate::virtio::counter::Counter;

/// Counters of one block device.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Reads done.
    pub reads: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Writes done.
    pub writes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Flushes done: each is an fdatasync.
    pub flushes: Counter,
    /// Requests to discard, or to write zeroes, done.
    pub discards: Counter,
    /// Requests answered with an error.
    pub errors: Counter,
    /// Chains returned unserved because they were malformed.
    pub bad_chains: Counter,
}

impl BlockMetrics {
    /// Adds the counters under their names, of which the disk's serial is a part.
    pub fn collect(&self, serial: &str, into: &mut BTreeMap<String, u64>) {
        for (name, counter) in [
            ("reads", &self.reads),
            ("read_bytes", &self.read_bytes),
            ("writes", &self.writes),
            ("written_bytes", &self.written_bytes),
            ("flushes", &self.flushes),
            ("discards", &self.discards),
            ("errors", &self.errors),
            ("bad_chains", &self.bad_chains),
        ] {
            into.insert(format!("block_{serial}_{name}"), counter.get());
        }
    }
}
