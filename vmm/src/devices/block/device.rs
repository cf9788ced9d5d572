//! The driver sends requests in one queue or several, each a header, data and a byte for the status; the device answers each
//! when it is done. The backend is a descriptor of a regular file or a block device. Each queue has a thread of the device, so
//! that requests of different processors do not wait for one another, and an io_uring, so that those of a queue do not. Where
//! the host has no io_uring for us, the thread reads and writes by itself, one request after the other.

use std::io;
use std::iter;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::disk::{Disk, Geometry, Storage};
use super::metrics::BlockMetrics;
use super::request::{
    ID_LEN, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS,
};
use super::ring::Engine;
use super::worker::{BlockWorker, Terms};
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{QueueError, take_queues_and};
use crate::virtio::worker::{ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_config_space,
};

/// Index of the first queue; the others follow.
pub const REQUEST_QUEUE: u16 = 0;

/// Most queues of a disk: each costs a thread, and that many keep any disk busy.
pub const MAX_QUEUES: u8 = 4;

const QUEUE_SIZE: u16 = 256;

/// Most buffers of data in one request: as many as fit the queue beside header and status.
const SEG_MAX: u32 = 254;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Why the device cannot go on, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The queue is unusable.
    #[error("request queue")]
    Queue(#[from] QueueError),
    /// The descriptor is neither a regular file nor a block device, or does not say how large it is.
    #[error("cannot use the disk's descriptor")]
    Disk(#[source] io::Error),
    /// A serial number that GET_ID could not answer.
    #[error("{serial:?} is no serial number of 1 to {ID_LEN} printable ASCII characters")]
    Serial {
        /// The serial number.
        serial: String,
    },
    /// The io_uring has failed.
    #[error("cannot have requests to the disk done")]
    Engine(#[source] io::Error),
    /// The thread cannot be made.
    #[error("cannot start the block device")]
    Start(#[source] io::Error),
}

/// What a block device is made from, beside its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockConfig {
    serial: String,
    read_only: bool,
    queues: u8,
}

impl BlockConfig {
    /// A disk that the guest knows by `serial`, and may write to unless `read_only`. It has one queue.
    ///
    /// # Errors
    /// When the serial number is empty, too long, or not printable ASCII.
    pub fn new(serial: String, read_only: bool) -> Result<Self, BlockError> {
        let printable = serial.bytes().all(|byte| byte.is_ascii_graphic());
        if serial.is_empty() || serial.len() > ID_LEN || !printable {
            return Err(BlockError::Serial { serial });
        }
        Ok(Self {
            serial,
            read_only,
            queues: 1,
        })
    }

    /// With a queue for each of a guest's `vcpus`, as far as there may be that many.
    #[must_use]
    pub fn for_vcpus(mut self, vcpus: u8) -> Self {
        self.queues = vcpus.clamp(1, MAX_QUEUES);
        self
    }

    /// The serial number.
    pub fn serial(&self) -> &str {
        &self.serial
    }
}

/// A block device.
#[derive(Debug)]
pub struct BlockDevice {
    config: BlockConfig,
    geometry: Geometry,
    queue_sizes: Vec<u16>,
    /// One for each queue.
    lanes: Vec<Lane>,
    storage: Arc<dyn Storage>,
    metrics: Arc<BlockMetrics>,
}

/// What serves a queue.
#[derive(Debug)]
struct Lane {
    worker: Worker<BlockWorker>,
    /// Here while inactive. It is made with the device: the thread that uses it may not make one.
    engine: Option<Box<dyn Engine>>,
}

impl Lane {
    /// What the worker is to serve with. One that still has something in flight has failed before.
    fn take_engine(&mut self) -> Option<Box<dyn Engine>> {
        self.engine.take_if(|engine| engine.in_flight() == 0)
    }

    /// Stops serving.
    fn stop(&mut self) -> Option<ActiveQueue> {
        let (queue, engine) = self.worker.stop()?.into_parts();
        if engine.is_some() {
            self.engine = engine;
        }
        Some(queue)
    }
}

impl BlockDevice {
    /// Makes the device and its threads. `disk` is open for reading, and for writing unless read-only.
    ///
    /// # Errors
    /// When the descriptor is no disk, or a thread cannot be made.
    pub fn new(config: BlockConfig, disk: OwnedFd, setup: ThreadSetup) -> Result<Self, BlockError> {
        let (disk, geometry) = Disk::new(disk).map_err(BlockError::Disk)?;
        Self::with_storage(config, Arc::new(disk), geometry, setup)
    }

    pub(super) fn with_storage(
        config: BlockConfig,
        storage: Arc<dyn Storage>,
        geometry: Geometry,
        setup: ThreadSetup,
    ) -> Result<Self, BlockError> {
        let lanes = open_engines(&config, storage.as_ref())
            .into_iter()
            .map(|engine| {
                let worker = Worker::spawn("block", DeviceType::Block, setup)?;
                Ok(Lane { worker, engine })
            })
            .collect::<Result<_, _>>()
            .map_err(BlockError::Start)?;
        Ok(Self {
            queue_sizes: vec![QUEUE_SIZE; config.queues.into()],
            config,
            geometry,
            lanes,
            storage,
            metrics: Arc::default(),
        })
    }

    /// What it was made from.
    pub fn config(&self) -> &BlockConfig {
        &self.config
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        Arc::clone(&self.metrics)
    }

    /// The configuration space (virtio 1.3, 5.2.4), as far as the features reach.
    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes)
        };
        let Geometry {
            sectors,
            logical_block,
            physical_block,
        } = self.geometry;
        put(0, &sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &logical_block.to_le_bytes());
        // Topology: physical block as an exponent, nothing out of line, and the same again as the least useful size.
        let ratio = physical_block
            .checked_div(logical_block)
            .unwrap_or(1)
            .max(1);
        put(24, &[ratio.ilog2().to_le_bytes()[0], 0]);
        put(26, &u16::try_from(ratio).unwrap_or(1).to_le_bytes());
        put(34, &u16::from(self.config.queues).to_le_bytes());
        if !self.config.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
            // In sectors: a hole smaller than a physical block frees nothing.
            put(44, &(physical_block / 512).to_le_bytes());
            put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_ZEROES_SEGMENTS.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    fn id(&self) -> [u8; ID_LEN] {
        let mut id = [0; ID_LEN];
        id[..self.config.serial.len()].copy_from_slice(self.config.serial.as_bytes());
        id
    }
}

/// An engine for each queue, if there is one for each.
fn open_engines(config: &BlockConfig, storage: &dyn Storage) -> Vec<Option<Box<dyn Engine>>> {
    let serial = &config.serial;
    let engines: io::Result<Vec<_>> = (0..config.queues)
        .map(|_| storage.engine(QUEUE_SIZE).map(Some))
        .collect();
    match engines {
        Ok(engines) => {
            log::debug!("the disk {serial:?} has an io_uring for each queue");
            engines
        }
        Err(err) => {
            log::info!(
                "the disk {serial:?} does one request of a queue at a time: no io_uring: {err}"
            );
            (0..config.queues).map(|_| None).collect()
        }
    }
}

/// Up to and including the fields of WRITE_ZEROES.
const CONFIG_LEN: usize = 60;

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let mut common =
            F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        if self.config.queues > 1 {
            common |= F_MQ;
        }
        if self.config.read_only {
            common | F_RO
        } else {
            common | F_DISCARD | F_WRITE_ZEROES
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let agreed = activation.features;
        let terms = Terms {
            capacity: self.geometry.sectors,
            read_only: self.config.read_only,
            id: self.id(),
            write_through: agreed & F_FLUSH == 0,
            discard: agreed & F_DISCARD != 0,
            write_zeroes: agreed & F_WRITE_ZEROES != 0,
        };
        let interrupt = Arc::clone(&activation.interrupt);
        // Without MQ the driver knows of one queue (5.2.5).
        let known = if agreed & F_MQ == 0 { 1 } else { MAX_QUEUES };
        let others = REQUEST_QUEUE + 1..REQUEST_QUEUE + u16::from(known);
        let ([first], others) = take_queues_and(activation, [REQUEST_QUEUE], others)?;
        let queues = iter::once(first).chain(others);
        for (lane, queue) in self.lanes.iter_mut().zip(queues) {
            let storage = Arc::clone(&self.storage);
            let metrics = Arc::clone(&self.metrics);
            let engine = lane.take_engine();
            let serve = BlockWorker::new(queue, storage, engine, terms.clone(), metrics);
            lane.worker.start(serve, Arc::clone(&interrupt))?;
        }
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        self.lanes.iter_mut().filter_map(Lane::stop).collect()
    }

    fn reset(&mut self) {
        for lane in &mut self.lanes {
            lane.stop();
        }
    }
}

/// What is saved of a block device: enough to refuse another disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// The serial number.
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes that are addressed together.
    pub logical_block: u32,
    /// How many queues there are.
    pub queues: u8,
}

impl Snapshot for BlockDevice {
    type State = BlockState;

    fn save(&self) -> BlockState {
        BlockState {
            serial: self.config.serial.clone(),
            read_only: self.config.read_only,
            sectors: self.geometry.sectors,
            logical_block: self.geometry.logical_block,
            queues: self.config.queues,
        }
    }

    fn restore(&mut self, state: BlockState) -> Result<(), RestoreError> {
        let own = self.save();
        if state != own {
            return Err(RestoreError {
                device: "block",
                reason: format!("the disk is {own:?}, not {state:?}"),
            });
        }
        Ok(())
    }
}
