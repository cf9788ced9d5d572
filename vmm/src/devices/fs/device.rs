//! The driver sends FUSE requests in the request queues, and those that cannot wait (FORGET, INTERRUPT) in the hiprio
//! queue; the device answers them in the same chain. The backend is a [`Share`]. Each request queue has a thread, which
//! switches to the uid and gid of whoever makes a file, so that what one waits for (an fsync) does not keep the others; the
//! first one's serves the hiprio queue as well.

use std::io;
use std::iter;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{FileSystem, FsOptions};
use fuse_backend_rs::api::server::Server;
use rustix::thread::{
    CapabilitiesSecureBits, capabilities_secure_bits, set_capabilities_secure_bits,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::metrics::FsMetrics;
use super::share::Share;
use super::watch::Watch;
use super::worker::FsWorker;
use crate::changes::Changes;
use crate::config::{CachePolicy, WatchConfig};
use crate::snapshot::{RestoreError, Snapshot};
use crate::vcpu::VcpuSetup;
use crate::virtio::queue::{QueueError, take_queues_and};
use crate::virtio::worker::{ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, SharedMemory, VirtioDevice,
    read_config_space,
};

/// Index of the queue of requests that cannot wait.
pub const HIPRIO_QUEUE: u16 = 0;
/// Index of the first queue of all other requests.
pub const REQUEST_QUEUE: u16 = 1;

/// Most queues of requests.
pub(in crate::devices) const MAX_REQUEST_QUEUES: u8 = 4;

const HIPRIO_QUEUE_SIZE: u16 = 128;
/// A request of 1 MiB has 256 buffers and some. Linux limits its requests by the size of the queue, even where it uses
/// indirect descriptors.
const REQUEST_QUEUE_SIZE: u16 = 1024;

/// Why the device cannot go on, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// A queue is unusable.
    #[error("request queue")]
    Queue(#[from] QueueError),
    /// A tag that is empty or too long.
    #[error("{tag:?} is no tag of 1 to {} bytes", Tag::MAX_LEN)]
    Tag {
        /// The tag.
        tag: String,
    },
    /// There is nothing by which to follow what the host does to mapped files.
    #[error(
        "cannot watch files that the guest has mapped: raise fs.inotify.max_user_instances, or do without a DAX window"
    )]
    NoWatch(#[source] io::Error),
    /// What the host does to mapped files cannot be followed.
    #[error("cannot wait for changes of mapped files")]
    Watch(#[source] io::Error),
    /// The thread cannot be made.
    #[error("cannot start the file system device")]
    Start(#[source] io::Error),
}

/// The name by which the guest mounts a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// Longest tag in bytes (virtio 1.3, 5.11.4).
    pub const MAX_LEN: usize = 36;

    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Tag {
    type Error = FsError;

    fn try_from(tag: String) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > Self::MAX_LEN || tag.contains('\0') {
            return Err(FsError::Tag { tag });
        }
        Ok(Self(tag))
    }
}

/// The configuration space: the tag, padded with zeroes, and the number of request queues.
pub(in crate::devices) const CONFIG_LEN: usize = Tag::MAX_LEN + size_of::<u32>();

/// The configuration space of a device with this tag and number of request queues.
pub(in crate::devices) fn config_space(tag: &Tag, queues: u8) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    config[..tag.0.len()].copy_from_slice(tag.0.as_bytes());
    config[Tag::MAX_LEN..].copy_from_slice(&u32::from(queues).to_le_bytes());
    config
}

/// The sizes of all queues of a device with this number of request queues.
pub(in crate::devices) fn queue_sizes(queues: u8) -> Vec<u16> {
    let requests = iter::repeat_n(REQUEST_QUEUE_SIZE, queues.into());
    iter::once(HIPRIO_QUEUE_SIZE).chain(requests).collect()
}

/// A file system device.
#[derive(Debug)]
pub struct FsDevice {
    tag: Tag,
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    /// One for each queue of requests.
    workers: Vec<Worker<FsWorker>>,
    share: Arc<Share>,
    watch: Option<Watch>,
    metrics: Arc<FsMetrics>,
}

impl FsDevice {
    /// Makes the device for a guest of so many vCPUs, and its threads.
    ///
    /// They must run as root, and keep their capabilities when they switch to a user of the guest, so that files
    /// can be made by right of a supplementary group, which the host does not know of: whether they may be is for the
    /// guest's kernel to say. For this they need SECBIT_NO_SETUID_FIXUP, which they set where they may.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn new(tag: Tag, share: Share, vcpus: u8, setup: ThreadSetup) -> Result<Self, FsError> {
        let queues = vcpus.clamp(1, MAX_REQUEST_QUEUES);
        let workers = (0..queues)
            .map(|_| Worker::spawn("fs", DeviceType::Fs, for_users(setup)))
            .collect::<Result<_, _>>()
            .map_err(FsError::Start)?;
        Ok(Self {
            config: config_space(&tag, queues),
            tag,
            queue_sizes: queue_sizes(queues),
            workers,
            share: Arc::new(share),
            watch: None,
            metrics: Arc::default(),
        })
    }

    /// Watches what the guest knows, tells `changes` what others change there, and serves the notices by which the guest's
    /// kernel is told. Not while active. Where nobody else changes anything ([`CachePolicy::Always`]) there is nothing to watch.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub(crate) fn watch(
        &mut self,
        config: WatchConfig,
        changes: Arc<Changes>,
        setup: VcpuSetup,
    ) -> Result<(), FsError> {
        if self.share.cache() == CachePolicy::Always {
            return Ok(());
        }
        let share = Arc::get_mut(&mut self.share).expect("nobody else has it while inactive");
        let news = share.watch(config).map_err(FsError::Start)?;
        let watch = Watch::spawn(Arc::clone(&self.share), news, changes, setup);
        self.watch = Some(watch.map_err(FsError::Start)?);
        Ok(())
    }

    /// The tag.
    pub fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<FsMetrics> {
        Arc::clone(&self.metrics)
    }
}

/// The setup of a thread that makes files as users of the guest ([`FsDevice::new`]).
pub(in crate::devices) fn for_users(
    setup: ThreadSetup,
) -> impl FnOnce(DeviceType) -> io::Result<()> + Send + 'static {
    move |device| {
        keep_capabilities_of_users();
        setup(device)
    }
}

/// Lets this thread change its user without a change of its capabilities, unless it does so already.
pub(super) fn keep_capabilities_of_users() {
    let kept = capabilities_secure_bits().and_then(|bits| {
        set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)
    });
    let bits = capabilities_secure_bits().unwrap_or(CapabilitiesSecureBits::empty());
    if let Err(err) = kept
        && !bits.contains(CapabilitiesSecureBits::NO_SETUID_FIXUP)
    {
        log::warn!("users of the guest cannot make files by right of a supplementary group: {err}");
    }
}

impl VirtioDevice for FsDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        self.share.shared_memory()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let others = REQUEST_QUEUE + 1..REQUEST_QUEUE + u16::from(MAX_REQUEST_QUEUES);
        let ([hiprio, first], others) =
            take_queues_and(activation, [HIPRIO_QUEUE, REQUEST_QUEUE], others)?;
        let others = others.into_iter().map(|queue| vec![queue]);
        let queues = iter::once(vec![hiprio, first]).chain(others);
        // What is agreed on in one queue holds for all.
        let server = Arc::new(Server::new(Arc::clone(&self.share)));
        for (worker, queues) in self.workers.iter_mut().zip(queues) {
            let (server, share) = (Arc::clone(&server), Arc::clone(&self.share));
            let serve = FsWorker::new(queues, server, share, Arc::clone(&self.metrics));
            worker.start(serve, Arc::clone(&interrupt))?;
        }
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        self.workers
            .iter_mut()
            .filter_map(Worker::stop)
            .flat_map(FsWorker::into_queues)
            .collect()
    }

    fn reset(&mut self) {
        if let Some((first, others)) = self.workers.split_first_mut() {
            for worker in others {
                worker.stop();
            }
            // Closes all that the guest had open, now that no other thread opens more.
            first.reset();
        }
    }
}

/// What is saved of a file system device: what the guest and it agreed on. Node ids, open files and what is mapped in the
/// DAX window are not; they stand for descriptors, and a restored guest finds them stale.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    /// The tag.
    pub tag: String,
    /// Number of queues of requests.
    pub queues: usize,
    /// The abilities that the guest claimed in FUSE_INIT, if it has sent that.
    pub capable: Option<u64>,
}

impl Snapshot for FsDevice {
    type State = FsState;

    fn save(&self) -> FsState {
        FsState {
            tag: self.tag.0.clone(),
            queues: self.workers.len(),
            capable: self.share.capable(),
        }
    }

    fn restore(&mut self, state: FsState) -> Result<(), RestoreError> {
        let refuse = |reason| RestoreError {
            device: "fs",
            reason,
        };
        let own = (&self.tag.0, self.workers.len());
        if (&state.tag, state.queues) != own {
            return Err(refuse(format!(
                "tag and queues are {own:?}, not {:?}",
                (&state.tag, state.queues)
            )));
        }
        if let Some(capable) = state.capable {
            self.share
                .init(FsOptions::from_bits_truncate(capable))
                .map_err(|err| refuse(format!("the shared folder cannot be opened: {err}")))?;
        }
        Ok(())
    }
}
