//! What has become known to the guest, and what it has forgotten, for the thread that watches ([`super::super::watch`]): it
//! is told by the threads that serve requests, which wait for nothing.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// What has happened to a node since the thread was told of it.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::devices::fs) enum Fate {
    /// It is known from now on.
    Known,
    /// It is no more, and was last seen at this path below the root, if that can be told.
    Forgotten(Option<Vec<u8>>),
}

/// What the thread takes.
#[derive(Debug, Default)]
pub(in crate::devices::fs) struct Batch {
    /// All that was known before is forgotten.
    pub(in crate::devices::fs) reset: bool,
    /// The thread is to end.
    pub(in crate::devices::fs) end: bool,
    /// What a node that was known and forgotten in between has no part in: there are no more of these than nodes that are
    /// known, or were when the thread looked last.
    pub(in crate::devices::fs) nodes: HashMap<u64, Fate>,
}

/// Between the threads that serve requests and the one that watches.
#[derive(Debug)]
pub(in crate::devices::fs) struct News {
    batch: Mutex<Batch>,
    wake: OwnedFd,
}

impl News {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            batch: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    pub(super) fn known(&self, number: u64) {
        self.tell(|batch| drop(batch.nodes.insert(number, Fate::Known)));
    }

    pub(super) fn forgotten(&self, number: u64, path: Option<Vec<u8>>) {
        self.tell(|batch| {
            if batch.nodes.remove(&number) != Some(Fate::Known) {
                batch.nodes.insert(number, Fate::Forgotten(path));
            }
        });
    }

    pub(super) fn reset(&self) {
        self.tell(|batch| {
            batch.reset = true;
            batch.nodes.clear();
        });
    }

    /// Makes the thread end.
    pub(in crate::devices::fs) fn end(&self) {
        self.tell(|batch| batch.end = true);
    }

    /// Takes what there is.
    pub(in crate::devices::fs) fn take(&self) -> Batch {
        // First, so that what comes next wakes again.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        std::mem::take(&mut *self.lock())
    }

    fn tell(&self, tell: impl FnOnce(&mut Batch)) {
        let mut batch = self.lock();
        let is_first = batch.nodes.is_empty();
        tell(&mut batch);
        let wakes = is_first || batch.reset || batch.end;
        drop(batch);
        if wakes {
            // It can only fail because the counter is full, and then the thread is awake anyway.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Batch> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for News {
    /// Readable while there may be something to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_and_went_is_no_news() {
        let news = News::new().unwrap();
        news.known(7);
        news.known(8);
        news.forgotten(7, Some(b"a".to_vec()));
        assert_eq!(news.take().nodes, HashMap::from([(8, Fate::Known)]));
        news.forgotten(8, None);
        let forgotten = HashMap::from([(8, Fate::Forgotten(None))]);
        assert_eq!(news.take().nodes, forgotten);
        assert!(news.take().nodes.is_empty());
    }

    #[test]
    fn reset_leaves_nothing_to_tell_of_what_was_before() {
        let news = News::new().unwrap();
        news.known(7);
        news.reset();
        news.known(9);
        let batch = news.take();
        assert!(batch.reset && !batch.end);
        assert_eq!(batch.nodes, HashMap::from([(9, Fate::Known)]));
    }
}
