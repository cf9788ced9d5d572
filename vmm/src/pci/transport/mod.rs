//! Virtio over PCI (virtio 1.3, 4.1): one function with a BAR of registers, modern only. A device that has a shared memory
//! region has it in a second BAR, which stays where it is: a driver that moves the BAR finds nothing there. So Linux sizes
//! BARs and switches their decoding off and on without a change of the VM's memory.
//!
//! ```text
//! reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK: the device is activated
//!   ▲          (features)   (queues)                   │  on failure, or later by the device: DEVICE_NEEDS_RESET
//!   └──────────────────────── 0 written to status ─────┘
//! ```
//!
//! All that the driver writes is checked here: a device sees negotiated features that it offered and queues that lie in
//! memory, or is not activated. What breaks the rules is ignored, as hardware would.

mod capabilities;
mod registers;
mod signals;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::capabilities::{PCI_CAP_BAR, PCI_CAP_DATA, PCI_CAP_LENGTH, PCI_CAP_OFFSET};
use self::registers::{QueueRegisters, Registers, half_of, set_half, write_queue};
use self::signals::{NO_VECTOR, Signals};
use super::bus::PciFunction;
use super::config_space::{BAR0, COMMAND, ConfigSpace, Identity, Window};
use super::msix::{Msix, MsixState};
use crate::error::Error;
use crate::irq::Interrupts;
use crate::kvm::Hypervisor;
use crate::snapshot::RestoreError;
use crate::virtio::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};

/// PCI identity (4.1.2): vendor, and the device id of type 0.
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// No transitional device.
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x40;
/// No class of PCI says more than the device id does.
const CLASS: [u8; 3] = [0xff, 0, 0];

/// The BAR, a page for each structure. What it must hold for the most queues fits each page.
pub(super) const BAR_SIZE: u32 = 0x8000;
const PAGE: u64 = 0x1000;
pub(super) const COMMON: u64 = 0;
pub(super) const ISR: u64 = PAGE;
pub(super) const DEVICE: u64 = 2 * PAGE;
pub(super) const NOTIFY: u64 = 3 * PAGE;
pub(super) const MSIX_TABLE: u64 = 4 * PAGE;
const MSIX_PENDING: u64 = 5 * PAGE;
const COMMON_LEN: u32 = 0x38;
const ISR_LEN: u32 = 1;
/// Bytes between the doorbells of two queues, so that each has its own ioeventfd.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

const STATUS_DRIVER_OK: u8 = low_byte(VIRTIO_CONFIG_S_DRIVER_OK);
const STATUS_FEATURES_OK: u8 = low_byte(VIRTIO_CONFIG_S_FEATURES_OK);
const STATUS_NEEDS_RESET: u8 = low_byte(VIRTIO_CONFIG_S_NEEDS_RESET);

/// Features that this transport gives every device.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

const fn low_byte(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// Why the device was not activated.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {index} does not lie in memory, or is misaligned or of a wrong size")]
    InvalidQueue { index: u16 },
    #[error("cannot copy the descriptor of a doorbell")]
    Doorbell(#[source] std::io::Error),
    #[error("the device refuses")]
    Device(#[from] ActivateError),
}

/// What one vCPU at a time may change.
#[derive(Debug)]
struct Function {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    msix_capability: usize,
    pci_capability: usize,
    registers: Registers,
    active: bool,
    /// Where the ioeventfds of the enabled queues are, while there are any.
    doorbells: Option<u64>,
}

/// A virtio device on the PCI bus.
#[derive(Debug)]
pub(crate) struct VirtioPci {
    function: Mutex<Function>,
    window: Window,
    signals: Arc<Signals>,
    /// Written by the guest through an ioeventfd, or by us for a doorbell that has none; by queue.
    kicks: Vec<EventFd>,
    memory: GuestMemoryMmap,
    hypervisor: Arc<dyn Hypervisor>,
}

/// The state of a virtio device on the PCI bus, the device's own included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VirtioPciState {
    config: Vec<u8>,
    msix: MsixState,
    registers: Registers,
    status: u8,
    isr: u8,
    config_generation: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    device: serde_json::Value,
}

impl VirtioPci {
    /// Puts a device behind the transport, with its BAR at `bar`.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        bar: u32,
        memory: GuestMemoryMmap,
        interrupts: &Arc<Interrupts>,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<Self, Error> {
        let queues = device.queue_max_sizes().len();
        let vectors = queues + 1;
        let signals = Signals::new(Msix::new(interrupts, vectors)?, queues);
        let kicks = (0..queues)
            .map(|_| EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))
            .collect::<Result<_, _>>()
            .map_err(Error::EventFd)?;
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.device_type() as u16,
            revision: REVISION,
            class: CLASS,
            subsystem: SUBSYSTEM,
        });
        config.set_memory_bar(bar, BAR_SIZE);
        let msix_capability = capabilities::add_msix(&mut config, vectors);
        let pci_capability = capabilities::add_virtio(&mut config, queues);
        if let Some(region) = device.shared_memory() {
            let len = region.len();
            config.set_memory_bar_64(region.at().0, len.next_power_of_two());
            capabilities::add_shared_memory(&mut config, len);
        }
        Ok(Self {
            function: Mutex::new(Function {
                registers: Registers::new(device.queue_max_sizes()),
                device,
                config,
                msix_capability,
                pci_capability,
                active: false,
                doorbells: None,
            }),
            window: Window::new(BAR_SIZE.into()),
            signals: Arc::new(signals),
            kicks,
            memory,
            hypervisor,
        })
    }

    /// Stops the device where it stands, while the vCPUs are paused. [`Self::resume`] goes on.
    pub(crate) fn pause(&self) {
        let mut function = self.lock();
        if !std::mem::take(&mut function.active) {
            return;
        }
        for active in function.device.pause() {
            if let Some(registers) = function.registers.queues.get_mut(usize::from(active.index)) {
                registers.next_available = active.queue.next_avail();
                registers.next_used = active.queue.next_used();
            }
        }
    }

    /// Goes on after [`Self::pause`] or a restore: activates the device if its driver had.
    pub(crate) fn resume(&self) {
        let mut function = self.lock();
        let status = self.signals.status.load(Ordering::Acquire);
        if status & STATUS_DRIVER_OK != 0 && status & STATUS_NEEDS_RESET == 0 && !function.active {
            self.start(&mut function);
        }
    }

    /// Copies the state of the paused device.
    pub(crate) fn save(&self) -> VirtioPciState {
        let function = self.lock();
        let signals = &self.signals;
        VirtioPciState {
            config: function.config.save(),
            msix: signals.msix.save(),
            registers: function.registers.clone(),
            status: signals.status.load(Ordering::Acquire),
            isr: signals.isr.load(Ordering::Acquire),
            config_generation: signals.config_generation.load(Ordering::Acquire),
            config_vector: signals.config_vector.load(Ordering::Acquire),
            queue_vectors: signals
                .queue_vectors
                .iter()
                .map(|vector| vector.load(Ordering::Acquire))
                .collect(),
            device: function.device.save_value(),
        }
    }

    /// Puts a state into a new device. [`Self::resume`] lets it run.
    pub(crate) fn restore(&self, state: VirtioPciState) -> Result<(), RestoreError> {
        let wrong = |reason: &str| RestoreError {
            device: "virtio-pci function",
            reason: reason.to_owned(),
        };
        let mut function = self.lock();
        let queues = function.registers.queues.len();
        if state.registers.queues.len() != queues || state.queue_vectors.len() != queues {
            return Err(wrong("it has another number of queues"));
        }
        let offered = self.offered(&function);
        if state.registers.driver_features & !offered != 0 {
            return Err(wrong(
                "its driver uses features that this device does not offer",
            ));
        }
        function.device.restore_value(state.device)?;
        function
            .config
            .restore(&state.config)
            .ok_or_else(|| wrong("its configuration space is another device's"))?;
        let signals = &self.signals;
        signals
            .msix
            .restore(&state.msix)
            .ok_or_else(|| wrong("it has another number of interrupt vectors"))?;
        signals.status.store(state.status, Ordering::Release);
        signals.isr.store(state.isr, Ordering::Release);
        signals
            .config_generation
            .store(state.config_generation, Ordering::Release);
        signals
            .config_vector
            .store(signals.vector_for(state.config_vector), Ordering::Release);
        for (queue, saved) in (0..).zip(state.queue_vectors) {
            signals.set_queue_vector(queue, saved);
        }
        function.registers = state.registers;
        self.window.place(function.config.bar_address());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Function> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self, function: &Function) -> u64 {
        function.device.features() | TRANSPORT_FEATURES
    }

    fn status(&self) -> u8 {
        self.signals.status.load(Ordering::Acquire)
    }

    /// The driver has written device status (2.1, 4.1.4.3).
    fn set_status(&self, function: &mut Function, value: u8) {
        let before = self.status();
        if value == 0 {
            self.reset(function);
            return;
        }
        // Bits are only ever added; DEVICE_NEEDS_RESET is ours.
        let mut added = value & !before & !STATUS_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 && !self.accepts_features(function) {
            added &= !STATUS_FEATURES_OK;
        }
        let starts = added & STATUS_DRIVER_OK != 0;
        if starts && (before | added) & STATUS_FEATURES_OK == 0 {
            added &= !STATUS_DRIVER_OK;
        }
        self.signals.status.fetch_or(added, Ordering::AcqRel);
        if added & STATUS_DRIVER_OK != 0 {
            self.start(function);
        }
    }

    /// Whether the driver's choice of features is one that the device can work with (2.2.2).
    fn accepts_features(&self, function: &Function) -> bool {
        let chosen = function.registers.driver_features;
        chosen & !self.offered(function) == 0 && chosen & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// Activates the device, or asks the driver for a reset.
    fn start(&self, function: &mut Function) {
        if let Err(err) = self.try_start(function) {
            log::warn!(
                "the guest's driver cannot start its {:?} device: {}",
                function.device.device_type(),
                crate::error::chain(&err)
            );
            self.unbind_doorbells(function);
            self.signals.needs_reset();
        }
    }

    fn try_start(&self, function: &mut Function) -> Result<(), StartError> {
        let features = function.registers.driver_features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        let max_sizes = function.device.queue_max_sizes();
        for (index, (registers, max_size)) in
            (0u16..).zip(function.registers.queues.iter().zip(max_sizes))
        {
            if !registers.enabled {
                continue;
            }
            let queue = registers
                .build(*max_size, event_idx, &self.memory)
                .ok_or(StartError::InvalidQueue { index })?;
            let kick = self.kicks[usize::from(index)]
                .try_clone()
                .map_err(StartError::Doorbell)?;
            queues.push(ActiveQueue { index, queue, kick });
        }
        self.bind_doorbells(function);
        function.device.activate(Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.signals.clone(),
        })?;
        function.active = true;
        Ok(())
    }

    fn reset(&self, function: &mut Function) {
        function.device.reset();
        function.active = false;
        self.unbind_doorbells(function);
        for kick in &self.kicks {
            // Whatever is left in it was for queues that are gone; an empty one has nothing to read.
            let _ = kick.read();
        }
        function.registers = Registers::new(function.device.queue_max_sizes());
        self.signals.reset();
    }

    /// Lets KVM turn the guest's notifications into events without an exit, where the BAR is now. A doorbell that KVM
    /// refuses still works, by an exit.
    fn bind_doorbells(&self, function: &mut Function) {
        self.unbind_doorbells(function);
        let Some(base) = self.window.place(function.config.bar_address()) else {
            return;
        };
        function.doorbells = Some(base);
        for (kick, address) in self.doorbells(function, base) {
            if let Err(err) = self.hypervisor.bind_doorbell(kick, address) {
                log::warn!("KVM refuses the doorbell at {address:#x}, it costs an exit: {err}");
            }
        }
    }

    fn unbind_doorbells(&self, function: &mut Function) {
        let Some(base) = function.doorbells.take() else {
            return;
        };
        for (kick, address) in self.doorbells(function, base) {
            if let Err(err) = self.hypervisor.unbind_doorbell(kick, address) {
                log::warn!("KVM does not let go of the doorbell at {address:#x}: {err}");
            }
        }
    }

    /// Kick and address of each enabled queue.
    fn doorbells(&self, function: &Function, base: u64) -> Vec<(&EventFd, u64)> {
        (0u64..)
            .zip(&self.kicks)
            .zip(&function.registers.queues)
            .filter(|(_, registers)| registers.enabled)
            .map(|((index, kick), _)| (kick, base + NOTIFY + index * u64::from(NOTIFY_MULTIPLIER)))
            .collect()
    }

    /// The guest has changed the BAR or the command register: follows it.
    fn move_window(&self, function: &mut Function) {
        let base = self.window.place(function.config.bar_address());
        if function.active && function.doorbells != base {
            self.bind_doorbells(function);
        }
    }

    fn read_common(&self, function: &mut Function, offset: u64, data: &mut [u8]) {
        let offered = self.offered(function);
        let max_sizes = function.registers.queues.len();
        let generation = self.signals.config_generation.load(Ordering::Acquire);
        let registers = &mut function.registers;
        let select = registers.queue_select;
        let queue = registers.queue().copied();
        let part = |value: u64, high: bool| {
            if high {
                value >> 32
            } else {
                value & 0xffff_ffff
            }
        };
        let of_queue = |field: fn(&QueueRegisters) -> u64| queue.as_ref().map_or(0, field);
        let value: u64 = match (offset, data.len()) {
            (0x00, 4) => registers.device_feature_select.into(),
            (0x04, 4) => half_of(offered, registers.device_feature_select).into(),
            (0x08, 4) => registers.driver_feature_select.into(),
            (0x0c, 4) => half_of(registers.driver_features, registers.driver_feature_select).into(),
            (0x10, 2) => self.signals.config_vector.load(Ordering::Acquire).into(),
            (0x12, 2) => max_sizes as u64,
            (0x14, 1) => self.status().into(),
            (0x15, 1) => generation.into(),
            (0x16, 2) => select.into(),
            (0x18, 2) => of_queue(|queue| queue.size.into()),
            (0x1a, 2) => self
                .signals
                .queue_vectors
                .get(usize::from(select))
                .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
                .into(),
            (0x1c, 2) => of_queue(|queue| queue.enabled.into()),
            (0x1e, 2) => queue.map_or(0, |_| select.into()),
            (0x20 | 0x24, 4) => part(of_queue(|queue| queue.descriptors), offset == 0x24),
            (0x28 | 0x2c, 4) => part(of_queue(|queue| queue.available), offset == 0x2c),
            (0x30 | 0x34, 4) => part(of_queue(|queue| queue.used), offset == 0x34),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    fn write_common(&self, function: &mut Function, offset: u64, data: &[u8]) {
        let status = self.status();
        let negotiating = status & STATUS_FEATURES_OK == 0;
        let configuring = status & STATUS_DRIVER_OK == 0;
        let registers = &mut function.registers;
        match (offset, data) {
            (0x00, &[a, b, c, d]) => {
                registers.device_feature_select = u32::from_le_bytes([a, b, c, d]);
            }
            (0x08, &[a, b, c, d]) => {
                registers.driver_feature_select = u32::from_le_bytes([a, b, c, d]);
            }
            (0x0c, &[a, b, c, d]) if negotiating => {
                let half = u32::from_le_bytes([a, b, c, d]);
                set_half(
                    &mut registers.driver_features,
                    registers.driver_feature_select,
                    half,
                );
            }
            (0x10, &[a, b]) => {
                let vector = self.signals.vector_for(u16::from_le_bytes([a, b]));
                self.signals.config_vector.store(vector, Ordering::Release);
            }
            (0x14, &[value]) => self.set_status(function, value),
            (0x16, &[a, b]) => registers.queue_select = u16::from_le_bytes([a, b]),
            (0x1a, &[a, b]) => {
                let requested = u16::from_le_bytes([a, b]);
                self.signals
                    .set_queue_vector(registers.queue_select, requested);
            }
            _ if configuring => {
                if let Some(queue) = registers.queue() {
                    write_queue(queue, offset, data);
                }
            }
            _ => {}
        }
    }

    /// The window in configuration space to the BAR (4.1.4.9), for a driver that cannot map it.
    fn pci_access(&self, function: &Function) -> Option<(u64, usize)> {
        let at = function.pci_capability;
        let mut bar = [0];
        function.config.read(at + PCI_CAP_BAR, &mut bar);
        let offset = u64::from(function.config.u32(at + PCI_CAP_OFFSET));
        let len = usize::try_from(function.config.u32(at + PCI_CAP_LENGTH)).ok()?;
        let is_register = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64);
        let inside = offset + len as u64 <= BAR_SIZE.into();
        (bar == [0] && is_register && inside).then_some((offset, len))
    }

    fn read_structure(&self, function: &mut Function, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PAGE;
        let at = usize::try_from(within).expect("less than a page");
        match offset - within {
            COMMON => self.read_common(function, within, data),
            ISR if within == 0 => {
                data[0] = self.signals.isr.swap(0, Ordering::AcqRel);
            }
            DEVICE => function.device.read_config(within, data),
            MSIX_TABLE => self.signals.msix.read_table(at, data),
            MSIX_PENDING => self.signals.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write_structure(&self, function: &mut Function, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.write_common(function, within, data),
            DEVICE => function.device.write_config(within, data),
            NOTIFY => self.ring(within),
            MSIX_TABLE => {
                let at = usize::try_from(within).expect("less than a page");
                self.signals.msix.write_table(at, data);
            }
            _ => {}
        }
    }

    /// A doorbell that KVM does not serve.
    fn ring(&self, offset: u64) {
        let index =
            usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).expect("less than a page");
        if let Some(kick) = self.kicks.get(index) {
            // It fails only when the counter is about to overflow: the queue is kicked already.
            let _ = kick.write(1);
        }
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut function = self.lock();
        let window_data = function.pci_capability + PCI_CAP_DATA;
        if offset == window_data
            && let Some((at, len)) = self.pci_access(&function)
            && len <= data.len()
        {
            data.fill(0);
            self.read_structure(&mut function, at, &mut data[..len]);
            return;
        }
        function.config.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut function = self.lock();
        let window_data = function.pci_capability + PCI_CAP_DATA;
        if offset == window_data {
            if let Some((at, len)) = self.pci_access(&function)
                && len <= data.len()
            {
                self.write_structure(&mut function, at, &data[..len]);
            }
            return;
        }
        function.config.write(offset, data);
        let touches = |at: usize, len: usize| offset < at + len && at < offset + data.len();
        if touches(COMMAND, 2) || touches(BAR0, 4) {
            self.move_window(&mut function);
        }
        let msix_control = function.msix_capability + 2;
        if touches(msix_control, 2) {
            self.signals
                .msix
                .set_control(function.config.u16(msix_control));
        }
    }

    fn window(&self) -> &Window {
        &self.window
    }

    fn read_window(&self, offset: u64, data: &mut [u8]) {
        self.read_structure(&mut self.lock(), offset, data);
    }

    fn write_window(&self, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.lock(), offset, data);
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.device.reset();
        self.unbind_doorbells(&mut function);
    }
}
