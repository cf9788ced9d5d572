//! One connection: its state machine, the credit of both sides, and the bytes that the host's socket would not take yet.
//! It moves bytes and decides what the guest must be told; the worker owns the queues and does the telling.
//!
//! ```text
//! Connecting ──RESPONSE──► Established ──RST, or SHUTDOWN of both directions, from the guest──► Draining ──► gone
//!     │                        └──the host closed, and SHUTDOWN of both directions was sent──► gone
//!     └──RST or anything else──► gone
//! ```
//! Draining: the guest is done and knows nothing of the connection any more; what it had sent is still on its way to the
//! host's reader.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendFlags, send};

use super::handle::{ConnectRequest, Waiter};
use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::virtio::queue::{Readable, Writable};

/// What the guest may send before the host has read it: the most that is buffered for one connection.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// The guest broke the protocol: the connection must end with RST.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// It sent more than it had credit for.
    Credit,
    /// It sent what the state does not allow.
    State,
}

/// What the guest is to be told next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Only a header.
    Control {
        /// VIRTIO_VSOCK_OP_*.
        op: u16,
        /// Of SHUTDOWN.
        flags: u32,
    },
    /// Bytes from the host's socket, as many as the guest has credit for.
    Data {
        /// At most this many.
        credit: u32,
    },
    /// Nothing at present.
    Nothing,
}

#[derive(Debug)]
enum State {
    Connecting { waiter: Waiter, requested: bool },
    Established,
    Draining,
}

/// A connection that the host opened.
#[derive(Debug)]
pub(super) struct Connection {
    local_port: u32,
    peer_port: u32,
    stream: UnixStream,
    state: State,
    /// Whether it waits in the worker's line of those that have something for the guest.
    pub(super) in_line: bool,

    // Host to guest.
    /// Reading the socket may yield bytes or its end.
    readable: bool,
    /// The socket's end is to be read, if not now then behind its last byte.
    ends: bool,
    /// The socket has come to its end.
    ended: bool,
    /// The host's end is closed, not only shut down for writing.
    hung_up: bool,
    /// Bytes sent to the guest, modulo 2^32, as are all counts of bytes below.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,

    // Guest to host.
    /// The socket took all that it was given last.
    writable: bool,
    /// Nobody will read the socket any more.
    unread: bool,
    buffer: VecDeque<u8>,
    received: u32,
    forwarded: u32,
    /// The count of forwarded bytes that the guest knows.
    told_forwarded: u32,
    /// The guest asked for its credit.
    credit_requested: bool,

    /// SHUTDOWN_* that the guest has sent, and that it was sent.
    guest_shutdown: u32,
    told_shutdown: u32,
}

impl Connection {
    pub(super) fn new(local_port: u32, request: ConnectRequest) -> Self {
        Self {
            local_port,
            peer_port: request.port,
            stream: request.ours,
            state: State::Connecting {
                waiter: request.waiter,
                requested: false,
            },
            in_line: false,
            readable: false,
            ends: false,
            ended: false,
            hung_up: false,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            writable: true,
            unread: false,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            credit_requested: false,
            guest_shutdown: 0,
            told_shutdown: 0,
        }
    }

    /// The device's end of the socket.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether a packet from `port` of the guest belongs to this connection.
    pub(super) fn is_with(&self, port: u32) -> bool {
        self.peer_port == port && !matches!(self.state, State::Draining)
    }

    /// Whether nothing is left to be done.
    pub(super) fn is_over(&self) -> bool {
        match self.state {
            State::Connecting { .. } => false,
            State::Established => self.told_shutdown == SHUTDOWN_BOTH,
            State::Draining => self.buffer.is_empty(),
        }
    }

    /// The header of a packet to the guest.
    pub(super) fn header(
        &self,
        host_cid: u64,
        guest_cid: u64,
        op: u16,
        flags: u32,
        len: u32,
    ) -> Header {
        Header {
            src_cid: host_cid,
            dst_cid: guest_cid,
            src_port: self.local_port,
            dst_port: self.peer_port,
            len,
            type_: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// What the guest is to be told next. For data the worker calls [`Self::fill`], for the rest [`Self::told`].
    pub(super) fn next(&self) -> Next {
        let control = |op, flags| Next::Control { op, flags };
        match self.state {
            State::Connecting {
                requested: false, ..
            } => return control(op::REQUEST, 0),
            State::Connecting { .. } | State::Draining => return Next::Nothing,
            State::Established => {}
        }
        let credit = self.peer_credit();
        if self.readable && !self.ended && self.guest_shutdown & SHUTDOWN_RECEIVE == 0 && credit > 0
        {
            // It carries the count of forwarded bytes, and so pays for a credit update as well.
            return Next::Data { credit };
        }
        let shutdown = self.shutdown_to_tell();
        if shutdown & !self.told_shutdown != 0 {
            return control(op::SHUTDOWN, shutdown);
        }
        if self.credit_requested || self.owes_credit() {
            return control(op::CREDIT_UPDATE, 0);
        }
        Next::Nothing
    }

    /// Takes note that a packet without data went to the guest.
    pub(super) fn told(&mut self, op: u16, flags: u32) {
        if let State::Connecting { requested, .. } = &mut self.state {
            *requested = true;
        }
        if op == op::SHUTDOWN {
            self.told_shutdown |= flags;
        }
        self.credit_told();
    }

    /// Moves bytes from the socket straight into the guest's buffers. Zero when the socket has none, or has ended.
    pub(super) fn fill(&mut self, room: &mut Writable<'_>) -> u32 {
        let offered = room.len();
        match room.receive_from(self.stream.as_fd()) {
            Ok(0) => {
                self.ended = true;
                0
            }
            Ok(count) => {
                // A short read says that the socket is empty now; the next bytes make an event again.
                self.readable = count == offered || self.ends;
                let count = u32::try_from(count).expect("not more than the credit");
                self.sent = self.sent.wrapping_add(count);
                self.credit_told();
                count
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            Err(_reset) => {
                // The host closed its end with bytes of the guest unread.
                self.ended = true;
                self.hung_up = true;
                0
            }
        }
    }

    /// The socket became readable; `ends` if the host will write no more, `hung_up` if it has closed its end.
    pub(super) fn socket_readable(&mut self, ends: bool, hung_up: bool) {
        self.readable = true;
        self.ends |= ends;
        self.hung_up |= hung_up;
    }

    /// The socket takes bytes again.
    pub(super) fn socket_writable(&mut self) {
        self.writable = true;
        self.flush();
    }

    /// Takes the credit that every packet of the guest carries, and what the packet says.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        payload: Readable<'_>,
    ) -> Result<(), Violation> {
        if header.type_ != TYPE_STREAM {
            return Err(Violation::State);
        }
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if matches!(self.state, State::Connecting { .. }) {
            return self.receive_answer(header.op);
        }
        match header.op {
            op::RW => self.receive_data(payload),
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                self.credit_requested = true;
                Ok(())
            }
            op::SHUTDOWN => {
                self.receive_shutdown(header.flags);
                Ok(())
            }
            op::RST => {
                self.drain();
                Ok(())
            }
            _ => Err(Violation::State),
        }
    }

    /// Whether the guest has ended both directions, which the device must confirm with RST (virtio 1.3, 5.10.6.6).
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_BOTH == SHUTDOWN_BOTH
    }

    /// Leaves the guest out from here on. What it sent is still delivered.
    pub(super) fn drain(&mut self) {
        self.state = State::Draining;
        // Whoever still writes for the guest learns it at once.
        let _ = self.stream.shutdown(Shutdown::Read);
        self.guest_shutdown = SHUTDOWN_BOTH;
        self.flush();
    }

    /// Tells who waits for the connection, if anyone still does, that it failed.
    pub(super) fn fail(self, err: super::ConnectError) {
        if let State::Connecting { waiter, .. } = self.state {
            waiter.failed(err);
        }
    }

    /// Whether the guest has yet to answer.
    pub(super) fn is_connecting(&self) -> bool {
        matches!(self.state, State::Connecting { .. })
    }

    fn receive_answer(&mut self, op: u16) -> Result<(), Violation> {
        if op != op::RESPONSE {
            return Err(Violation::State);
        }
        let before = std::mem::replace(&mut self.state, State::Established);
        if let State::Connecting { waiter, .. } = before {
            waiter.accepted(self.local_port);
        }
        Ok(())
    }

    fn receive_data(&mut self, mut payload: Readable<'_>) -> Result<(), Violation> {
        let len = u32::try_from(payload.len()).map_err(|_| Violation::Credit)?;
        let outstanding = self.received.wrapping_sub(self.forwarded);
        if outstanding
            .checked_add(len)
            .is_none_or(|total| total > BUF_ALLOC)
        {
            return Err(Violation::Credit);
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Err(Violation::State);
        }
        self.received = self.received.wrapping_add(len);
        if self.unread {
            self.forwarded = self.received;
            return Ok(());
        }
        // A socket that nobody reads any more takes nothing, whatever it was given.
        while self.writable && !self.unread && self.buffer.is_empty() && !payload.is_empty() {
            let sent = payload.send_to(self.stream.as_fd());
            self.account(sent);
        }
        let mut chunk = [0; 4096];
        while !self.unread && !payload.is_empty() {
            let count = payload.read(&mut chunk);
            self.buffer.extend(&chunk[..count]);
        }
        Ok(())
    }

    fn receive_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // The host's writer gets EPIPE, as it would from a pipe without readers.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// Sends what is buffered, and then the end of the stream if the guest has reached it.
    fn flush(&mut self) {
        while self.writable && !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            let sent = send(
                &self.stream,
                front,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            if let Ok(count) = sent {
                self.buffer.drain(..count);
            }
            self.account(sent.map_err(io::Error::from));
        }
        if self.buffer.is_empty() {
            // A slow reader of long ago is no reason to keep its buffer.
            self.buffer = VecDeque::new();
            if self.guest_shutdown & SHUTDOWN_SEND != 0 {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
    }

    /// Takes note of what a send to the host's socket did.
    fn account(&mut self, sent: io::Result<usize>) {
        match sent {
            Ok(count) => {
                let count = u32::try_from(count).expect("not more than BUF_ALLOC");
                self.forwarded = self.forwarded.wrapping_add(count);
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.writable = false,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(_closed) => {
                self.unread = true;
                self.forwarded = self.received;
                self.buffer.clear();
            }
        }
    }

    /// How many bytes the guest has room for (virtio 1.3, 5.10.6.3). Makes sense of any numbers it may have sent.
    fn peer_credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Whether the guest believes that less than half of its credit is left, and is wrong.
    fn owes_credit(&self) -> bool {
        let believed_used = self.received.wrapping_sub(self.told_forwarded);
        believed_used > BUF_ALLOC / 2 && self.told_forwarded != self.forwarded
    }

    fn credit_told(&mut self) {
        self.told_forwarded = self.forwarded;
        self.credit_requested = false;
    }

    fn shutdown_to_tell(&self) -> u32 {
        let mut flags = 0;
        // Nobody looks for the end behind bytes that the guest does not want.
        let ended = self.ended || (self.hung_up && self.guest_shutdown & SHUTDOWN_RECEIVE != 0);
        if ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.unread || (ended && self.hung_up) {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags
    }
}
