//! A pair of queues that the device's thread serves: each packet goes by one system call between the tap and the
//! guest's buffers.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::device::{HEADER_LEN, MAX_PACKET_LEN};
use super::metrics::NetMetrics;
use super::tap::Tap;
use crate::virtio::queue::{
    Chain, MAX_SEGMENTS, MAX_SILENCE, QueueError, Virtqueue, Writable, read_packet,
};

/// Most packets that are received, or sent, before the other direction and the other descriptors get their turn.
const BATCH: usize = 256;

/// Where the number of buffers stands in a packet's header (virtio 1.3, 5.1.6).
const NUM_BUFFERS_OFFSET: usize = 10;

/// How packets lie in receive buffers, which the driver has a say in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// A packet may span buffers (MRG_RXBUF).
    pub(super) mergeable: bool,
    /// Bytes of the largest packet that the tap may give, with its header.
    pub(super) largest: usize,
}

/// Queues and tap, and what is known of the latter's readiness.
#[derive(Debug)]
pub(super) struct Pair {
    rx: Virtqueue,
    tx: Virtqueue,
    tap: Arc<dyn Tap>,
    layout: Layout,
    metrics: Arc<NetMetrics>,
    /// False once the tap had nothing more, until it says that it has.
    readable: bool,
    /// False once the tap took nothing more, until it says that it does.
    writable: bool,
}

/// Receive buffers that were popped and not yet filled.
#[derive(Debug, Default)]
struct Rooms<'m> {
    rooms: VecDeque<(u16, Writable<'m>)>,
    len: usize,
    segments: usize,
}

/// Whether there is room for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gathered {
    /// As much as the driver gives.
    Room,
    /// None, but there may be some behind what was in the way.
    Retry,
    /// Too little: the driver kicks when there is more.
    Wait,
}

impl<'m> Rooms<'m> {
    fn push(&mut self, head: u16, room: Writable<'m>) {
        self.len += room.len();
        self.segments += room.segments();
        self.rooms.push_back((head, room));
    }

    fn pop(&mut self) -> Option<(u16, Writable<'m>)> {
        let (head, room) = self.rooms.pop_front()?;
        self.len -= room.len();
        self.segments -= room.segments();
        Some((head, room))
    }
}

impl Pair {
    pub(super) fn new(
        rx: Virtqueue,
        tx: Virtqueue,
        tap: Arc<dyn Tap>,
        layout: Layout,
        metrics: Arc<NetMetrics>,
    ) -> Self {
        Self {
            rx,
            tx,
            tap,
            layout,
            metrics,
            readable: true,
            writable: true,
        }
    }

    pub(super) fn queues(&self) -> [&Virtqueue; 2] {
        [&self.rx, &self.tx]
    }

    pub(super) fn into_queues(self) -> [Virtqueue; 2] {
        [self.rx, self.tx]
    }

    /// The tap is ready, as epoll says.
    pub(super) fn tap_ready(&mut self, events: EventSet) -> Result<(), QueueError> {
        if events.contains(EventSet::IN) {
            self.readable = true;
            self.receive()?;
        }
        if events.contains(EventSet::OUT) && !self.writable {
            self.writable = true;
            self.transmit()?;
        }
        Ok(())
    }

    /// Gives the guest what the tap has, as long as there is room.
    pub(super) fn receive(&mut self) -> Result<(), QueueError> {
        if !self.readable {
            return Ok(());
        }
        let memory = self.rx.memory();
        let mut rooms = Rooms::default();
        let mut told = Instant::now();
        let mut waits = false;
        self.rx.suppress_kicks()?;
        for _ in 0..BATCH {
            if !self.readable {
                break;
            }
            match self.gather(&memory, &mut rooms)? {
                Gathered::Room => self.receive_one(&mut rooms)?,
                Gathered::Retry => {}
                Gathered::Wait => {
                    waits = true;
                    break;
                }
            }
            if told.elapsed() >= MAX_SILENCE {
                self.rx.notify_if_needed()?;
                told = Instant::now();
            }
        }
        for _ in rooms.rooms {
            self.rx.undo_pop();
        }
        if self.readable && !waits {
            self.rx.kick_self()?;
        }
        self.rx.notify_if_needed()
    }

    /// Pops buffers until the largest packet fits them, so that it can be read straight into them.
    fn gather<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        rooms: &mut Rooms<'m>,
    ) -> Result<Gathered, QueueError> {
        let enough = if self.layout.mergeable {
            self.layout.largest
        } else {
            // One buffer is all that a packet gets.
            1
        };
        while rooms.len < enough {
            let Some(chain) = self.rx.pop(memory)? else {
                if self.rx.await_kicks()? {
                    continue;
                }
                // A driver that has given half of its ring is not about to give more: its ring is small.
                return Ok(if rooms.segments * 2 >= usize::from(self.rx.size()) {
                    Gathered::Room
                } else {
                    Gathered::Wait
                });
            };
            let head = chain.head();
            match room_of(chain) {
                Some(room) if rooms.segments + room.segments() < MAX_SEGMENTS => {
                    rooms.push(head, room);
                }
                _ if rooms.rooms.is_empty() => {
                    self.metrics.bad_chains.inc();
                    self.rx.push_used(head, 0)?;
                    return Ok(Gathered::Retry);
                }
                _ => {
                    // Too much for one call, or malformed: it can wait until it is the first.
                    self.rx.undo_pop();
                    return Ok(Gathered::Room);
                }
            }
        }
        Ok(Gathered::Room)
    }

    /// Reads one packet into the first of `rooms`.
    fn receive_one(&mut self, rooms: &mut Rooms<'_>) -> Result<(), QueueError> {
        match read_packet(self.tap.as_fd(), rooms.rooms.iter().map(|(_, room)| room)) {
            Ok(Some(len)) if len >= HEADER_LEN => return self.hand_over(rooms, len),
            Ok(None) => self.metrics.received_dropped.inc(),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // The tap is gone, or it is none.
            failed => {
                self.readable = false;
                self.metrics.received_errors.inc();
                log::debug!("cannot read from the tap: {failed:?}");
            }
        }
        Ok(())
    }

    /// Returns the buffers that hold a packet of `len` bytes, header included.
    fn hand_over(&mut self, rooms: &mut Rooms<'_>, len: usize) -> Result<(), QueueError> {
        let mut used = Vec::new();
        let mut header = None;
        let mut left = len;
        while left > 0
            && let Some((head, room)) = rooms.pop()
        {
            let part = room.len().min(left);
            left -= part;
            used.push((head, u32::try_from(part).expect("a packet is short")));
            header.get_or_insert(room);
        }
        if let Some(mut header) = header {
            // The tap leaves this field alone.
            header.take(NUM_BUFFERS_OFFSET);
            let count = u16::try_from(used.len()).expect("at most MAX_SEGMENTS");
            header.write(&count.to_le_bytes());
        }
        self.metrics.received_packets.inc();
        self.metrics
            .received_bytes
            .add_len(len.saturating_sub(HEADER_LEN));
        self.rx.push_used_together(&used)
    }

    /// Gives the tap what the guest has, as long as it takes it.
    pub(super) fn transmit(&mut self) -> Result<(), QueueError> {
        if !self.writable {
            return Ok(());
        }
        let memory = self.tx.memory();
        let mut told = Instant::now();
        self.tx.suppress_kicks()?;
        for _ in 0..BATCH {
            let Some(chain) = self.tx.pop(&memory)? else {
                if self.tx.await_kicks()? {
                    continue;
                }
                return self.tx.notify_if_needed();
            };
            let head = chain.head();
            if !self.send(chain) {
                self.tx.undo_pop();
                self.writable = false;
                return self.tx.notify_if_needed();
            }
            self.tx.push_used(head, 0)?;
            if told.elapsed() >= MAX_SILENCE {
                self.tx.notify_if_needed()?;
                told = Instant::now();
            }
        }
        self.tx.kick_self()?;
        self.tx.notify_if_needed()
    }

    /// Sends one packet, or drops it if it is none. False if the tap is full.
    fn send(&self, chain: Chain<'_>) -> bool {
        let Some(mut packet) = chain
            .buffers()
            .ok()
            .map(|(packet, _)| packet)
            .filter(|packet| (HEADER_LEN + 1..=MAX_PACKET_LEN).contains(&packet.len()))
        else {
            self.metrics.bad_chains.inc();
            return true;
        };
        let len = packet.len() - HEADER_LEN;
        match packet.write_to(self.tap.as_fd()) {
            Ok(_) => {
                self.metrics.transmitted_packets.inc();
                self.metrics.transmitted_bytes.add_len(len);
                true
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => false,
            // The tap is down or gone, or the header contradicts the packet: a network may lose packets.
            Err(err) => {
                self.metrics.transmitted_dropped.inc();
                log::debug!("the tap refuses a packet: {err}");
                true
            }
        }
    }
}

/// A chain of the receive queue as room for a packet, or for a part of one.
fn room_of(chain: Chain<'_>) -> Option<Writable<'_>> {
    let (_, room) = chain.buffers().ok()?;
    (room.len() >= HEADER_LEN).then_some(room)
}
