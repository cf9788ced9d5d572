//! A request while it is served: what is left to do of it, and where its outcome goes.
//!
//! A [`Job`] borrows the guest's memory, in which its buffers lie. A [`Pending`] owns its share of that memory as well, so that
//! it can be kept while the host works on it and others are served.

use std::io;
use std::sync::Arc;

use self_cell::self_cell;
use vm_memory::GuestMemoryMmap;

use super::disk::Storage;
use super::request::{Outcome, Range, Status};
use crate::virtio::queue::{Iovecs, Readable, Writable};

/// What the disk is to do next.
#[derive(Debug)]
pub(super) enum Step<'m> {
    /// Fill what is left of `room`.
    Read { room: Writable<'m>, offset: u64 },
    /// Write what is left of `data`.
    Write { data: Readable<'m>, offset: u64 },
    /// Make durable what was written before.
    Flush,
    /// Give up ranges.
    Discard { ranges: Vec<Range> },
    /// Zero ranges.
    Zero { ranges: Vec<Range> },
}

/// What the driver has asked for, as it is counted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Read { len: usize },
    Write { len: usize },
    Flush,
    Discard,
}

impl Kind {
    /// Bytes to read or write.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Read { len } | Self::Write { len } => len,
            Self::Flush | Self::Discard => 0,
        }
    }
}

/// A request that takes the disk's time.
#[derive(Debug)]
pub(super) struct Job<'m> {
    /// By which the chain is returned.
    pub(super) head: u16,
    pub(super) kind: Kind,
    pub(super) step: Step<'m>,
    pub(super) outcome: Outcome<'m>,
}

impl Job<'_> {
    /// Has the disk do the next step, or a part of it, and waits. Returns the number of bytes read or written.
    fn attempt(&mut self, storage: &dyn Storage) -> io::Result<usize> {
        match &mut self.step {
            Step::Read { room, offset } => {
                let moved = storage.read(room, *offset)?;
                *offset += moved as u64;
                Ok(moved)
            }
            Step::Write { data, offset } => {
                let moved = storage.write(data, *offset)?;
                *offset += moved as u64;
                Ok(moved)
            }
            Step::Flush => storage.flush().map(|()| 0),
            Step::Discard { ranges } => ranges
                .iter()
                .try_for_each(|range| storage.discard(range.offset, range.len))
                .map(|()| 0),
            Step::Zero { ranges } => ranges
                .iter()
                .try_for_each(|range| storage.write_zeroes(range.offset, range.len, range.unmap))
                .map(|()| 0),
        }
    }

    /// Takes note that somebody else has read or written `moved` bytes.
    fn consume(&mut self, moved: usize) {
        match &mut self.step {
            Step::Read { room, offset } => {
                room.take(moved);
                *offset += moved as u64;
            }
            Step::Write { data, offset } => {
                data.take(moved);
                *offset += moved as u64;
            }
            Step::Flush | Step::Discard { .. } | Step::Zero { .. } => {}
        }
    }
}

self_cell! {
    /// A job, and the memory that its buffers lie in.
    pub(super) struct Pending {
        owner: Arc<GuestMemoryMmap>,
        #[covariant]
        dependent: Job,
    }

    impl {Debug}
}

/// What somebody is to do who does it while the thread does something else.
#[derive(Debug)]
pub(super) enum Order {
    /// Read from the disk at `offset`.
    Read { into: Iovecs, offset: u64 },
    /// Write to the disk at `offset`.
    Write { from: Iovecs, offset: u64 },
    /// Make durable what was written before.
    Flush,
}

impl Pending {
    pub(super) fn job(&self) -> &Job<'_> {
        self.borrow_dependent()
    }

    /// See [`Job::attempt`].
    pub(super) fn attempt(&mut self, storage: &dyn Storage) -> io::Result<usize> {
        self.with_dependent_mut(|_, job| job.attempt(storage))
    }

    /// See [`Job::consume`].
    pub(super) fn consume(&mut self, moved: usize) {
        self.with_dependent_mut(|_, job| job.consume(moved));
    }

    /// Goes on with making durable what was written.
    pub(super) fn flush_next(&mut self) {
        self.with_dependent_mut(|_, job| job.step = Step::Flush);
    }

    /// See [`Outcome::tell`].
    pub(super) fn tell(&mut self, filled: Result<usize, Status>) -> u32 {
        self.with_dependent_mut(|_, job| job.outcome.tell(filled))
    }

    /// The next step, for others. Its addresses hold for as long as this is there. `None` if it is not for others, which
    /// know nothing of the ranges of a disk.
    pub(super) fn order(&self) -> Option<Order> {
        match &self.job().step {
            Step::Read { room, offset } => Some(Order::Read {
                into: room.iovecs(),
                offset: *offset,
            }),
            Step::Write { data, offset } => Some(Order::Write {
                from: data.iovecs(),
                offset: *offset,
            }),
            Step::Flush => Some(Order::Flush),
            Step::Discard { .. } | Step::Zero { .. } => None,
        }
    }
}
