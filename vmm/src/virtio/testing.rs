//! A fake driver for the tests of the devices: it writes rings into guest memory, kicks, and waits for interrupts, and it
//! can make every mistake that a hostile driver can.
//!
//! It never polls: a device that forgets an interrupt fails its test by [`PATIENCE`].

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};

/// How long a device may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(20);

const MEMORY_LEN: usize = 256 << 20;
const QUEUES_BASE: u64 = 0x1_0000;
const QUEUE_STRIDE: u64 = 0x1_0000;
const AVAIL_OFFSET: u64 = 0x4000;
const USED_OFFSET: u64 = 0x8000;
const HEAP_BASE: u64 = 0x10_0000;

const NEXT: u16 = flag(VRING_DESC_F_NEXT);
const WRITE: u16 = flag(VRING_DESC_F_WRITE);
const INDIRECT: u16 = flag(VRING_DESC_F_INDIRECT);

#[expect(
    clippy::cast_possible_truncation,
    reason = "the bindings hold 16-bit flags as u32"
)]
const fn flag(bits: u32) -> u16 {
    bits as u16
}

/// Interrupts that arrive at a test.
#[derive(Debug, Default, Clone)]
pub struct FakeInterrupt {
    seen: Arc<Mutex<Seen>>,
    changed: Arc<Condvar>,
}

#[derive(Debug, Default, Clone)]
struct Seen {
    queues: HashMap<u16, u64>,
    config_changes: u64,
    needs_reset: bool,
}

impl FakeInterrupt {
    /// Interrupts of a queue so far.
    pub fn count(&self, index: u16) -> u64 {
        self.seen
            .lock()
            .unwrap()
            .queues
            .get(&index)
            .copied()
            .unwrap_or(0)
    }

    /// Changes of the configuration space so far.
    pub fn config_changes(&self) -> u64 {
        self.seen.lock().unwrap().config_changes
    }

    fn wait(&self, what: &str, until: impl Fn(&Seen) -> bool) {
        let seen = self.seen.lock().unwrap();
        let (_seen, timeout) = self
            .changed
            .wait_timeout_while(seen, PATIENCE, |seen| !until(seen))
            .unwrap();
        assert!(!timeout.timed_out(), "no {what} from the device");
    }
}

impl Interrupt for FakeInterrupt {
    fn call(&self, index: u16) -> std::io::Result<EventFd> {
        let event = EventFd::new(0)?;
        let (calls, interrupt) = (event.try_clone()?, self.clone());
        // To the end of the tests: nothing tells that nobody writes any more.
        std::thread::spawn(move || {
            while calls.read().is_ok() {
                interrupt.queue(index);
            }
        });
        Ok(event)
    }

    fn queue(&self, index: u16) {
        *self.seen.lock().unwrap().queues.entry(index).or_default() += 1;
        self.changed.notify_all();
    }

    fn config_change(&self) {
        self.seen.lock().unwrap().config_changes += 1;
        self.changed.notify_all();
    }

    fn needs_reset(&self) {
        self.seen.lock().unwrap().needs_reset = true;
        self.changed.notify_all();
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone)]
pub struct Buffer {
    content: Vec<u8>,
    writable: bool,
}

impl Buffer {
    /// Device-readable, with this content.
    pub fn read(content: &[u8]) -> Self {
        Self {
            content: content.to_vec(),
            writable: false,
        }
    }

    /// Device-writable, of this length, filled with 0xee.
    pub fn write(len: usize) -> Self {
        Self {
            content: vec![0xee; len],
            writable: true,
        }
    }
}

/// A descriptor as it goes into the table. `next` counts from the chain's first descriptor where it is within the
/// chain, and is taken as it is where not.
#[derive(Debug, Clone, Copy)]
pub struct RawDescriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// The length in the used ring.
    pub written: u32,
    /// The device-writable buffers, one after the other, cut at `written`.
    pub bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct InFlight {
    slots: Vec<u16>,
    /// Buffers of the heap, with what is writable of them.
    buffers: Vec<(GuestAddress, usize, bool)>,
}

#[derive(Debug)]
struct DriverQueue {
    size: u16,
    base: u64,
    kick: EventFd,
    free: Vec<u16>,
    avail: u16,
    kicked: u16,
    used: u16,
    in_flight: HashMap<u16, InFlight>,
    /// In the order of the used ring.
    done: VecDeque<(u16, Used)>,
}

impl DriverQueue {
    fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let ring = self.base + AVAIL_OFFSET;
        let entry = ring + 4 + u64::from(self.avail % self.size) * 2;
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        memory
            .store(self.avail, GuestAddress(ring + 2), Ordering::Release)
            .unwrap();
    }
}

/// The driver.
#[derive(Debug)]
pub struct Driver {
    memory: GuestMemoryMmap,
    features: u64,
    pub(crate) interrupt: Arc<FakeInterrupt>,
    queues: HashMap<u16, DriverQueue>,
    heap: u64,
    free_buffers: HashMap<usize, Vec<GuestAddress>>,
}

impl Driver {
    /// Negotiates everything that the device offers and VIRTIO_F_EVENT_IDX, and enables all queues.
    pub fn activate(device: &mut dyn VirtioDevice) -> Self {
        let features = device.features() | 1 << VIRTIO_RING_F_EVENT_IDX;
        Self::activate_with(device, features)
    }

    /// Negotiates exactly `features`.
    pub fn activate_with(device: &mut dyn VirtioDevice, features: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
        Self::activate_in(memory, device, features)
    }

    /// The same, in a memory of at least as much as other drivers have.
    pub(crate) fn activate_in(
        memory: GuestMemoryMmap,
        device: &mut dyn VirtioDevice,
        features: u64,
    ) -> Self {
        let mut driver = Self {
            memory,
            features,
            interrupt: Arc::default(),
            queues: HashMap::new(),
            heap: HEAP_BASE,
            free_buffers: HashMap::new(),
        };
        let mut queues = Vec::new();
        for (index, size) in device.queue_max_sizes().iter().enumerate() {
            let index = u16::try_from(index).unwrap();
            let base = QUEUES_BASE + u64::from(index) * QUEUE_STRIDE;
            let mut queue = Queue::new(*size).unwrap();
            queue.set_size(*size);
            queue.set_desc_table_address(Some(u32::try_from(base).unwrap()), Some(0));
            queue
                .set_avail_ring_address(Some(u32::try_from(base + AVAIL_OFFSET).unwrap()), Some(0));
            queue.set_used_ring_address(Some(u32::try_from(base + USED_OFFSET).unwrap()), Some(0));
            queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            queue.set_ready(true);
            let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            driver.queues.insert(
                index,
                DriverQueue {
                    size: *size,
                    base,
                    kick: kick.try_clone().unwrap(),
                    free: (0..*size).rev().collect(),
                    avail: 0,
                    kicked: 0,
                    used: 0,
                    in_flight: HashMap::new(),
                    done: VecDeque::new(),
                },
            );
            queues.push(ActiveQueue { index, queue, kick });
        }
        driver.reactivate(device, queues);
        driver
    }

    /// Activates a device on queues that were paused.
    pub fn reactivate(&self, device: &mut dyn VirtioDevice, queues: Vec<ActiveQueue>) {
        self.try_reactivate(device, queues).unwrap();
    }

    /// As [`Self::reactivate`], for a device that may refuse.
    pub fn try_reactivate(
        &self,
        device: &mut dyn VirtioDevice,
        queues: Vec<ActiveQueue>,
    ) -> Result<(), ActivateError> {
        device.activate(Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues,
            interrupt: self.interrupt.clone(),
        })
    }

    /// Sends one chain and waits for its return.
    pub fn request(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> Used {
        let buffers: Vec<_> = readable
            .iter()
            .map(|content| Buffer::read(content))
            .chain(writable.iter().map(|len| Buffer::write(*len)))
            .collect();
        self.submit(queue, &buffers)
    }

    /// Sends one chain and waits for its return.
    pub fn submit(&mut self, queue: u16, buffers: &[Buffer]) -> Used {
        let head = self.make_available(queue, buffers);
        self.kick_if_wanted(queue);
        self.wait_used(queue, head)
    }

    /// Sends one chain of descriptors as they are and waits for its return.
    pub fn submit_raw(&mut self, queue: u16, chain: &[RawDescriptor]) -> Used {
        let head = self.make_raw_available(queue, chain, Vec::new());
        self.kick_if_wanted(queue);
        self.wait_used(queue, head)
    }

    /// Puts a chain into the available ring, without a kick. The device may see it at once.
    pub fn make_available(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let mut chain = Vec::new();
        let mut placed = Vec::new();
        for (position, buffer) in buffers.iter().enumerate() {
            let addr = self.place(&buffer.content);
            placed.push((addr, buffer.content.len(), buffer.writable));
            let last = position + 1 == buffers.len();
            chain.push(RawDescriptor {
                addr: addr.0,
                len: u32::try_from(buffer.content.len()).unwrap(),
                flags: if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT },
                next: u16::try_from(position + 1).unwrap(),
            });
        }
        self.make_raw_available(queue, &chain, placed)
    }

    /// Puts the same buffers behind one descriptor of an indirect table.
    pub fn make_indirect_available(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let mut table = Vec::new();
        let mut placed = Vec::new();
        for (position, buffer) in buffers.iter().enumerate() {
            let addr = self.place(&buffer.content);
            placed.push((addr, buffer.content.len(), buffer.writable));
            let last = position + 1 == buffers.len();
            table.extend_from_slice(&addr.0.to_le_bytes());
            table.extend_from_slice(&u32::try_from(buffer.content.len()).unwrap().to_le_bytes());
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            table.extend_from_slice(&flags.to_le_bytes());
            table.extend_from_slice(&u16::try_from(position + 1).unwrap().to_le_bytes());
        }
        let at = self.place(&table);
        let chain = [RawDescriptor {
            addr: at.0,
            len: u32::try_from(table.len()).unwrap(),
            flags: INDIRECT,
            next: 0,
        }];
        self.make_raw_available(queue, &chain, placed)
    }

    /// Puts a chain of descriptors as they are into the available ring; `buffers` is what is known of its memory.
    pub fn make_raw_available(
        &mut self,
        queue: u16,
        chain: &[RawDescriptor],
        buffers: Vec<(GuestAddress, usize, bool)>,
    ) -> u16 {
        let memory = &self.memory;
        let queue = self.queues.get_mut(&queue).unwrap();
        let slots: Vec<u16> = chain
            .iter()
            .map(|_| queue.free.pop().expect("a free descriptor"))
            .collect();
        for (slot, descriptor) in slots.iter().zip(chain) {
            let next = slots
                .get(usize::from(descriptor.next))
                .copied()
                .unwrap_or(descriptor.next);
            let at = GuestAddress(queue.base + u64::from(*slot) * 16);
            memory.write_obj(descriptor.addr, at).unwrap();
            memory
                .write_obj(descriptor.len, GuestAddress(at.0 + 8))
                .unwrap();
            memory
                .write_obj(descriptor.flags, GuestAddress(at.0 + 12))
                .unwrap();
            memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
        }
        let head = slots[0];
        queue.offer(memory, head);
        queue.in_flight.insert(head, InFlight { slots, buffers });
        head
    }

    /// Puts a chain into the available ring that is in it, or with the device, already.
    pub fn offer_again(&mut self, queue: u16, head: u16) {
        let queue = self.queues.get_mut(&queue).unwrap();
        queue.offer(&self.memory, head);
    }

    /// Kicks if the device asked for it (VIRTIO_F_EVENT_IDX, virtio 1.3, 2.7.10), or always without that feature.
    pub fn kick_if_wanted(&mut self, queue: u16) {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        fence(Ordering::SeqCst);
        let queue = self.queues.get_mut(&queue).unwrap();
        let at = queue.base + USED_OFFSET + 4 + u64::from(queue.size) * 8;
        let event: u16 = self
            .memory
            .load(GuestAddress(at), Ordering::Relaxed)
            .unwrap();
        let wanted = queue.avail.wrapping_sub(event).wrapping_sub(1)
            < queue.avail.wrapping_sub(queue.kicked);
        queue.kicked = queue.avail;
        if wanted || !event_idx {
            queue.kick.write(1).unwrap();
        }
    }

    /// Kicks, wanted or not.
    pub fn kick(&self, queue: u16) {
        self.queues[&queue].kick.write(1).unwrap();
    }

    /// Waits for the return of the chain that starts at `head`.
    pub fn wait_used(&mut self, queue: u16, head: u16) -> Used {
        loop {
            let interrupts = self.interrupt.count(queue);
            self.collect(queue);
            let done = &mut self.queues.get_mut(&queue).unwrap().done;
            if let Some(position) = done.iter().position(|(returned, _)| *returned == head) {
                return done.remove(position).unwrap().1;
            }
            self.wait_interrupt(queue, interrupts);
        }
    }

    /// Waits for the return of a chain, whichever is first.
    pub fn wait_any_used(&mut self, queue: u16) -> Used {
        loop {
            let interrupts = self.interrupt.count(queue);
            if let Some(used) = self.try_any_used(queue) {
                return used;
            }
            self.wait_interrupt(queue, interrupts);
        }
    }

    /// The chain that returned first, if one has.
    pub fn try_any_used(&mut self, queue: u16) -> Option<Used> {
        self.collect(queue);
        let done = &mut self.queues.get_mut(&queue).unwrap().done;
        done.pop_front().map(|(_, used)| used)
    }

    fn wait_interrupt(&self, queue: u16, after: u64) {
        self.interrupt.wait("interrupt", |seen| {
            seen.needs_reset || seen.queues.get(&queue).copied().unwrap_or(0) > after
        });
        assert!(
            !self.interrupt.seen.lock().unwrap().needs_reset,
            "the device needs a reset"
        );
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&self) {
        self.interrupt
            .wait("reset request", |seen| seen.needs_reset);
    }

    /// Waits until the device says that its configuration space has changed.
    pub fn wait_config_change(&self) {
        self.interrupt.wait("change of the configuration", |seen| {
            seen.config_changes > 0
        });
    }

    /// Takes what the used ring has, and asks for an interrupt at the next entry.
    fn collect(&mut self, index: u16) {
        let queue = self.queues.get_mut(&index).unwrap();
        let used_ring = queue.base + USED_OFFSET;
        let used_event = GuestAddress(queue.base + AVAIL_OFFSET + 4 + u64::from(queue.size) * 2);
        loop {
            let index: u16 = self
                .memory
                .load(GuestAddress(used_ring + 2), Ordering::Acquire)
                .unwrap();
            if index == queue.used {
                self.memory
                    .store(queue.used, used_event, Ordering::Relaxed)
                    .unwrap();
                fence(Ordering::SeqCst);
                let again: u16 = self
                    .memory
                    .load(GuestAddress(used_ring + 2), Ordering::Acquire)
                    .unwrap();
                if again == queue.used {
                    return;
                }
                continue;
            }
            let entry = used_ring + 4 + u64::from(queue.used % queue.size) * 8;
            queue.used = queue.used.wrapping_add(1);
            let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
            let written: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
            let head = u16::try_from(head).unwrap();
            let flown = queue
                .in_flight
                .remove(&head)
                .expect("every head is returned once");
            let mut bytes = Vec::new();
            for (addr, len, writable) in flown.buffers {
                if writable {
                    let start = bytes.len();
                    bytes.resize(start + len, 0);
                    self.memory.read_slice(&mut bytes[start..], addr).unwrap();
                }
                self.free_buffers.entry(len).or_default().push(addr);
            }
            bytes.truncate(written as usize);
            queue.free.extend(flown.slots);
            queue.done.push_back((head, Used { written, bytes }));
        }
    }

    /// Number of descriptors that can be used now.
    pub fn free_descriptors(&mut self, queue: u16) -> usize {
        self.collect(queue);
        self.queues[&queue].free.len()
    }

    /// Puts bytes somewhere in guest memory.
    fn place(&mut self, content: &[u8]) -> GuestAddress {
        let addr = match self.free_buffers.get_mut(&content.len()).and_then(Vec::pop) {
            Some(addr) => addr,
            None => {
                let addr = GuestAddress(self.heap);
                self.heap += (content.len() as u64).next_multiple_of(64).max(64);
                addr
            }
        };
        self.memory.write_slice(content, addr).unwrap();
        addr
    }

    /// Fills a piece of guest memory.
    pub fn fill(&self, at: u64, len: usize, byte: u8) {
        self.memory
            .write_slice(&vec![byte; len], GuestAddress(at))
            .unwrap();
    }

    /// What a piece of guest memory holds.
    pub fn bytes_at(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// Claims that `index` chains were made available.
    pub fn set_avail_index(&self, queue: u16, index: u16) {
        let at = self.queues[&queue].base + AVAIL_OFFSET + 2;
        self.memory
            .store(index, GuestAddress(at), Ordering::Release)
            .unwrap();
    }

    /// Chains that no device may serve: loops, tables out of bounds, buffers out of memory, nested indirect tables.
    pub fn hostile_chains(&mut self) -> Vec<Vec<RawDescriptor>> {
        let memory_end = self.memory.last_addr().0 + 1;
        let good = self.place(&[0; 64]).0;
        let descriptor = |addr, len, flags, next| RawDescriptor {
            addr,
            len,
            flags,
            next,
        };
        // An indirect table whose only entry is an indirect table: itself.
        let nested = self.place(&[0; 16]);
        self.memory.write_obj(nested.0, nested).unwrap();
        self.memory
            .write_obj(16_u32, GuestAddress(nested.0 + 8))
            .unwrap();
        self.memory
            .write_obj(INDIRECT, GuestAddress(nested.0 + 12))
            .unwrap();
        // An indirect table whose entry is its own successor.
        let looping = self.place(&[0; 16]);
        self.memory.write_obj(good, looping).unwrap();
        self.memory
            .write_obj(8_u32, GuestAddress(looping.0 + 8))
            .unwrap();
        self.memory
            .write_obj(WRITE | NEXT, GuestAddress(looping.0 + 12))
            .unwrap();
        vec![
            // Its own successor.
            vec![descriptor(good, 64, WRITE | NEXT, 0)],
            // A circle of two.
            vec![
                descriptor(good, 64, NEXT, 1),
                descriptor(good, 64, WRITE | NEXT, 0),
            ],
            // The successor lies outside of the table.
            vec![descriptor(good, 64, NEXT | WRITE, 0xfff0)],
            // Outside of memory; across its end; around the end of the address space.
            vec![descriptor(memory_end, 64, WRITE, 0)],
            vec![descriptor(memory_end - 8, 64, WRITE, 0)],
            vec![descriptor(u64::MAX - 8, 64, WRITE, 0)],
            vec![descriptor(0, u32::MAX, WRITE, 0)],
            // Read after write.
            vec![
                descriptor(good, 64, WRITE | NEXT, 1),
                descriptor(good, 64, 0, 0),
            ],
            // Indirect tables: empty, of odd length, outside of memory, nested, circular.
            vec![descriptor(good, 0, INDIRECT, 0)],
            vec![descriptor(good, 17, INDIRECT, 0)],
            vec![descriptor(memory_end, 16, INDIRECT, 0)],
            vec![descriptor(nested.0, 16, INDIRECT, 0)],
            vec![descriptor(looping.0, 16, INDIRECT, 0)],
        ]
    }
}
