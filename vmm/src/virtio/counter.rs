//! A number that a device's thread counts up and anyone reads.
//!
//! The `metrics.rs` of each device is a struct of these; the VMM reads them while the device serves.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that only grows. Reads are not synchronised with what is counted.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `count`; wraps at the end of u64, as counters of the kernel do.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds a number of bytes or items.
    pub fn add_len(&self, len: usize) {
        self.add(len as u64);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
