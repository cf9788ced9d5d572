//! The active device: takes packets from the guest to the connections, and from those that have something to say to the
//! guest's buffers, in turn.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::connection::{BUF_ALLOC, Connection, Next};
use super::device::{EVENT_QUEUE, OnReady, RX_QUEUE, TX_QUEUE, VsockConfig, VsockError};
use super::handle::{ConnectError, ConnectRequest, Requests};
use super::metrics::VsockMetrics;
use super::packet::{HEADER_LEN, Header, TYPE_STREAM, op};
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, MAX_SEGMENTS, QueueError, Readable, Virtqueue, Writable};
use crate::virtio::worker::{Poll, Serve};

/// VMADDR_CID_HOST.
const HOST_CID: u64 = 2;

/// Most connections at a time. The host opens them, three for a process at most.
const MAX_CONNECTIONS: usize = 4096;

/// Most answers that wait for buffers of the guest and belong to no connection. While there are more, nothing is taken
/// from the transmit queue: a guest that gives no buffers gets no service, instead of memory.
const MAX_REPLIES: usize = 256;

/// Most bytes in one packet; Linux takes no more (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const MAX_PACKET: usize = 64 * 1024;

/// Most bytes, and most packets, that one read of a socket is spread over.
const MAX_BATCH_BYTES: usize = BUF_ALLOC as usize;
const MAX_BATCH_PACKETS: usize = 128;

/// Turns until other descriptors are looked at again.
const TURNS: usize = 64;

/// Ports of the host's ends: far from those that guests listen on, for the sake of those who read traces.
const FIRST_LOCAL_PORT: u32 = 1 << 30;

/// Tokens below are local ports.
const REQUESTS: u64 = 1 << 32;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const EVENT_TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// The connections and all else that outlives a pause.
#[derive(Debug)]
pub(super) struct Backend {
    config: VsockConfig,
    requests: Requests,
    /// `None` once the guest has connected to the ready port.
    on_ready: Option<OnReady>,
    /// By local port.
    connections: HashMap<u32, Connection>,
    /// Local ports of connections that may have something for the guest.
    line: VecDeque<u32>,
    /// Answers that belong to no connection.
    replies: VecDeque<Header>,
    last_port: u32,
    /// The guest has yet to learn that its connections are gone.
    transport_was_reset: bool,
    metrics: Arc<VsockMetrics>,
}

impl Backend {
    pub(super) fn new(
        config: VsockConfig,
        requests: Requests,
        on_ready: OnReady,
        metrics: Arc<VsockMetrics>,
    ) -> Self {
        Self {
            config,
            requests,
            on_ready: Some(on_ready),
            connections: HashMap::new(),
            line: VecDeque::new(),
            replies: VecDeque::new(),
            last_port: FIRST_LOCAL_PORT,
            transport_was_reset: false,
            metrics,
        }
    }

    /// Drops every connection, as a new driver knows none.
    pub(super) fn reset(&mut self) {
        self.connections.clear();
        self.line.clear();
        self.replies.clear();
        self.transport_was_reset = false;
    }

    /// Goes on for a guest that was saved elsewhere.
    pub(super) fn restore(&mut self, ready: bool) {
        self.reset();
        self.transport_was_reset = true;
        if ready {
            self.on_ready = None;
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.on_ready.is_none()
    }

    /// Opens a connection: the guest will get a REQUEST.
    fn open(&mut self, request: ConnectRequest, poll: &Poll) {
        if self.connections.len() >= MAX_CONNECTIONS {
            return request.waiter.failed(ConnectError::TooMany);
        }
        let port = self.unused_port();
        let connection = Connection::new(port, request);
        // Edge-triggered: a hung-up socket whose bytes the guest does not take would wake the thread for ever.
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        match poll.add(connection.stream(), u64::from(port), events) {
            Ok(()) => {
                self.connections.insert(port, connection);
                self.stand_in_line(port);
            }
            Err(err) => connection.fail(ConnectError::Socket(err)),
        }
    }

    fn unused_port(&mut self) -> u32 {
        loop {
            // The last one, VMADDR_PORT_ANY, is no port.
            self.last_port = match self.last_port.checked_add(1) {
                None | Some(u32::MAX) => FIRST_LOCAL_PORT,
                Some(port) => port,
            };
            if !self.connections.contains_key(&self.last_port) {
                return self.last_port;
            }
        }
    }

    /// Removes a connection that is over; puts one that has something for the guest in line.
    fn stand_in_line(&mut self, port: u32) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        if connection.is_over() {
            self.connections.remove(&port);
        } else if !connection.in_line && connection.next() != Next::Nothing {
            connection.in_line = true;
            self.line.push_back(port);
        }
    }

    /// Takes one packet from the guest.
    fn receive(&mut self, chain: Chain<'_>) {
        let Some((header, mut rest)) = parse(chain) else {
            self.metrics.bad_chains.inc();
            return;
        };
        self.metrics.received_packets.inc();
        if header.src_cid != self.config.guest_cid() {
            // An answer to a CID that is not the guest's could not reach it.
            self.metrics.bad_chains.inc();
            return;
        }
        let Ok(len) = usize::try_from(header.len) else {
            return self.refuse(&header);
        };
        let payload = rest.take(len);
        let addressed = self
            .connections
            .get(&header.dst_port)
            .is_some_and(|connection| connection.is_with(header.src_port));
        if header.dst_cid != HOST_CID || !addressed {
            return self.receive_stray(&header);
        }
        if payload.len() < len {
            self.metrics.bad_chains.inc();
            return self.break_off(&header, ConnectError::Protocol);
        }
        self.metrics.received_bytes.add_len(payload.len());
        self.receive_addressed(&header, payload);
    }

    /// Takes a packet of a connection.
    fn receive_addressed(&mut self, header: &Header, payload: Readable<'_>) {
        let port = header.dst_port;
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        if connection.is_connecting() {
            match header.op {
                op::RST => {
                    self.metrics.refused.inc();
                    return self.break_off(header, ConnectError::Refused);
                }
                op::RESPONSE => self.metrics.connections.inc(),
                _ => {}
            }
        }
        if let Err(violation) = connection.receive(header, payload) {
            if violation == super::connection::Violation::Credit {
                self.metrics.credit_abuses.inc();
            }
            return self.break_off(header, ConnectError::Protocol);
        }
        if header.op == op::SHUTDOWN && connection.guest_is_done() {
            connection.drain();
            self.refuse(header);
        }
        self.stand_in_line(port);
    }

    /// Takes a packet that belongs to no connection.
    fn receive_stray(&mut self, header: &Header) {
        let wants_ready = header.op == op::REQUEST
            && header.dst_cid == HOST_CID
            && header.dst_port == self.config.ready_port()
            && header.type_ == TYPE_STREAM;
        if !wants_ready {
            return self.refuse(header);
        }
        let Some(on_ready) = self.on_ready.take() else {
            return self.refuse(header);
        };
        // Nothing travels on this connection, so there is nothing to remember of it: whatever follows gets the RST that
        // ends it. It is given credit all the same: without, Linux never reports the socket writable, and that is how
        // a non-blocking connect learns that it is done.
        self.replies.push_back(Header {
            op: op::RESPONSE,
            buf_alloc: BUF_ALLOC,
            ..header.reset()
        });
        (on_ready.0)();
    }

    /// Ends the connection that a packet belongs to.
    fn break_off(&mut self, header: &Header, err: ConnectError) {
        if let Some(connection) = self.connections.remove(&header.dst_port) {
            connection.fail(err);
        }
        self.refuse(header);
    }

    /// Answers with RST, but not an RST (or there would be no end to it).
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.metrics.resets.inc();
            self.replies.push_back(header.reset());
        }
    }
}

/// A chain of the transmit queue, as a header and what follows it.
fn parse(chain: Chain<'_>) -> Option<(Header, Readable<'_>)> {
    let (mut readable, _) = chain.buffers().ok()?;
    let header = Header::read(&mut readable)?;
    Some((header, readable))
}

/// A chain of the receive queue, as room for a packet.
struct Room<'m> {
    head: u16,
    header: Writable<'m>,
    data: Writable<'m>,
}

impl<'m> Room<'m> {
    fn of(chain: Chain<'m>) -> Option<Self> {
        let head = chain.head();
        let (_, mut room) = chain.buffers().ok()?;
        let header = room.take(HEADER_LEN);
        let data = room.take(MAX_PACKET);
        (header.len() == HEADER_LEN && !data.is_empty()).then_some(Self { head, header, data })
    }
}

/// What exists only while active.
#[derive(Debug)]
pub(super) struct VsockWorker {
    rx: Virtqueue,
    tx: Virtqueue,
    events: Virtqueue,
    backend: Backend,
}

impl VsockWorker {
    pub(super) fn new(rx: Virtqueue, tx: Virtqueue, events: Virtqueue, backend: Backend) -> Self {
        Self {
            rx,
            tx,
            events,
            backend,
        }
    }

    pub(super) fn into_parts(self) -> (Vec<ActiveQueue>, Backend) {
        let queues = [self.rx, self.tx, self.events];
        (queues.map(Virtqueue::into_active).into(), self.backend)
    }

    /// Takes packets from the guest as long as there is room for answers to them, and gives it what waits for it.
    fn exchange(&mut self) -> Result<(), QueueError> {
        loop {
            let more = self.take_packets()?;
            self.give_packets()?;
            if !more || self.backend.replies.len() >= MAX_REPLIES {
                return Ok(());
            }
        }
    }

    /// Drains the transmit queue. True if it stopped early, for want of room for answers.
    fn take_packets(&mut self) -> Result<bool, QueueError> {
        let memory = self.tx.memory();
        self.tx.suppress_kicks()?;
        for _ in 0..self.tx.size() {
            if self.backend.replies.len() >= MAX_REPLIES {
                self.tx.notify_if_needed()?;
                return Ok(true);
            }
            let Some(chain) = self.tx.pop(&memory)? else {
                if self.tx.await_kicks()? {
                    continue;
                }
                self.tx.notify_if_needed()?;
                return Ok(false);
            };
            let head = chain.head();
            self.backend.receive(chain);
            self.tx.push_used(head, 0)?;
        }
        // A driver that never stops must not keep the thread from its other descriptors.
        self.tx.kick_self()?;
        self.tx.notify_if_needed()?;
        Ok(false)
    }

    /// Fills the receive queue's buffers, as long as there are any, with what is to be said.
    fn give_packets(&mut self) -> Result<(), QueueError> {
        let memory = self.rx.memory();
        for _ in 0..TURNS {
            if !self.give_one(&memory)? {
                return self.rx.notify_if_needed();
            }
        }
        self.rx.kick_self()?;
        self.rx.notify_if_needed()
    }

    /// One answer, or one turn of the first connection in line. False if nothing is to be said, or nowhere to put it.
    fn give_one(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if let Some(reply) = self.backend.replies.front().copied() {
            let Some(room) = self.next_room(memory)? else {
                return Ok(false);
            };
            self.backend.replies.pop_front();
            self.give_header(room, &reply)?;
            return Ok(true);
        }
        let Some(port) = self.backend.line.front().copied() else {
            return Ok(false);
        };
        let next = self.backend.connections.get(&port).map(Connection::next);
        match next {
            None | Some(Next::Nothing) => {}
            Some(Next::Control { op, flags }) => {
                let Some(room) = self.next_room(memory)? else {
                    return Ok(false);
                };
                self.give_control(port, room, op, flags)?;
            }
            Some(Next::Data { credit }) => {
                let Some(room) = self.next_room(memory)? else {
                    return Ok(false);
                };
                self.give_data(port, memory, room, credit)?;
            }
        }
        // To the end of the line, if it has more to say.
        self.backend.line.pop_front();
        if let Some(connection) = self.backend.connections.get_mut(&port) {
            connection.in_line = false;
        }
        self.backend.stand_in_line(port);
        Ok(true)
    }

    fn give_control(
        &mut self,
        port: u32,
        room: Room<'_>,
        op: u16,
        flags: u32,
    ) -> Result<(), QueueError> {
        let guest_cid = self.backend.config.guest_cid();
        let Some(connection) = self.backend.connections.get_mut(&port) else {
            self.rx.undo_pop();
            return Ok(());
        };
        let header = connection.header(HOST_CID, guest_cid, op, flags, 0);
        connection.told(op, flags);
        if op == op::CREDIT_UPDATE {
            self.backend.metrics.credit_updates.inc();
        }
        self.give_header(room, &header)
    }

    fn give_header(&mut self, room: Room<'_>, header: &Header) -> Result<(), QueueError> {
        header.write(room.header);
        self.backend.metrics.sent_packets.inc();
        self.rx.push_used(room.head, written(0))
    }

    /// Reads a connection's socket into as many of the guest's buffers as fit its credit, with one system call.
    fn give_data(
        &mut self,
        port: u32,
        memory: &GuestMemoryMmap,
        first: Room<'_>,
        credit: u32,
    ) -> Result<(), QueueError> {
        let wanted =
            usize::try_from(credit).map_or(MAX_BATCH_BYTES, |credit| credit.min(MAX_BATCH_BYTES));
        let (packets, mut data) = self.gather(memory, first, wanted)?;
        let guest_cid = self.backend.config.guest_cid();
        let mut left = 0;
        if let Some(connection) = self.backend.connections.get_mut(&port) {
            left = connection.fill(&mut data);
        }
        let mut unused = 0;
        for packet in packets {
            if left == 0 {
                unused += 1;
                continue;
            }
            let len = packet.len.min(left);
            left -= len;
            if let Some(connection) = self.backend.connections.get(&port) {
                let header = connection.header(HOST_CID, guest_cid, op::RW, 0, len);
                header.write(packet.header);
            }
            self.backend.metrics.sent_packets.inc();
            self.backend.metrics.sent_bytes.add(u64::from(len));
            self.rx.push_used(packet.head, written(len))?;
        }
        for _ in 0..unused {
            self.rx.undo_pop();
        }
        Ok(())
    }

    /// Collects room for `wanted` bytes of data, or for as many as there is. The room that was popped last can be given
    /// back: nothing is returned to the driver in between.
    fn gather<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        first: Room<'m>,
        wanted: usize,
    ) -> Result<(Vec<Packet<'m>>, Writable<'m>), QueueError> {
        let mut packets = Vec::new();
        let mut data = Writable::default();
        let mut next = Some(first);
        while let Some(mut room) = next.take() {
            let part = room.data.take(wanted - data.len());
            packets.push(Packet {
                head: room.head,
                header: room.header,
                len: u32::try_from(part.len()).expect("at most MAX_PACKET"),
            });
            data.append(part);
            if data.len() == wanted || packets.len() == MAX_BATCH_PACKETS {
                break;
            }
            let Some(chain) = self.rx.pop(memory)? else {
                break;
            };
            next = Room::of(chain)
                .filter(|room| data.segments() + room.data.segments() <= MAX_SEGMENTS);
            if next.is_none() {
                // Too much for one call, or malformed: it can wait until it is the first.
                self.rx.undo_pop();
            }
        }
        Ok((packets, data))
    }

    /// Room for a packet, or `None` after asking for a kick when there is some.
    fn next_room<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Room<'m>>, QueueError> {
        loop {
            let Some(chain) = self.rx.pop(memory)? else {
                if self.rx.await_kicks()? {
                    continue;
                }
                return Ok(None);
            };
            let head = chain.head();
            if let Some(room) = Room::of(chain) {
                return Ok(Some(room));
            }
            self.backend.metrics.bad_chains.inc();
            self.rx.push_used(head, 0)?;
        }
    }

    /// Tells a restored guest that its connections are gone, as soon as it has a buffer for that.
    fn give_event(&mut self) -> Result<(), QueueError> {
        let Self {
            events, backend, ..
        } = self;
        if !backend.transport_was_reset {
            return Ok(());
        }
        let memory = events.memory();
        loop {
            let Some(chain) = events.pop(&memory)? else {
                if events.await_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head();
            let len = chain
                .buffers()
                .map_or(0, |(_, mut room)| room.write(&EVENT_TRANSPORT_RESET));
            events.push_used(head, u32::try_from(len).expect("at most four"))?;
            if len == EVENT_TRANSPORT_RESET.len() {
                backend.transport_was_reset = false;
                return events.notify_if_needed();
            }
            backend.metrics.bad_chains.inc();
        }
    }
}

/// A packet whose bytes are yet to be read.
struct Packet<'m> {
    head: u16,
    header: Writable<'m>,
    len: u32,
}

/// The used length of a packet with `len` bytes of data.
fn written(len: u32) -> u32 {
    u32::try_from(HEADER_LEN).expect("a header is short") + len
}

impl Serve for VsockWorker {
    type Error = VsockError;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.rx, &self.tx, &self.events]
    }

    fn start(&mut self, poll: &Poll) -> Result<(), VsockError> {
        poll.add(self.backend.requests.wake(), REQUESTS, EventSet::IN)
            .map_err(VsockError::Poll)?;
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        for (port, connection) in &self.backend.connections {
            poll.add(connection.stream(), u64::from(*port), events)
                .map_err(VsockError::Poll)?;
        }
        Ok(())
    }

    fn kicked(&mut self, index: u16, _poll: &Poll) -> Result<(), VsockError> {
        match index {
            EVENT_QUEUE => self.give_event()?,
            RX_QUEUE | TX_QUEUE => self.exchange()?,
            _ => {}
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), VsockError> {
        if token == REQUESTS {
            // Somebody else's read is nothing to worry about: the requests are what counts.
            let _ = self.backend.requests.wake().read();
            while let Some(request) = self.backend.requests.take() {
                self.backend.open(request, poll);
            }
        } else if let Ok(port) = u32::try_from(token)
            && let Some(connection) = self.backend.connections.get_mut(&port)
        {
            let closed = EventSet::HANG_UP | EventSet::ERROR;
            if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | closed) {
                let ends = events.intersects(EventSet::READ_HANG_UP | closed);
                connection.socket_readable(ends, events.intersects(closed));
            }
            if events.intersects(EventSet::OUT | closed) {
                connection.socket_writable();
            }
            self.backend.stand_in_line(port);
        }
        self.exchange()?;
        Ok(())
    }
}
