//! A split virtqueue from the device's side: [`virtio_queue`] with what it leaves to its users.
//!
//! [`Virtqueue`] adds the notifications in both directions, and the drain loop that all devices share. [`Chain`] adds
//! the checks that a descriptor chain needs before any byte of it is used, and buffers that system calls can fill and
//! empty without a copy ([`Readable`], [`Writable`]). Nothing here knows a device.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Interrupt};

/// Most buffers in one descriptor chain. An indirect table could name 65535; no driver needs more than one system call
/// takes (UIO_MAXIOV), and the devices tell drivers so where the device type has a field for it.
pub const MAX_SEGMENTS: usize = 1024;

/// Flags and index, before the elements of both rings (virtio 1.3, 2.7.6 and 2.7.8).
const RING_HEADER: u64 = 4;
const INDEX_OFFSET: u64 = 2;
/// Bytes of an element of the available ring, and of one of the used ring.
const AVAILABLE_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// How long an answer may lie in the used ring while the requests behind it are served. Requests that are served faster
/// than this share an interrupt; whoever waits for one before a slow one need not wait for both.
pub const MAX_SILENCE: Duration = Duration::from_micros(100);

/// How long a thread serves one queue before it looks at what else there is to do.
pub const MAX_TURN: Duration = Duration::from_millis(10);

/// The rings themselves are unusable. The device cannot go on without a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available ring cannot be read, or its index makes no sense.
    #[error("cannot take a chain from the available ring of queue {index}")]
    Available {
        /// Index of the queue.
        index: u16,
        /// What the ring said.
        source: virtio_queue::Error,
    },
    /// The used ring cannot be written, or the driver's notification fields cannot be accessed.
    #[error("cannot use the used ring of queue {index}")]
    Used {
        /// Index of the queue.
        index: u16,
        /// What the ring said.
        source: virtio_queue::Error,
    },
    /// The eventfd of the queue does not work.
    #[error("cannot use the kick of queue {index}")]
    Kick {
        /// Index of the queue.
        index: u16,
        /// What the system said.
        source: io::Error,
    },
}

/// What is wrong with one descriptor chain. The chain is returned unserved; the device goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It loops, leaves its table, is longer than 4 GiB, or nests indirect tables.
    #[error("descriptor chain is broken")]
    Broken,
    /// It names memory that the guest does not have.
    #[error("descriptor outside of the guest's memory")]
    OutOfMemory,
    /// It has more buffers than [`MAX_SEGMENTS`].
    #[error("descriptor chain with more than {MAX_SEGMENTS} buffers")]
    TooManySegments,
    /// A device-readable descriptor follows a device-writable one (virtio 1.3, 2.7.4.2).
    #[error("device-readable descriptor after a device-writable one")]
    WrongOrder,
}

/// Takes the queues that a device cannot do without out of its activation.
///
/// # Errors
/// When the driver has left one out.
pub fn take_queues<const N: usize>(
    activation: Activation,
    indices: [u16; N],
) -> Result<[Virtqueue; N], ActivateError> {
    Ok(take_queues_and(activation, indices, 0..0)?.0)
}

/// The same, and those of `others` that the driver has not left out.
///
/// # Errors
/// As [`take_queues`].
pub fn take_queues_and<const N: usize>(
    mut activation: Activation,
    indices: [u16; N],
    others: Range<u16>,
) -> Result<([Virtqueue; N], Vec<Virtqueue>), ActivateError> {
    let memory = Arc::new(activation.memory);
    let interrupt = activation.interrupt;
    let mut take = |index| {
        let queue = take_queue(&mut activation.queues, index)?;
        let (memory, interrupt) = (Arc::clone(&memory), Arc::clone(&interrupt));
        Some(Virtqueue::new(queue, memory, interrupt))
    };
    let mut taken = Vec::with_capacity(N);
    for index in indices {
        taken.push(take(index).ok_or(ActivateError::MissingQueue { index })?);
    }
    let taken = taken.try_into().expect("one was pushed for each index");
    Ok((taken, others.filter_map(take).collect()))
}

/// Takes one queue out of those of an activation; `None` if the driver has left it out.
pub fn take_queue(queues: &mut Vec<ActiveQueue>, index: u16) -> Option<ActiveQueue> {
    let position = queues.iter().position(|queue| queue.index == index)?;
    Some(queues.swap_remove(position))
}

/// One virtqueue while its device is active.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Arc<dyn Interrupt>,
    /// Position in the used ring up to which the driver was told, or needed no telling.
    announced: u16,
}

impl Virtqueue {
    /// Takes over an enabled queue.
    pub fn new(
        queue: ActiveQueue,
        memory: Arc<GuestMemoryMmap>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            index: queue.index,
            announced: queue.queue.next_used(),
            queue: queue.queue,
            kick: queue.kick,
            memory,
            interrupt,
        }
    }

    /// Gives the queue back as it stands.
    pub fn into_active(self) -> ActiveQueue {
        ActiveQueue {
            index: self.index,
            queue: self.queue,
            kick: self.kick,
        }
    }

    /// Its index in the device's numbering.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its size in descriptors, as the driver chose it.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The eventfd that the driver's kicks make readable.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The memory that the chains of this queue point into.
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(&self.memory)
    }

    /// Serves every chain that the driver has made available; returns each exactly once, with the number of bytes that
    /// `serve` says it wrote, and tells the driver at the end, or earlier if that takes longer than [`MAX_SILENCE`].
    ///
    /// After [`MAX_TURN`] it kicks its own queue and returns, so that neither a driver that never stops nor a ring full of slow
    /// requests keeps the thread from its other descriptors, the order to stop among them.
    ///
    /// # Errors
    /// When the rings are unusable.
    pub fn drain(&mut self, mut serve: impl FnMut(Chain<'_>) -> u32) -> Result<(), QueueError> {
        let memory = self.memory();
        let begun = Instant::now();
        let mut told = begun;
        self.suppress_kicks()?;
        loop {
            while let Some(chain) = self.pop(&memory)? {
                let head = chain.head();
                let written = serve(chain);
                self.push_used(head, written)?;
                let now = Instant::now();
                if now - told >= MAX_SILENCE {
                    self.notify_if_needed()?;
                    told = now;
                }
                if now - begun >= MAX_TURN {
                    self.kick_self()?;
                    return self.notify_if_needed();
                }
            }
            if !self.await_kicks()? {
                return self.notify_if_needed();
            }
        }
    }

    /// Takes the next available chain. Each must be given to [`Self::push_used`] or [`Self::undo_pop`].
    ///
    /// `memory` is [`Self::memory`], lent by the caller so that the chain does not borrow the queue.
    ///
    /// # Errors
    /// When the available ring is unusable.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        let index = self.index;
        let broken = |source| QueueError::Available { index, source };
        let mut available = self.queue.iter(memory).map_err(broken)?;
        Ok(available.next().map(|descriptors| Chain {
            descriptors,
            memory,
        }))
    }

    /// Puts the chain that was popped last back into the available ring.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, which will not be told before [`Self::notify_if_needed`].
    ///
    /// # Errors
    /// When the used ring is unusable, or the head was none.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_used_together(&[(head, written)])
    }

    /// Returns chains, each a head and the number of bytes written, of which the driver shall not see one without the
    /// others. Otherwise as [`Self::push_used`].
    ///
    /// # Errors
    /// As there.
    pub fn push_used_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let index = self.index;
        self.write_used(chains)
            .map_err(|source| QueueError::Used { index, source })
    }

    fn write_used(&mut self, chains: &[(u16, u32)]) -> Result<(), virtio_queue::Error> {
        let size = self.queue.size();
        let ring = GuestAddress(self.queue.used_ring());
        let mut next = self.queue.next_used();
        for &(head, written) in chains {
            if head >= size {
                return Err(virtio_queue::Error::InvalidDescriptorIndex);
            }
            let mut element = [0; 8];
            element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            element[4..].copy_from_slice(&written.to_le_bytes());
            let at = offset(ring, RING_HEADER + u64::from(next % size) * USED_ELEMENT)?;
            self.memory
                .write_slice(&element, at)
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // Released: whoever sees the index sees the elements.
        self.memory
            .store(next.to_le(), offset(ring, INDEX_OFFSET)?, Ordering::Release)
            .map_err(virtio_queue::Error::GuestMemory)
    }

    /// Interrupts the driver if chains were returned and it wants to know (virtio 1.3, 2.7.7.2).
    ///
    /// # Errors
    /// When the available ring is unusable.
    pub fn notify_if_needed(&mut self) -> Result<(), QueueError> {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.announced, used);
        if used == before {
            return Ok(());
        }
        if self.queue.event_idx_enabled() {
            let event = self.used_event().map_err(|source| QueueError::Available {
                index: self.index,
                source,
            })?;
            // Whether the element after which the driver wants to be told is one of the new ones.
            if used.wrapping_sub(event).wrapping_sub(1) >= used.wrapping_sub(before) {
                return Ok(());
            }
        }
        self.interrupt.queue(self.index);
        Ok(())
    }

    /// The driver's `used_event`, which lies behind the available ring.
    fn used_event(&self) -> Result<u16, virtio_queue::Error> {
        // The index must be visible to a driver that has not yet written the event that is read here.
        fence(Ordering::SeqCst);
        let elements = u64::from(self.queue.size()) * AVAILABLE_ELEMENT;
        let ring = GuestAddress(self.queue.avail_ring());
        self.memory
            .load(offset(ring, RING_HEADER + elements)?, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(virtio_queue::Error::GuestMemory)
    }

    /// Asks the driver not to kick (virtio 1.3, 2.7.10).
    ///
    /// # Errors
    /// When the used ring is unusable.
    pub fn suppress_kicks(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(self.memory.as_ref())
            .map_err(|source| QueueError::Used {
                index: self.index,
                source,
            })
    }

    /// Asks the driver to kick at the next chain. True if chains came meanwhile, for which no kick will come.
    ///
    /// # Errors
    /// When the rings are unusable.
    pub fn await_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(self.memory.as_ref())
            .map_err(|source| QueueError::Used {
                index: self.index,
                source,
            })
    }

    /// Takes note of the kicks so far.
    pub(super) fn acknowledge_kick(&self) -> Result<(), QueueError> {
        match self.kick.read() {
            Ok(_) => Ok(()),
            // Somebody was faster, or the kick was a false alarm of epoll.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(source) => Err(QueueError::Kick {
                index: self.index,
                source,
            }),
        }
    }

    /// Makes the device's thread come back to this queue.
    ///
    /// # Errors
    /// When the eventfd does not take it.
    pub fn kick_self(&self) -> Result<(), QueueError> {
        self.kick.write(1).map_err(|source| QueueError::Kick {
            index: self.index,
            source,
        })
    }
}

fn offset(ring: GuestAddress, bytes: u64) -> Result<GuestAddress, virtio_queue::Error> {
    ring.checked_add(bytes)
        .ok_or(virtio_queue::Error::AddressOverflow)
}

/// A descriptor chain as the driver made it, unchecked.
#[derive(Debug, Clone)]
pub struct Chain<'m> {
    descriptors: DescriptorChain<&'m GuestMemoryMmap>,
    memory: &'m GuestMemoryMmap,
}

impl<'m> Chain<'m> {
    /// Its first descriptor's index, by which it is returned.
    pub fn head(&self) -> u16 {
        self.descriptors.head_index()
    }

    /// The memory that it points into.
    pub fn memory(&self) -> &'m GuestMemoryMmap {
        self.memory
    }

    /// The chain as the crate has it, for libraries that take it so.
    pub fn descriptors(&self) -> DescriptorChain<&'m GuestMemoryMmap> {
        self.descriptors.clone()
    }

    /// Checks the whole chain and resolves it into the two halves of its buffers.
    ///
    /// # Errors
    /// When any descriptor of it is wrong.
    pub fn buffers(self) -> Result<(Readable<'m>, Writable<'m>), ChainError> {
        let mut readable = Segments::default();
        let mut writable = Segments::default();
        // The iterator ends early, without a word, where the chain is broken. That shows as a last descriptor that
        // promised another one, or as no descriptor at all.
        let mut expect_more = true;
        for descriptor in self.descriptors {
            expect_more = descriptor.has_next();
            let half = if descriptor.is_write_only() {
                &mut writable
            } else if writable.slices.is_empty() {
                &mut readable
            } else {
                return Err(ChainError::WrongOrder);
            };
            for slice in self
                .memory
                .get_slices(descriptor.addr(), descriptor.len() as usize)
            {
                half.push(slice.map_err(|_| ChainError::OutOfMemory)?);
            }
            if readable.slices.len() + writable.slices.len() > MAX_SEGMENTS {
                return Err(ChainError::TooManySegments);
            }
        }
        if expect_more {
            return Err(ChainError::Broken);
        }
        Ok((Readable(readable), Writable(writable)))
    }
}

/// Buffers in guest memory, consumed from the front.
#[derive(Debug, Default)]
struct Segments<'m> {
    slices: VecDeque<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Segments<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            // No overflow: virtio-queue ends a chain before 4 GiB.
            self.len += slice.len();
            self.slices.push_back(slice);
        }
    }

    /// Cuts off the first `count` bytes, or all if there are fewer.
    fn take(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        while front.len < count {
            let Some(slice) = self.slices.pop_front() else {
                break;
            };
            self.len -= slice.len();
            let wanted = (count - front.len).min(slice.len());
            let (head, tail) = slice
                .split_at(wanted)
                .expect("wanted is at most the slice's length");
            front.push(head);
            if !tail.is_empty() {
                self.len += tail.len();
                self.slices.push_front(tail);
            }
        }
        front
    }

    fn append(&mut self, other: Self) {
        self.len += other.len;
        self.slices.extend(other.slices);
    }

    /// Iovecs over everything. They point into guest memory that `'m` keeps mapped.
    fn iovecs(&self) -> impl Iterator<Item = libc::iovec> {
        self.slices.iter().map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }

    /// Runs a vectored system call over everything, repeated while interrupted, and consumes what it moved.
    fn transfer(
        &mut self,
        call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let iovecs: Vec<_> = self.iovecs().collect();
        let moved = run_vectored(&iovecs, call)?;
        self.take(moved);
        Ok(moved)
    }
}

// SAFETY: of its fields only the addresses in the slices keep it from being `Send`. They point into memory that is shared
// with the guest, to which all access is volatile, whichever thread it is from; what keeps it mapped for `'m` is `Sync`.
unsafe impl Send for Segments<'_> {}

/// Buffers as a system call takes them that goes on after it has returned. They are no more than addresses of guest memory,
/// and hold for as long as what they were made from.
#[derive(Debug)]
pub struct Iovecs(Vec<libc::iovec>);

// SAFETY: they are addresses, which nothing here follows. Who does has to know that they hold, whatever the thread.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// Where the first is. It stays there when this is moved.
    pub fn as_ptr(&self) -> *const libc::iovec {
        self.0.as_ptr()
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.0.len()).expect("at most MAX_SEGMENTS")
    }
}

/// Runs a vectored system call, repeated while interrupted.
fn run_vectored(
    iovecs: &[libc::iovec],
    call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(iovecs.len()).expect("at most MAX_SEGMENTS");
    loop {
        match usize::try_from(call(iovecs.as_ptr(), count)) {
            Ok(moved) => return Ok(moved),
            Err(_negative) => {
                let err = io::Error::last_os_error();
                if err.kind() != io::ErrorKind::Interrupted {
                    return Err(err);
                }
            }
        }
    }
}

/// A message of a stream socket: nothing but bytes.
fn message(iovecs: *const libc::iovec, count: libc::c_int) -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: iovecs.cast_mut(),
        msg_iovlen: usize::try_from(count).expect("a count is not negative"),
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// The device-readable half of a chain: what the driver sends, consumed from the front.
#[derive(Debug, Default)]
pub struct Readable<'m>(Segments<'m>);

impl<'m> Readable<'m> {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Cuts off the first `count` bytes, or all if there are fewer.
    pub fn take(&mut self, count: usize) -> Self {
        Self(self.0.take(count))
    }

    /// The pieces of guest memory that it is made of.
    pub fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.0.slices.iter()
    }

    /// Appends other data behind this.
    pub fn append(&mut self, other: Self) {
        self.0.append(other.0);
    }

    /// What is left, for a system call that reads it later.
    pub fn iovecs(&self) -> Iovecs {
        Iovecs(self.0.iovecs().collect())
    }

    /// Copies an object out. `None`, and nothing consumed, if it is not there whole.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut object = T::default();
        if self.len() < size_of::<T>() {
            return None;
        }
        self.read(object.as_mut_slice());
        Some(object)
    }

    /// Copies out as much as there is and `bytes` has room for.
    pub fn read(&mut self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.0.take(bytes.len()).slices {
            done += slice.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Writes to a descriptor as much as it takes at once.
    ///
    /// # Errors
    /// As writev(2), but for EINTR. Nothing is consumed then.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.0.transfer(|iovecs, count| {
            // SAFETY: the iovecs point to mapped guest memory that outlives the call; the kernel only reads it, and
            // knows no aliasing rules.
            unsafe { libc::writev(fd.as_raw_fd(), iovecs, count) }
        })
    }

    /// Sends to a stream socket as much as it takes at once, without SIGPIPE.
    ///
    /// # Errors
    /// As sendmsg(2), but for EINTR. Nothing is consumed then.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.0.transfer(|iovecs, count| {
            let message = message(iovecs, count);
            // SAFETY: the message names nothing but the iovecs, which point to mapped guest memory that outlives the
            // call; the kernel only reads it.
            unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            }
        })
    }

    /// Writes to a file at `offset` as much as it takes at once.
    ///
    /// # Errors
    /// As pwritev(2), but for EINTR. Nothing is consumed then.
    pub fn write_to_at(&mut self, fd: BorrowedFd<'_>, offset: libc::off_t) -> io::Result<usize> {
        // SAFETY: as in `write_to`.
        self.0.transfer(|iovecs, count| unsafe {
            libc::pwritev(fd.as_raw_fd(), iovecs, count, offset)
        })
    }
}

/// The device-writable half of a chain: what the device answers, filled from the front.
#[derive(Debug, Default)]
pub struct Writable<'m>(Segments<'m>);

impl<'m> Writable<'m> {
    /// Room left, in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether no room is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Number of iovecs that it takes.
    pub fn segments(&self) -> usize {
        self.0.slices.len()
    }

    /// Cuts off the first `count` bytes of room, or all if there are fewer.
    pub fn take(&mut self, count: usize) -> Self {
        Self(self.0.take(count))
    }

    /// The pieces of guest memory that it is made of.
    pub fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.0.slices.iter()
    }

    /// The room that is left, for a system call that fills it later.
    pub fn iovecs(&self) -> Iovecs {
        Iovecs(self.0.iovecs().collect())
    }

    /// Appends the room of another chain behind this one's.
    pub fn append(&mut self, other: Self) {
        self.0.append(other.0);
    }

    /// Copies in as much of `bytes` as there is room for.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.0.take(bytes.len()).slices {
            slice.copy_from(&bytes[done..]);
            done += slice.len();
        }
        done
    }

    /// Fills `count` bytes, or all if there are fewer, with zeroes.
    pub fn zero(&mut self, count: usize) -> usize {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        for slice in self.0.take(count).slices {
            let mut at = 0;
            while at < slice.len() {
                let chunk = (slice.len() - at).min(ZEROES.len());
                slice
                    .write_slice(&ZEROES[..chunk], at)
                    .expect("the chunk lies within the slice");
                at += chunk;
            }
            done += at;
        }
        done
    }

    /// Receives what a stream socket has now, whether it is a blocking one or not.
    ///
    /// # Errors
    /// As recvmsg(2), but for EINTR. Nothing is consumed then.
    pub fn receive_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.0.transfer(|iovecs, count| {
            let mut message = message(iovecs, count);
            // SAFETY: the message names nothing but the iovecs, which point to mapped guest memory that outlives the
            // call and that is plain bytes; no reference to it exists, since all access is volatile or by the kernel.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Fills with what a file has at `offset`.
    ///
    /// # Errors
    /// As preadv(2), but for EINTR. Nothing is consumed then.
    pub fn read_from_at(&mut self, fd: BorrowedFd<'_>, offset: libc::off_t) -> io::Result<usize> {
        // SAFETY: as in `receive_from`.
        self.0.transfer(|iovecs, count| unsafe {
            libc::preadv(fd.as_raw_fd(), iovecs, count, offset)
        })
    }
}

/// Reads one packet from a descriptor that keeps packets apart, into rooms that are filled one after the other. They have
/// fewer than [`MAX_SEGMENTS`] segments together. Returns the packet's length, or `None` if it was longer than all rooms;
/// it is lost then.
///
/// # Errors
/// As readv(2), but for EINTR.
pub fn read_packet<'r, 'm: 'r>(
    fd: BorrowedFd<'_>,
    rooms: impl IntoIterator<Item = &'r Writable<'m>>,
) -> io::Result<Option<usize>> {
    // One byte more than there is room for: it is reached only by a packet that does not fit, of which the system would
    // otherwise cut off the end without a word.
    let mut surplus = 0_u8;
    let mut iovecs = Vec::new();
    let mut len = 0;
    for room in rooms {
        len += room.len();
        iovecs.extend(room.0.iovecs());
    }
    iovecs.push(libc::iovec {
        iov_base: (&raw mut surplus).cast(),
        iov_len: 1,
    });
    let read = run_vectored(&iovecs, |iovecs, count| {
        // SAFETY: the iovecs point to mapped guest memory, which is plain bytes without a reference to it, and to
        // `surplus`; all of it outlives the call.
        unsafe { libc::readv(fd.as_raw_fd(), iovecs, count) }
    })?;
    Ok((read <= len).then_some(read))
}

#[cfg(test)]
mod tests;
