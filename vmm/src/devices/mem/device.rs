//! The driver reads how much of the range it shall use from the configuration space, and is interrupted when that changes;
//! it asks for blocks and gives blocks back by requests, each one chain with a readable request and a writable answer. The
//! device's thread answers; the pages of a block that is unplugged go back to the host.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{ByteValued, GuestAddress, GuestMemory, GuestMemoryMmap, Le16, Le64};

use super::metrics::MemMetrics;
use super::region::{Answer, BLOCK_SIZE, Region, RegionState, Usage};
use crate::memory;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{Chain, ChainError, QueueError, Virtqueue, take_queues};
use crate::virtio::worker::{Poll, Serve, ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice, read_config_space,
};

/// Index of the only queue.
pub const REQUEST_QUEUE: u16 = 0;

const QUEUE_SIZES: [u16; 1] = [64];

/// Requests (5.15.6.1).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The queue is unusable.
    #[error("request queue")]
    Queue(#[from] QueueError),
}

/// The configuration space (5.15.4).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Config {
    block_size: Le64,
    node_id: Le16,
    padding: [u8; 6],
    addr: Le64,
    region_size: Le64,
    usable_region_size: Le64,
    plugged_size: Le64,
    requested_size: Le64,
}

// SAFETY: integers and bytes in an order that needs no padding; every bit pattern is one.
unsafe impl ByteValued for Config {}

/// A request (5.15.6.1). The fields of one that names no blocks are nothing.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Request {
    kind: Le16,
    padding: [Le16; 3],
    addr: Le64,
    nb_blocks: Le16,
    more_padding: [Le16; 3],
}

// SAFETY: as above.
unsafe impl ByteValued for Request {}

/// An answer. Only one to [`STATE`] has something in the last field.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Response {
    kind: Le16,
    padding: [Le16; 3],
    state: Le16,
}

// SAFETY: as above.
unsafe impl ByteValued for Response {}

/// What the vCPUs, the device's thread and the owner of the VM share.
#[derive(Debug)]
struct Shared {
    region: Region,
    /// While the device is active.
    interrupt: Option<Arc<dyn Interrupt>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The way to tell the guest how much memory it shall use.
#[derive(Debug, Clone)]
pub struct MemHandle(Arc<Mutex<Shared>>);

impl MemHandle {
    /// Asks the guest to use `size` bytes of the range, in whole blocks. It answers when it can, or not at all.
    pub fn request(&self, size: u64) {
        let mut shared = lock(&self.0);
        if shared.region.request(size)
            && let Some(interrupt) = &shared.interrupt
        {
            interrupt.config_change();
        }
    }

    /// Bytes that the guest uses of the range.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        lock(&self.0).region.plugged()
    }

    /// Adds what was asked for and what is used, under their names.
    pub fn collect(&self, into: &mut BTreeMap<String, u64>) {
        let shared = lock(&self.0);
        into.insert("mem_requested_bytes".to_owned(), shared.region.requested());
        into.insert("mem_plugged_bytes".to_owned(), shared.region.plugged());
    }
}

/// A memory device.
#[derive(Debug)]
pub struct MemDevice {
    shared: Arc<Mutex<Shared>>,
    worker: Worker<MemWorker>,
    metrics: Arc<MemMetrics>,
}

impl MemDevice {
    /// Makes the device and its thread, for a range of addresses that is part of guest memory and whose ends are multiples
    /// of [`BLOCK_SIZE`].
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn new(range: Range<u64>, setup: ThreadSetup) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Mutex::new(Shared {
                region: Region::new(range),
                interrupt: None,
            })),
            worker: Worker::spawn("mem", DeviceType::Mem, setup)?,
            metrics: Arc::default(),
        })
    }

    /// The way to tell the guest how much memory it shall use.
    #[must_use]
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<MemMetrics> {
        Arc::clone(&self.metrics)
    }

    fn config(&self) -> Config {
        let shared = lock(&self.shared);
        let range = shared.region.range();
        let size = Le64::from(range.end - range.start);
        Config {
            block_size: BLOCK_SIZE.into(),
            addr: range.start.into(),
            region_size: size,
            usable_region_size: size,
            plugged_size: shared.region.plugged().into(),
            requested_size: shared.region.requested().into(),
            ..Default::default()
        }
    }
}

impl VirtioDevice for MemDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(self.config().as_slice(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let [queue] = take_queues(activation, [REQUEST_QUEUE])?;
        let served = MemWorker {
            queue,
            shared: Arc::clone(&self.shared),
            metrics: Arc::clone(&self.metrics),
        };
        self.worker.start(served, Arc::clone(&interrupt))?;
        lock(&self.shared).interrupt = Some(interrupt);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        lock(&self.shared).interrupt = None;
        self.worker
            .stop()
            .map(|served| served.queue.into_active())
            .into_iter()
            .collect()
    }

    /// What is plugged stays plugged (5.15.5.2): a driver that starts over unplugs it first.
    fn reset(&mut self) {
        lock(&self.shared).interrupt = None;
        self.worker.stop();
    }
}

impl Snapshot for MemDevice {
    type State = RegionState;

    fn save(&self) -> Self::State {
        lock(&self.shared).region.save()
    }

    fn restore(&mut self, state: Self::State) -> Result<(), RestoreError> {
        lock(&self.shared)
            .region
            .restore(state)
            .ok_or_else(|| RestoreError {
                device: "memory device",
                reason: "its range has another size".to_owned(),
            })
    }
}

/// What exists only while active.
#[derive(Debug)]
struct MemWorker {
    queue: Virtqueue,
    shared: Arc<Mutex<Shared>>,
    metrics: Arc<MemMetrics>,
}

/// Why one request is returned unserved.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("malformed request")]
    Chain(#[from] ChainError),
    #[error("request of {len} bytes")]
    Short { len: usize },
    #[error("room for {len} bytes of an answer")]
    NoRoom { len: usize },
}

impl Serve for MemWorker {
    type Error = MemError;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.queue]
    }

    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), MemError> {
        let Self {
            queue,
            shared,
            metrics,
        } = self;
        queue.drain(|chain| {
            answer(chain, shared, metrics).unwrap_or_else(|err| {
                metrics.bad_chains.inc();
                log::debug!("memory request refused: {err}");
                0
            })
        })?;
        Ok(())
    }
}

fn answer(
    chain: Chain<'_>,
    shared: &Mutex<Shared>,
    metrics: &MemMetrics,
) -> Result<u32, RequestError> {
    let memory = chain.memory();
    let (mut readable, mut room) = chain.buffers()?;
    let len = readable.len();
    let request: Request = readable.read_obj().ok_or(RequestError::Short { len })?;
    if room.len() < size_of::<Response>() {
        return Err(RequestError::NoRoom { len: room.len() });
    }
    let (answer, state) = carry_out(&request, &mut lock(shared).region, memory);
    metrics.requests.inc();
    if answer == Answer::Error {
        metrics.refused.inc();
    }
    let response = Response {
        kind: (answer as u16).into(),
        state: state.map_or(0, |state| state as u16).into(),
        ..Default::default()
    };
    let written = room.write(response.as_slice());
    Ok(u32::try_from(written).expect("an answer has a few bytes"))
}

fn carry_out(
    request: &Request,
    region: &mut Region,
    memory: &GuestMemoryMmap,
) -> (Answer, Option<Usage>) {
    let discard = |range: Range<u64>| discard(memory, range);
    let address = request.addr.to_native();
    let count = request.nb_blocks.to_native();
    match request.kind.to_native() {
        PLUG => (region.plug(address, count), None),
        UNPLUG => (region.unplug(address, count, discard), None),
        UNPLUG_ALL => (region.unplug_all(discard), None),
        STATE => match region.state(address, count) {
            Some(state) => (Answer::Ack, Some(state)),
            None => (Answer::Error, None),
        },
        _ => (Answer::Error, None),
    }
}

/// Gives the pages of an unplugged piece back to the host. What the host does not take now it takes with the VM.
fn discard(memory: &GuestMemoryMmap, range: Range<u64>) {
    let len = usize::try_from(range.end - range.start).expect("x86-64 has 64-bit pointers");
    for piece in memory.get_slices(GuestAddress(range.start), len) {
        let given = piece
            .map_err(io::Error::other)
            .and_then(|piece| memory::give_back(memory, &piece));
        if let Err(err) = given {
            log::warn!("unplugged memory does not go back to the host: {err}");
        }
    }
}

#[cfg(test)]
mod tests;
