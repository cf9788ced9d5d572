//! The driver sends 9P requests in the one queue, and the device answers each in the same chain. The backend is a
//! [`Share`], as the file system device has it; one thread, which switches to the uid and gid of whoever makes a file,
//! serves the queue.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::metrics::P9Metrics;
use super::server::Server;
use super::worker::{P9Worker, lock};
use crate::devices::fs::{Share, Tag, for_users};
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{QueueError, take_queues};
use crate::virtio::worker::{ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_config_space,
};

/// Index of the queue.
pub const REQUEST_QUEUE: u16 = 0;

/// What Linux takes: it has a list of so many buffers, whatever the queue's size.
const QUEUE_SIZES: [u16; 1] = [128];

/// The configuration space has a tag (virtio 1.3, 5.9.3).
const VIRTIO_9P_MOUNT_TAG: u64 = 0;

/// Why the device cannot go on, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum P9Error {
    /// The queue is unusable.
    #[error("request queue")]
    Queue(#[from] QueueError),
    /// The thread cannot be made.
    #[error("cannot start the 9P device")]
    Start(#[source] io::Error),
}

/// A 9P device.
#[derive(Debug)]
pub struct P9Device {
    tag: Tag,
    /// The length of the tag in two bytes, and the tag.
    config: Vec<u8>,
    worker: Worker<P9Worker>,
    server: Arc<Mutex<Server>>,
    metrics: Arc<P9Metrics>,
}

impl P9Device {
    /// Makes the device and its thread, which must run as root, and keeps its capabilities, as that of the file system
    /// device ([`FsDevice::new`](crate::devices::fs::FsDevice::new)).
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn new(tag: Tag, share: Share, setup: ThreadSetup) -> Result<Self, P9Error> {
        let len = u16::try_from(tag.as_str().len()).expect("a tag is short");
        let config = [&len.to_le_bytes(), tag.as_str().as_bytes()].concat();
        Ok(Self {
            tag,
            config,
            worker: Worker::spawn("9p", DeviceType::P9, for_users(setup))
                .map_err(P9Error::Start)?,
            server: Arc::new(Mutex::new(Server::new(share))),
            metrics: Arc::default(),
        })
    }

    /// The tag.
    pub fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<P9Metrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for P9Device {
    fn device_type(&self) -> DeviceType {
        DeviceType::P9
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_9P_MOUNT_TAG | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let [requests] = take_queues(activation, [REQUEST_QUEUE])?;
        let serve = P9Worker::new(
            requests,
            Arc::clone(&self.server),
            Arc::clone(&self.metrics),
        );
        self.worker.start(serve, interrupt)
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        self.worker
            .stop()
            .map_or_else(Vec::new, P9Worker::into_queues)
    }

    fn reset(&mut self) {
        self.worker.reset();
    }
}

/// What is saved of a 9P device: what the guest and it agreed on, and the fids that stand for the folder itself. Other fids
/// are not; they stand for descriptors, and a restored guest finds them unknown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct P9State {
    /// The tag.
    pub tag: String,
    /// The longest message that was agreed on, if the guest has asked.
    pub msize: Option<usize>,
    /// Fids and their users.
    pub roots: Vec<(u32, u32)>,
}

impl Snapshot for P9Device {
    type State = P9State;

    fn save(&self) -> P9State {
        let server = lock(&self.server);
        P9State {
            tag: self.tag.as_str().to_owned(),
            msize: server.msize(),
            roots: server.roots(),
        }
    }

    fn restore(&mut self, state: P9State) -> Result<(), RestoreError> {
        let refuse = |reason| RestoreError {
            device: "9p",
            reason,
        };
        if state.tag != self.tag.as_str() {
            return Err(refuse(format!(
                "its tag is {:?}, not {:?}",
                state.tag,
                self.tag.as_str()
            )));
        }
        if let Some(msize) = state.msize {
            lock(&self.server)
                .restore(msize, &state.roots)
                .map_err(|err| refuse(format!("the shared folder cannot be served: {err}")))?;
        }
        Ok(())
    }
}
