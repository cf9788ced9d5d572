//! Status and interrupts of a function: what the device's thread and the vCPUs share.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::{STATUS_DRIVER_OK, STATUS_NEEDS_RESET};
use crate::pci::msix::Msix;
use crate::virtio::Interrupt;

/// A vector that sends nothing (4.1.4.3).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// Status and interrupts: shared with the device's thread.
#[derive(Debug)]
pub(super) struct Signals {
    pub(super) msix: Msix,
    pub(super) status: AtomicU8,
    pub(super) isr: AtomicU8,
    pub(super) config_generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
}

impl Signals {
    /// For a function with `queues` queues.
    pub(super) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            config_generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// What the driver gets that asks for a vector.
    pub(super) fn vector_for(&self, requested: u16) -> u16 {
        // One vector for each queue and one for the configuration; what is not there reads back as none (4.1.5.1.2.1).
        if usize::from(requested) <= self.queue_vectors.len() {
            requested
        } else {
            NO_VECTOR
        }
    }

    /// As after [`Self::new`], but for the table of MSI-X, which is PCI's.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.msix.drop_calls();
    }

    /// The driver asks for a vector for queue `index`.
    pub(super) fn set_queue_vector(&self, index: u16, requested: u16) {
        if let Some(own) = self.queue_vectors.get(usize::from(index)) {
            let vector = self.vector_for(requested);
            own.store(vector, Ordering::Release);
            self.msix.move_call(index, vector);
        }
    }
}

impl Interrupt for Signals {
    fn queue(&self, index: u16) {
        let Some(vector) = self.queue_vectors.get(usize::from(index)) else {
            return;
        };
        if !self.msix.raise(vector.load(Ordering::Acquire)) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
    }

    fn call(&self, index: u16) -> io::Result<EventFd> {
        let vector = self
            .queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire));
        self.msix.call(index, vector)
    }

    fn config_change(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.raise(self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self) {
        let before = self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
        // Only a driver that has said DRIVER_OK is told (2.1.2).
        if before & STATUS_DRIVER_OK != 0 {
            self.config_change();
        }
    }
}
