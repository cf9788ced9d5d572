//! A pair of queues that the host's kernel serves (vhost-net): it works on the rings and the tap on a thread of its own;
//! doorbells and interrupts pass between it and KVM. What is left to the device's thread is to tell it where
//! everything is, to take the queues back, and to notice when it gives up.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::tap::Tap;
use crate::virtio::ActiveQueue;

/// The features that are about the rings and the layout of packets in them; all others are the tap's.
const RING_FEATURES: u64 = REQUIRED_FEATURES | OPTIONAL_FEATURES;
/// What the transport offers for every device.
const REQUIRED_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
/// What need not be offered.
const OPTIONAL_FEATURES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Why vhost-net cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// It lacks what every driver is offered.
    #[error("the host's vhost-net lacks the features {missing:#x}")]
    Features {
        /// Those bits.
        missing: u64,
    },
    /// It refuses something.
    #[error("vhost-net refuses to {operation}")]
    Refused {
        /// What it was asked.
        operation: &'static str,
        /// What it said.
        source: vhost::Error,
    },
    /// It refuses the tap.
    #[error("vhost-net refuses the tap")]
    Backend(#[source] io::Error),
    /// An eventfd cannot be made or used.
    #[error("cannot use an eventfd")]
    EventFd(#[source] io::Error),
    /// It has met something in the rings that it cannot work with.
    #[error("vhost-net cannot use the rings")]
    Rings,
}

fn refused(operation: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Refused { operation, source }
}

/// An open `/dev/vhost-net` that serves this process.
#[derive(Debug)]
pub(super) struct Vhost {
    fd: OwnedFd,
    /// All that it can do.
    features: u64,
}

impl Vhost {
    /// Takes a descriptor into service.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, VhostError> {
        let nowhere = InMemory {
            fd: &fd,
            memory: Arc::default(),
        };
        nowhere.set_owner().map_err(refused("serve this process"))?;
        let features = nowhere
            .get_features()
            .map_err(refused("say what it can do"))?;
        match REQUIRED_FEATURES & !features {
            0 => Ok(Self { fd, features }),
            missing => Err(VhostError::Features { missing }),
        }
    }

    /// Features of a device that must not be offered with it.
    pub(super) fn missing_features(&self) -> u64 {
        OPTIONAL_FEATURES & !self.features
    }
}

/// As the crate wants it: with the memory in which queues lie.
struct InMemory<'a> {
    fd: &'a OwnedFd,
    memory: Arc<GuestMemoryMmap>,
}

impl AsRawFd for InMemory<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for InMemory<'_> {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// The transport has checked that the queue lies in memory.
    fn is_valid(&self, _config: &VringConfigData) -> bool {
        true
    }
}

impl InMemory<'_> {
    /// Says where the guest's memory is.
    fn set_memory(&self) -> Result<(), VhostError> {
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr().expose_provenance() as u64,
                // A file is what vhost-user wants.
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        self.set_mem_table(&regions)
            .map_err(refused("map the guest's memory"))
    }

    /// Says all about a queue but which tap it is for.
    fn set_queue(
        &self,
        ring: usize,
        queue: &KernelQueue,
        error: &EventFd,
    ) -> Result<(), VhostError> {
        let ActiveQueue { queue: q, kick, .. } = &queue.active;
        let addresses = VringConfigData {
            queue_max_size: q.max_size(),
            queue_size: q.size(),
            flags: 0,
            desc_table_addr: q.desc_table(),
            used_ring_addr: q.used_ring(),
            avail_ring_addr: q.avail_ring(),
            log_addr: None,
        };
        self.set_vring_num(ring, q.size())
            .and_then(|()| self.set_vring_base(ring, q.next_avail()))
            .and_then(|()| self.set_vring_addr(ring, &addresses))
            .and_then(|()| self.set_vring_call(ring, &queue.call))
            .and_then(|()| self.set_vring_err(ring, error))
            .and_then(|()| self.set_vring_kick(ring, kick))
            .map_err(refused("take a queue"))
    }

    /// Starts serving a queue, or stops.
    fn set_backend(&self, ring: usize, tap: Option<&dyn Tap>) -> io::Result<()> {
        let file = vhost_vring_file {
            index: libc::c_uint::try_from(ring).expect("there are two"),
            fd: tap.map_or(-1, |tap| tap.as_fd().as_raw_fd()),
        };
        // SAFETY: VHOST_NET_SET_BACKEND reads this structure; the kernel takes a reference of its own on the tap.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A queue, and the eventfd that interrupts its driver.
#[derive(Debug)]
pub(super) struct KernelQueue {
    pub(super) active: ActiveQueue,
    pub(super) call: EventFd,
}

/// A pair of queues, which the kernel serves from [`Self::start`] to [`Self::stop`].
#[derive(Debug)]
pub(super) struct KernelPair {
    vhost: Arc<Vhost>,
    tap: Arc<dyn Tap>,
    memory: Arc<GuestMemoryMmap>,
    /// What was negotiated.
    features: u64,
    /// Receive and transmit, which vhost-net has under the same numbers.
    queues: [KernelQueue; 2],
    /// Written to by the kernel when it gives up.
    error: EventFd,
}

impl KernelPair {
    pub(super) fn new(
        vhost: Arc<Vhost>,
        tap: Arc<dyn Tap>,
        memory: Arc<GuestMemoryMmap>,
        features: u64,
        queues: [KernelQueue; 2],
    ) -> io::Result<Self> {
        Ok(Self {
            vhost,
            tap,
            memory,
            features,
            queues,
            error: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
        })
    }

    /// Readable once the kernel has given up.
    pub(super) fn error(&self) -> &EventFd {
        &self.error
    }

    pub(super) fn into_queues(self) -> [ActiveQueue; 2] {
        self.queues.map(|queue| queue.active)
    }

    /// Lets the kernel serve the queues from where they stand. Switches the queue of the tap on; it may be switched off
    /// afterwards.
    pub(super) fn start(&self) -> Result<(), VhostError> {
        self.tap.set_enabled(true).map_err(VhostError::Backend)?;
        let vhost = InMemory {
            fd: &self.vhost.fd,
            memory: Arc::clone(&self.memory),
        };
        vhost
            .set_features(self.features & RING_FEATURES)
            .map_err(refused("work with the driver's features"))?;
        vhost.set_memory()?;
        for (ring, queue) in self.queues.iter().enumerate() {
            vhost.set_queue(ring, queue, &self.error)?;
        }
        for (ring, queue) in self.queues.iter().enumerate() {
            vhost
                .set_backend(ring, Some(self.tap.as_ref()))
                .map_err(VhostError::Backend)?;
            // A kick may have been lost while nobody served.
            queue.active.kick.write(1).map_err(VhostError::EventFd)?;
        }
        Ok(())
    }

    /// Takes the queues back as they stand. What the kernel had begun, it has ended then.
    pub(super) fn stop(&mut self) {
        let vhost = InMemory {
            fd: &self.vhost.fd,
            memory: Arc::clone(&self.memory),
        };
        for ring in 0..self.queues.len() {
            if let Err(err) = vhost.set_backend(ring, None) {
                log::warn!("vhost-net does not let go of its tap: {err}");
            }
        }
        for (ring, queue) in self.queues.iter_mut().enumerate() {
            let queue = &mut queue.active.queue;
            match vhost.get_vring_base(ring).map(u16::try_from) {
                Ok(Ok(next_available)) => queue.set_next_avail(next_available),
                refused => log::warn!("vhost-net does not say where it stopped: {refused:?}"),
            }
            // It returns what it takes at once, and leaves the position in the ring only.
            match queue.used_idx(self.memory.as_ref(), Ordering::Acquire) {
                Ok(next_used) => queue.set_next_used(next_used.0),
                Err(err) => log::warn!("the used ring of a queue is gone: {err}"),
            }
        }
    }
}
