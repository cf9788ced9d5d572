//! The contract between a virtio device and the transport that carries it.
//!
//! The transport (`crate::pci`) owns everything that all devices share: status, feature negotiation, queue
//! configuration, interrupts. A device owns what makes it this device. Its life is
//! `new → (activate → (pause → activate)* → reset)*`: `activate` moves the queues into the device's worker thread;
//! `pause` stops that thread and hands the queues back as they stand, so that the VM can be saved, or run on with the
//! same queues; `reset` forgets them, so that a driver may start over (virtio 1.3, 2.1 and 2.4).

use std::fmt;
use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::SharedMemory;
use crate::snapshot::AnySnapshot;

/// Virtio device types (virtio 1.3, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// Network device (5.1).
    Net = 1,
    /// Block device (5.2).
    Block = 2,
    /// Console (5.3).
    Console = 3,
    /// Entropy source (5.4).
    Rng = 4,
    /// Memory balloon (5.5).
    Balloon = 5,
    /// 9P transport (5.9).
    P9 = 9,
    /// Socket device (5.10).
    Vsock = 19,
    /// Memory device (5.15).
    Mem = 24,
    /// File system device (5.11).
    Fs = 26,
}

/// How a device tells the driver that something happened.
///
/// The transport implements it: MSI-X vectors bound to irqfds, or a fake in tests.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Signals that the used ring of queue `index` has new entries. Whether the driver wants to know is for the
    /// caller to ask ([`virtio_queue::QueueT::needs_notification`]).
    fn queue(&self, index: u16);

    /// An eventfd that does the same as [`Self::queue`] when it is written to, for who serves the queue outside of this
    /// process. It is the same one each time, until the device is reset. To be called by [`VirtioDevice::activate`], on its
    /// thread, which may bind interrupts.
    ///
    /// # Errors
    /// When the eventfd cannot be made.
    fn call(&self, index: u16) -> io::Result<EventFd>;

    /// Signals that the device's configuration space has changed (virtio 1.3, 2.3).
    fn config_change(&self);

    /// Puts the device in the state DEVICE_NEEDS_RESET and says so to the driver (virtio 1.3, 2.1.1).
    fn needs_reset(&self);
}

/// One virtqueue that the driver has enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its index in the device's numbering.
    pub index: u16,
    /// Rings and positions, as validated by the transport.
    pub queue: Queue,
    /// Readable when the driver has kicked the queue (an ioeventfd).
    pub kick: EventFd,
}

/// All that a device gets when the driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory, and the shared memory regions of all devices.
    pub memory: GuestMemoryMmap,
    /// The features that both sides agreed on.
    pub features: u64,
    /// The enabled queues, in ascending order of their index. A driver may leave queues out; a device that cannot work
    /// without one fails [`VirtioDevice::activate`].
    pub queues: Vec<ActiveQueue>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not start. The transport answers with DEVICE_NEEDS_RESET; the VM lives on.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot do without.
    #[error("the driver did not enable queue {index}")]
    MissingQueue {
        /// Index of the queue.
        index: u16,
    },
    /// The worker thread or one of its descriptors could not be made.
    #[error("cannot start the worker of the device")]
    Worker(#[source] io::Error),
}

/// A virtio device as the transport sees it.
pub trait VirtioDevice: AnySnapshot + Send + fmt::Debug {
    /// Its type.
    fn device_type(&self) -> DeviceType;

    /// Feature bits that the device offers, without those that the transport adds for all (VIRTIO_F_VERSION_1,
    /// VIRTIO_F_RING_EVENT_IDX).
    fn features(&self) -> u64;

    /// Greatest size of each queue, by index: also the number of queues. Powers of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the device-specific configuration space at `offset`. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the device-specific configuration space. Most devices have nothing that a driver may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The device's shared memory region 0 (2.10), if it has one. Always the same.
    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        None
    }

    /// Starts serving the queues, from the positions that they hold: a new queue's are zero, one that was paused or
    /// restored goes on where it stopped. Called after each DRIVER_OK and after each [`Self::pause`], never while active.
    ///
    /// A kick may have been lost while nobody served, so each queue is drained once at the start.
    ///
    /// # Errors
    /// When the device cannot work with what the driver configured, or the worker cannot be started.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving and hands the queues back. Requests that were popped are answered first (or remembered in the
    /// device's own state); the rest of the device stays as it is, ready to be saved or activated again. Empty while
    /// inactive.
    fn pause(&mut self) -> Vec<ActiveQueue>;

    /// Stops serving, gives up memory and queues, and returns to the state after `new`. Does nothing while inactive.
    fn reset(&mut self);
}
