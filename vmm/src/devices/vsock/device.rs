//! The driver offers buffers for packets to the guest in the receive queue, and sends packets in the transmit queue; a
//! packet is a header and the bytes of a stream. The backend is one unix stream socket for each connection, of which
//! the rest of the process has the other end. One thread does all of it.

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::handle::VsockHandle;
use super::metrics::VsockMetrics;
use super::worker::{Backend, VsockWorker};
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{QueueError, take_queues};
use crate::virtio::worker::{ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_config_space,
};

/// Index of the queue of packets to the guest.
pub const RX_QUEUE: u16 = 0;
/// Index of the queue of packets from the guest.
pub const TX_QUEUE: u16 = 1;
/// Index of the queue of events (virtio 1.3, 5.10.6.7).
pub const EVENT_QUEUE: u16 = 2;

/// Linux fills the receive queue with 4 KiB buffers, so its size is what one interrupt can bring: 1 MiB.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// VIRTIO_VSOCK_F_STREAM.
const F_STREAM: u64 = 1 << 0;

/// Why the device cannot go on, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A queue is unusable.
    #[error("packet queue")]
    Queue(#[from] QueueError),
    /// The thread cannot wait for requests or sockets.
    #[error("cannot wait for a socket")]
    Poll(#[source] io::Error),
    /// The thread, or its eventfd, cannot be made.
    #[error("cannot start the socket device")]
    Start(#[source] io::Error),
    /// A CID that no guest may have (virtio 1.3, 5.10.4).
    #[error("{cid} is no CID for a guest")]
    Cid {
        /// The CID.
        cid: u32,
    },
}

/// What a socket device is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VsockConfig {
    guest_cid: u32,
    ready_port: u32,
}

impl VsockConfig {
    /// A guest with this CID, which may connect to `ready_port` of the host, once.
    ///
    /// # Errors
    /// When the CID is reserved.
    pub fn new(guest_cid: u32, ready_port: u32) -> Result<Self, VsockError> {
        if guest_cid < 3 || guest_cid == u32::MAX {
            return Err(VsockError::Cid { cid: guest_cid });
        }
        Ok(Self {
            guest_cid,
            ready_port,
        })
    }

    /// CID of the guest.
    pub fn guest_cid(&self) -> u64 {
        u64::from(self.guest_cid)
    }

    /// The port of the host that is open to the guest.
    pub fn ready_port(&self) -> u32 {
        self.ready_port
    }
}

/// What is done when the guest connects to the ready port. Called on the device's thread; must not block.
pub(super) struct OnReady(pub(super) Box<dyn FnOnce() + Send>);

impl fmt::Debug for OnReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnReady")
    }
}

/// A socket device.
#[derive(Debug)]
pub struct VsockDevice {
    config: VsockConfig,
    worker: Worker<VsockWorker>,
    /// With the worker while active.
    backend: Option<Backend>,
    handle: VsockHandle,
    metrics: Arc<VsockMetrics>,
}

impl VsockDevice {
    /// Makes the device and its thread. `on_ready` is called on that thread when the guest first connects to the ready
    /// port, and must not block.
    ///
    /// # Errors
    /// When the thread or its eventfd cannot be made.
    pub fn new(
        config: VsockConfig,
        on_ready: impl FnOnce() + Send + 'static,
        setup: ThreadSetup,
    ) -> Result<Self, VsockError> {
        let (handle, requests) = VsockHandle::new().map_err(VsockError::Start)?;
        let metrics = Arc::<VsockMetrics>::default();
        let on_ready = OnReady(Box::new(on_ready));
        Ok(Self {
            config,
            worker: Worker::spawn("vsock", DeviceType::Vsock, setup).map_err(VsockError::Start)?,
            backend: Some(Backend::new(
                config,
                requests,
                on_ready,
                Arc::clone(&metrics),
            )),
            handle,
            metrics,
        })
    }

    /// The way to open connections into the guest.
    pub fn handle(&self) -> VsockHandle {
        self.handle.clone()
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config.guest_cid().to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let [rx, tx, events] = take_queues(activation, [RX_QUEUE, TX_QUEUE, EVENT_QUEUE])?;
        let backend = self
            .backend
            .take()
            .ok_or_else(|| ActivateError::Worker(io::ErrorKind::BrokenPipe.into()))?;
        self.worker
            .start(VsockWorker::new(rx, tx, events, backend), interrupt)
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let Some(served) = self.worker.stop() else {
            return Vec::new();
        };
        let (queues, backend) = served.into_parts();
        self.backend = Some(backend);
        queues
    }

    fn reset(&mut self) {
        self.pause();
        if let Some(backend) = &mut self.backend {
            backend.reset();
        }
    }
}

/// What is saved of a socket device. Connections are not: their other ends are processes of the host, which a snapshot
/// does not hold. The guest is told so when it goes on (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// CID of the guest.
    pub guest_cid: u64,
    /// Whether the guest has connected to the ready port.
    pub ready: bool,
}

impl Snapshot for VsockDevice {
    type State = VsockState;

    fn save(&self) -> VsockState {
        VsockState {
            guest_cid: self.config.guest_cid(),
            ready: self.backend.as_ref().is_none_or(Backend::is_ready),
        }
    }

    fn restore(&mut self, state: VsockState) -> Result<(), RestoreError> {
        let refuse = |reason| RestoreError {
            device: "vsock",
            reason,
        };
        if state.guest_cid != self.config.guest_cid() {
            return Err(refuse(format!(
                "it has the CID {}, not {}",
                state.guest_cid,
                self.config.guest_cid()
            )));
        }
        let Some(backend) = &mut self.backend else {
            return Err(refuse("the device is active".to_owned()));
        };
        backend.restore(state.ready);
        Ok(())
    }
}
