//! Several requests of a queue at a time, by io_uring. [`Engine`] is the seam, [`Ring`] what the kernel has.
//!
//! What a ring is told to do passes no filter of system calls. So it is restricted before it can be used, for good, to what
//! the filter of the thread that uses it allows as well: to read, write and flush what is open. It is made by another thread,
//! which may make one (`crate::worker::seccomp`).
//!
//! The disk is not among the ring's own files (IORING_REGISTER_FILES). Those the kernel closes some 25 ms after the ring is,
//! even if the process was killed, and meanwhile nobody could remove the disk, or lock it.
//!
//! ```text
//! start ─► submission queue ──submit──► the kernel ──► completion queue ──take_done──► Pending, and what came of it
//!             (a slot of `flights` holds the request and its addresses all the way)
//! ```

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};
use slab::Slab;

use super::job::{Order, Pending};

/// Who does several requests at a time.
pub(super) trait Engine: Send + fmt::Debug {
    /// Whether it can be given no more at the moment.
    fn is_full(&self) -> bool;

    /// Takes a request to do its next step, of which there is an order. Nothing needs to happen before [`Self::submit`].
    fn start(&mut self, pending: Pending);

    /// Hands over what was started.
    ///
    /// # Errors
    /// When nothing more can be had from it.
    fn submit(&mut self) -> io::Result<()>;

    /// Gives back a request of which a step is done, or a part of one: with the number of bytes that were moved, which the
    /// request knows of already.
    fn take_done(&mut self) -> Option<(Pending, io::Result<usize>)>;

    /// Hands over what was started, and waits until there is something to take, unless nothing is in flight.
    ///
    /// # Errors
    /// When nothing more can be had from it.
    fn wait(&mut self) -> io::Result<()>;

    /// Requests that were started and not yet taken.
    fn in_flight(&self) -> usize;

    /// The descriptor that is readable while there is something to take.
    fn descriptor(&self) -> RawFd;
}

/// An io_uring for one disk.
pub(super) struct Ring {
    ring: IoUring,
    disk: Arc<OwnedFd>,
    capacity: usize,
    flights: Slab<Flight>,
}

/// What the kernel works on.
#[derive(Debug)]
struct Flight {
    pending: Pending,
    /// Held for the kernel, which reads it.
    _order: Order,
}

impl Ring {
    /// Makes a ring for `disk` with room for `capacity` requests in flight.
    ///
    /// # Errors
    /// When the kernel has none to give, or cannot restrict it (before Linux 5.10).
    pub(super) fn new(disk: Arc<OwnedFd>, capacity: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(capacity.into())?;
        let submitter = ring.submitter();
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            disk,
            capacity: capacity.into(),
            flights: Slab::with_capacity(capacity.into()),
        })
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("flights", &self.flights)
            .finish_non_exhaustive()
    }
}

impl Engine for Ring {
    fn is_full(&self) -> bool {
        self.flights.len() >= self.capacity
    }

    fn start(&mut self, pending: Pending) {
        let order = pending.order().expect("it was asked before");
        let disk = types::Fd(self.disk.as_raw_fd());
        let entry = match &order {
            Order::Read { into, offset } => opcode::Readv::new(disk, into.as_ptr(), into.count())
                .offset(*offset)
                .build(),
            Order::Write { from, offset } => opcode::Writev::new(disk, from.as_ptr(), from.count())
                .offset(*offset)
                .build(),
            Order::Flush => opcode::Fsync::new(disk)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        let slot = self.flights.insert(Flight {
            pending,
            _order: order,
        });
        let entry = entry.user_data(slot as u64);
        // SAFETY: the entry's iovecs, and the guest memory that these name, are the flight's, which stays where it is until
        // the kernel has said that it is done, or for good (see `drop`). They are plain bytes without a reference to them.
        unsafe { self.ring.submission().push(&entry) }.expect("no more flights than entries");
    }

    fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(_) => {}
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                // The kernel has no memory for a request at the moment. It has waited for some already.
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    fn take_done(&mut self) -> Option<(Pending, io::Result<usize>)> {
        let done = self.ring.completion().next()?;
        let slot = usize::try_from(done.user_data()).expect("it was made of a usize");
        let mut pending = self.flights.remove(slot).pending;
        let outcome = usize::try_from(done.result())
            .map_err(|_negative| io::Error::from_raw_os_error(done.result().saturating_neg()));
        if let Ok(moved) = outcome {
            pending.consume(moved);
        }
        Some((pending, outcome))
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        while !self.flights.is_empty() && self.ring.completion().is_empty() {
            match self.ring.submit_and_wait(1) {
                Err(err) if err.kind() != io::ErrorKind::Interrupted => return Err(err),
                _ => {}
            }
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn descriptor(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// When this is over, the kernel does not work on the guest's memory.
impl Drop for Ring {
    fn drop(&mut self) {
        while !self.flights.is_empty() {
            if let Err(err) = self.wait() {
                log::error!("requests to a disk are lost in the kernel: {err}");
                // It may still write to their memory, which stays where it is.
                mem::forget(mem::take(&mut self.flights));
                return;
            }
            while self.take_done().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    fn ring() -> Option<Ring> {
        let file = tempfile::tempfile().unwrap();
        match Ring::new(Arc::new(file.into()), 4) {
            Ok(ring) => Some(ring),
            Err(err) => {
                let _ = writeln!(io::stderr(), "SKIPPED: this machine has no io_uring: {err}");
                None
            }
        }
    }

    /// What the kernel says to an entry.
    fn ask(ring: &mut Ring, entry: &io_uring::squeue::Entry) -> i32 {
        // SAFETY: of the entries of these tests, those that name memory are refused before that is looked at.
        unsafe { ring.ring.submission().push(entry) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn ring_does_nothing_but_read_write_and_flush() {
        let Some(mut ring) = ring() else { return };
        let disk = types::Fd(ring.disk.as_raw_fd());
        let (mut reader, writer) = io::pipe().unwrap();
        let pipe = types::Fd(writer.as_raw_fd());
        let (path, text) = (c"/".as_ptr(), c"x".as_ptr().cast());
        for entry in [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), path).build(),
            opcode::Write::new(pipe, text, 1).build(),
            opcode::Fallocate::new(disk, 1).build(),
            opcode::Close::new(disk).build(),
            opcode::Fsync::new(disk)
                .build()
                .flags(io_uring::squeue::Flags::IO_LINK),
            opcode::Fsync::new(types::Fixed(0)).build(),
        ] {
            assert_eq!(ask(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
        assert_eq!(ask(&mut ring, &opcode::Fsync::new(disk).build()), 0);
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn ring_cannot_be_changed() {
        let Some(ring) = ring() else { return };
        let submitter = ring.ring.submitter();
        let descriptor = ring.disk.as_raw_fd();
        for refused in [
            submitter.register_files(&[descriptor]),
            submitter.register_eventfd(descriptor),
            submitter.register_personality().map(drop),
            submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Nop::CODE)]),
            submitter.register_enable_rings(),
        ] {
            let errno = refused.unwrap_err().raw_os_error().unwrap();
            assert!([libc::EACCES, libc::EBADFD].contains(&errno), "{errno}");
        }
    }

    #[test]
    fn disk_is_closed_with_the_ring() {
        let (mut reader, writer) = io::pipe().unwrap();
        if ring().is_some() {
            let copy = writer.as_fd().try_clone_to_owned().unwrap();
            drop(Ring::new(Arc::new(copy), 4).unwrap());
        }
        drop(writer);
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        // If somebody still had it open for writing, there might be something to read later.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
