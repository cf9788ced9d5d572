//! The slots of the PCI bus: which device is in which, and how devices come and go while the guest runs.
//!
//! The devices of the start take the first slots and keep them. Each later one takes the first that is free: it is made by
//! the workshop, put on the bus, and announced ([`SlotRegisters`]). When the guest has let go of a device, the vCPU that says
//! so takes it off the bus, and the workshop takes it apart: its thread, doorbells, interrupts and descriptors.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{Collect, broken};
use crate::config::{DeviceConfig, DeviceId, DiskConfig, NicConfig, format_mac};
use crate::devices::block::{BlockConfig, BlockDevice};
use crate::devices::net::NetDevice;
use crate::error::Error;
use crate::irq::Interrupts;
use crate::kvm::Hypervisor;
use crate::pci::{PciBus, SLOTS, VirtioPci, VirtioPciState, first_bar};
use crate::platform::slots::{Answer, SlotRegisters, SlotState};
use crate::snapshot::RestoreError;
use crate::virtio::VirtioDevice;
use crate::virtio::worker::ThreadSetup;
use crate::vmm::NicFiles;
use crate::workshop::Orders;

/// A device that is not on the bus yet.
pub(super) struct Made {
    device: Box<dyn VirtioDevice>,
    collect: Collect,
    /// Of those that the guest knows by something that no other may have.
    config: Option<DeviceConfig>,
}

impl Made {
    /// With how its counters are read.
    pub(super) fn new(
        device: impl VirtioDevice + 'static,
        collect: impl Fn(&mut BTreeMap<String, u64>) + Send + Sync + 'static,
    ) -> Self {
        Self {
            device: Box::new(device),
            collect: Box::new(collect),
            config: None,
        }
    }
}

/// A device in a slot.
struct Slot {
    /// It came while the guest ran, and may go.
    is_late: bool,
    collect: Collect,
    config: Option<DeviceConfig>,
}

impl Slot {
    fn id(&self) -> Option<DeviceId> {
        self.config.as_ref().map(DeviceConfig::id)
    }
}

/// What devices are made with, and where.
pub(super) struct Site {
    pub(super) memory: GuestMemoryMmap,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    /// Confines the thread of a device.
    pub(super) setup: ThreadSetup,
    /// The most that the VM may have.
    pub(super) max_vcpus: u8,
}

/// The state of all devices on the bus.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SlotsState {
    /// By slot.
    functions: BTreeMap<u8, VirtioPciState>,
    /// Those that came while the guest ran.
    late: BTreeMap<u8, DeviceConfig>,
    registers: SlotState,
}

impl SlotsState {
    /// The devices that came while the guest ran.
    pub(super) fn late(&self) -> impl Iterator<Item = &DeviceConfig> {
        self.late.values()
    }
}

/// The slots.
pub(crate) struct Slots {
    pub(super) bus: Arc<PciBus>,
    pub(super) registers: Arc<SlotRegisters>,
    site: Site,
    slots: Mutex<BTreeMap<u8, Slot>>,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots")
            .field("bus", &self.bus)
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

impl Slots {
    /// All empty. `interrupt` calls the guest's generic event device.
    pub(super) fn new(site: Site, interrupt: EventFd) -> Self {
        Self {
            bus: Arc::default(),
            registers: Arc::new(SlotRegisters::new(interrupt)),
            site,
            slots: Mutex::default(),
        }
    }

    /// Puts a device of the start into the next slot.
    pub(super) fn add(&self, made: Made) -> Result<(), Error> {
        self.put(self.first_free()?, made, false)
    }

    /// Puts a disk of the start into the next slot.
    pub(super) fn add_disk(&self, config: DiskConfig, file: OwnedFd) -> Result<(), Error> {
        self.add(self.site.make_disk(config, file)?)
    }

    /// Puts a network device of the start into the next slot.
    pub(super) fn add_nic(&self, config: NicConfig, files: NicFiles) -> Result<(), Error> {
        self.add(self.site.make_nic(config, files)?)
    }

    /// The first slot that none of the devices of the start has, before the others come.
    pub(super) fn first_late(&self) -> u8 {
        let fixed = self.lock().values().filter(|slot| !slot.is_late).count();
        u8::try_from(fixed).expect("a few slots")
    }

    /// Adds a device to the running VM. Returns when the guest can hear of it.
    pub(crate) fn plug(&self, config: DeviceConfig, files: Vec<OwnedFd>) -> Result<(), Error> {
        let slot = self.first_free()?;
        self.put_late(slot, config, files)?;
        self.registers.announce(slot);
        Ok(())
    }

    /// Asks the guest to let go of a device that came while it ran. `done` is called when all that the device had is closed,
    /// or when it is to be kept, unless the VM ends before.
    pub(crate) fn unplug(
        self: &Arc<Self>,
        device: &DeviceId,
        orders: Orders,
        done: impl FnOnce(Result<(), Error>) + Send + 'static,
    ) -> Result<(), Error> {
        let slot = self.find_late(device)?;
        let slots = Arc::downgrade(self);
        let id = device.clone();
        let on_answer = move |answer| match answer {
            Answer::Kept => done(Err(Error::NotLetGo { device: id })),
            Answer::LetGo => {
                let Some(slots) = slots.upgrade() else {
                    return;
                };
                let function = slots.bus.take(slot);
                let dismantle = move || {
                    drop(function);
                    slots.lock().remove(&slot);
                    done(Ok(()));
                };
                // The VM ends when nobody takes orders, and takes the function with it.
                let _ = orders.post(dismantle);
            }
        };
        if !self.registers.ask_to_go(slot, Box::new(on_answer)) {
            return Err(Error::RemovalPending {
                device: device.clone(),
            });
        }
        Ok(())
    }

    /// Waits no longer for the guest to let go of a device.
    pub(crate) fn keep(&self, device: &DeviceId) {
        if let Ok(slot) = self.find_late(device) {
            self.registers.keep(slot);
        }
    }

    /// Adds every counter of every device, by name.
    pub(super) fn collect(&self, into: &mut BTreeMap<String, u64>) {
        for slot in self.lock().values() {
            (slot.collect)(into);
        }
    }

    pub(super) fn save(&self) -> SlotsState {
        let late = |(number, slot): (&u8, &Slot)| {
            let config = slot.config.clone().filter(|_| slot.is_late)?;
            Some((*number, config))
        };
        SlotsState {
            functions: self
                .bus
                .functions()
                .iter()
                .map(|(slot, function)| (*slot, function.save()))
                .collect(),
            late: self.lock().iter().filter_map(late).collect(),
            registers: self.registers.save(),
        }
    }

    /// Puts a state into the devices of the start, and the others beside them; `files` are the descriptors of those, in the
    /// order of [`SlotsState::late`].
    pub(super) fn restore(&self, state: SlotsState, files: Vec<OwnedFd>) -> Result<(), Error> {
        let wrong = |reason: String| {
            Error::Restore(RestoreError {
                device: "PCI bus",
                reason,
            })
        };
        let mut files = files.into_iter();
        for (slot, config) in state.late {
            if slot >= SLOTS || self.lock().contains_key(&slot) {
                return Err(wrong(format!(
                    "its slot {slot} cannot have a {}",
                    config.id()
                )));
            }
            let files = files.by_ref().take(config.files()).collect();
            self.put_late(slot, config, files)?;
            self.registers.occupy(slot);
        }
        let functions = self.bus.functions();
        if files.next().is_some() || !functions.keys().eq(state.functions.keys()) {
            return Err(wrong(format!(
                "it has {} functions and other descriptors, not {}",
                state.functions.len(),
                functions.len()
            )));
        }
        self.registers.restore(state.registers)?;
        for (slot, state) in state.functions {
            if let Some(function) = functions.get(&slot) {
                function.restore(state)?;
            }
        }
        Ok(())
    }

    /// Makes a device and puts it into an empty slot. The guest does not hear of it.
    fn put_late(&self, slot: u8, config: DeviceConfig, files: Vec<OwnedFd>) -> Result<(), Error> {
        config.validate(files.len())?;
        let id = Some(config.id());
        if self.lock().values().any(|slot| slot.id() == id) {
            return Err(config.taken().into());
        }
        self.put(slot, self.site.make(config, files)?, true)
    }

    fn put(&self, slot: u8, made: Made, is_late: bool) -> Result<(), Error> {
        let Site {
            memory,
            interrupts,
            hypervisor,
            ..
        } = &self.site;
        let Made {
            device,
            collect,
            config,
        } = made;
        let function = VirtioPci::new(
            device,
            first_bar(slot),
            memory.clone(),
            interrupts,
            Arc::clone(hypervisor),
        )?;
        self.bus.put(slot, function);
        let taken = Slot {
            is_late,
            collect,
            config,
        };
        self.lock().insert(slot, taken);
        Ok(())
    }

    fn first_free(&self) -> Result<u8, Error> {
        let slots = self.lock();
        (0..SLOTS)
            .find(|slot| !slots.contains_key(slot))
            .ok_or(Error::PciBusFull)
    }

    fn find_late(&self, device: &DeviceId) -> Result<u8, Error> {
        let slots = self.lock();
        let found = slots
            .iter()
            .find(|(_, slot)| slot.id().as_ref() == Some(device));
        let device = || device.clone();
        match found {
            None => Err(Error::NoSuchDevice { device: device() }),
            Some((_, slot)) if !slot.is_late => Err(Error::DeviceIsFixed { device: device() }),
            Some((number, _)) => Ok(*number),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Site {
    /// Makes a device from a description that was checked with its descriptors.
    fn make(&self, config: DeviceConfig, files: Vec<OwnedFd>) -> Result<Made, Error> {
        let mut files = files.into_iter();
        match config {
            DeviceConfig::Disk(disk) => {
                let file = files.next().expect("one was counted");
                self.make_disk(disk, file)
            }
            DeviceConfig::Nic(nic) => {
                let taps = files.by_ref().take(nic.queue_pairs.into()).collect();
                let vhost = files.collect();
                self.make_nic(nic, NicFiles { taps, vhost })
            }
        }
    }

    fn make_disk(&self, config: DiskConfig, file: OwnedFd) -> Result<Made, Error> {
        let serial = config.serial.clone();
        let block = BlockConfig::new(serial.clone(), config.read_only)
            .map(|config| config.for_vcpus(self.max_vcpus))
            .and_then(|config| BlockDevice::new(config, file, self.setup))
            .map_err(|err| broken(&format!("block {serial:?}"), err))?;
        let metrics = block.metrics();
        let collect = move |into: &mut _| metrics.collect(&serial, into);
        Ok(Made {
            config: Some(DeviceConfig::Disk(config)),
            ..Made::new(block, collect)
        })
    }

    fn make_nic(&self, config: NicConfig, files: NicFiles) -> Result<Made, Error> {
        let address = format_mac(&config.mac);
        let net = NetDevice::new(&config, files, self.setup)
            .map_err(|err| broken(&format!("network ({address})"), err))?;
        let metrics = net.metrics();
        let collect = move |into: &mut _| metrics.collect(&address, into);
        Ok(Made {
            config: Some(DeviceConfig::Nic(config)),
            ..Made::new(net, collect)
        })
    }
}

#[cfg(test)]
mod tests;
