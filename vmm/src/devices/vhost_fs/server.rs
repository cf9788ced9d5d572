//! The server, by its socket: which it is told where the guest's memory and the rings are, and asked where it stands.
//!
//! The process works for one guest, and may have been taken over by it. It has the guest's memory, doorbells and interrupts,
//! and is believed nothing but how far it has come in a ring, which a driver could as well say.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::ActiveQueue;
use crate::virtio::queue::QueueError;

/// What the transport offers for every device, and the negotiation of what follows.
const REQUIRED_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | PROTOCOL;
/// What need not be offered.
const OPTIONAL_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// To be told how many queues it serves, and whether it has done what it was told.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::REPLY_ACK);

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// A queue is unusable.
    #[error("a queue of the file system device")]
    Queue(#[from] QueueError),
    /// It lacks what every driver is offered, or what is asked of it.
    #[error("it lacks the features {features:#x} of virtio or {protocol:?} of vhost-user")]
    Features {
        features: u64,
        protocol: VhostUserProtocolFeatures,
    },
    /// It serves too few queues.
    #[error("it serves {queues} queues, and a file system takes two")]
    Queues { queues: u64 },
    /// It is gone, or refuses something.
    #[error("it does not {operation}")]
    Refused {
        operation: &'static str,
        source: vhost::Error,
    },
    /// It has closed its socket.
    #[error("it is gone")]
    Gone,
    /// The socket cannot be waited for.
    #[error("cannot wait for it")]
    Poll(#[source] io::Error),
    /// The thread, or a descriptor, cannot be made.
    #[error("cannot start the file system device")]
    Start(#[source] io::Error),
}

fn refused(operation: &'static str) -> impl FnOnce(vhost::Error) -> ServerError {
    move |source| ServerError::Refused { operation, source }
}

/// The process at the other end of a socket. Cheap to clone.
#[derive(Clone)]
pub(super) struct Server {
    socket: Frontend,
    features: u64,
    queues: u64,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("features", &self.features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Server {
    /// Takes a server into service, of which at most `queues` queues are wanted. Waits for its answers.
    pub(super) fn new(socket: OwnedFd, queues: u64) -> Result<Self, ServerError> {
        let mut socket = Frontend::from_stream(UnixStream::from(socket), queues);
        socket.set_owner().map_err(refused("take an owner"))?;
        let features = socket
            .get_features()
            .map_err(refused("say what it can do"))?;
        let lacks = |features, protocol| ServerError::Features { features, protocol };
        if REQUIRED_FEATURES & !features != 0 {
            let missing = REQUIRED_FEATURES & !features;
            return Err(lacks(missing, VhostUserProtocolFeatures::empty()));
        }
        let protocol = socket
            .get_protocol_features()
            .map_err(refused("say what it can do"))?;
        if !protocol.contains(PROTOCOL_FEATURES) {
            return Err(lacks(0, PROTOCOL_FEATURES - protocol));
        }
        socket
            .set_protocol_features(PROTOCOL_FEATURES)
            .map_err(refused("agree on the protocol"))?;
        let served = socket
            .get_queue_num()
            .map_err(refused("say how many queues it serves"))?;
        socket.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if served < 2 {
            return Err(ServerError::Queues { queues: served });
        }
        Ok(Self {
            socket,
            features,
            queues: served.min(queues),
        })
    }

    /// How many queues it serves of those that are wanted, at least two.
    pub(super) fn queues(&self) -> u64 {
        self.queues
    }

    /// The features of a device that may be offered with it.
    pub(super) fn features(&self) -> u64 {
        self.features & OPTIONAL_FEATURES
    }

    /// Says what was negotiated with the driver, and where the guest's memory is.
    pub(super) fn set_up(
        &self,
        features: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<(), ServerError> {
        let features = features & (REQUIRED_FEATURES | OPTIONAL_FEATURES) | PROTOCOL;
        self.socket
            .set_features(features)
            .map_err(refused("work with the driver's features"))?;
        let regions: Vec<_> = memory.iter().filter_map(region_info).collect();
        self.socket
            .set_mem_table(&regions)
            .map_err(refused("map the guest's memory"))
    }

    /// Lets it serve a queue from where that stands, and raise its driver's interrupt by `call`.
    pub(super) fn start(&self, queue: &ActiveQueue, call: &EventFd) -> Result<(), ServerError> {
        let ring = usize::from(queue.index);
        let ActiveQueue { queue, kick, .. } = queue;
        let place = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        let socket = &self.socket;
        socket
            .set_vring_num(ring, queue.size())
            .and_then(|()| socket.set_vring_base(ring, queue.next_avail()))
            .and_then(|()| socket.set_vring_addr(ring, &place))
            .and_then(|()| socket.set_vring_call(ring, call))
            .and_then(|()| socket.set_vring_kick(ring, kick))
            .and_then(|()| socket.clone().set_vring_enable(ring, true))
            .map_err(refused("take a queue"))
    }

    /// Takes a queue back from it, and returns the position in the available ring of what it has not begun.
    pub(super) fn stop(&self, index: u16) -> Result<u16, ServerError> {
        let socket = &self.socket;
        let ring = usize::from(index);
        let base = socket
            .clone()
            .set_vring_enable(ring, false)
            .and_then(|()| socket.get_vring_base(ring))
            .map_err(refused("give a queue back"))?;
        u16::try_from(base).map_err(|_| ServerError::Refused {
            operation: "say where it stopped",
            source: vhost::Error::InvalidQueue,
        })
    }
}

/// A region as the server is told of it; none that has no file.
///
/// It names what lies in the region by addresses of this process, by custom. Any others do, so long as the rings' are of the
/// same kind, and the guest's do not tell where this process has its memory.
fn region_info(region: &vm_memory::GuestRegionMmap) -> Option<VhostUserMemoryRegionInfo> {
    let file = region.file_offset()?;
    let start = region.start_addr().raw_value();
    Some(VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: region.len(),
        userspace_addr: start,
        mmap_offset: file.start(),
        mmap_handle: file.file().as_raw_fd(),
    })
}
