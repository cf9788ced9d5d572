//! What the guest's processors are connected to: the address spaces with every device of the VM in its place.

mod slots;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::bus::Buses;
use crate::changes::Changes;
use crate::config::{DeviceConfig, ShareConfig, ShareProtocol, VmConfig};
use crate::devices::balloon::BalloonDevice;
use crate::devices::console::ConsoleDevice;
use crate::devices::fs::{FsDevice, Share, Tag};
use crate::devices::mem::{MemDevice, MemHandle};
use crate::devices::p9::P9Device;
use crate::devices::rng::RngDevice;
use crate::devices::vhost_fs::VhostFsDevice;
use crate::devices::vsock::{VsockConfig, VsockDevice, VsockHandle};
use crate::end::End;
use crate::error::Error;
use crate::irq::Interrupts;
use crate::kvm::Hypervisor;
use crate::layout::{
    ECAM_BASE, ECAM_SIZE, HOTPLUG_GSI, HOTPLUG_PORTS, PCI_WINDOW_32, POWER_PORTS, PVPANIC_PORTS,
    SERIAL_GSI, SERIAL_PORTS, SLOT_PORTS,
};
use crate::pci::{Ecam, MemoryWindow};
use crate::platform::hotplug::{HotplugRegisters, HotplugState};
use crate::platform::power::PowerRegisters;
use crate::platform::pvpanic::PanicNotifier;
use crate::platform::serial::{SerialPort, SerialState};
use crate::vcpu::VcpuSetup;
use crate::virtio::SharedMemory;
use crate::virtio::worker::ThreadSetup;
use crate::vmm::NicFiles;

pub(crate) use self::slots::Slots;
use self::slots::{Made, Site, SlotsState};

/// What the devices are made from.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) config: &'a VmConfig,
    /// The guest's console.
    pub(crate) console: File,
    /// One for each disk of the configuration.
    pub(crate) disks: Vec<File>,
    /// One for each network device of the configuration.
    pub(crate) nics: Vec<NicFiles>,
    /// One for each file server of the configuration.
    pub(crate) file_servers: Vec<OwnedFd>,
    /// What devices may read and write: the guest's memory, and the windows.
    pub(crate) memory: GuestMemoryMmap,
    /// One for each share of the configuration that has one.
    pub(crate) windows: Vec<Option<Arc<SharedMemory>>>,
    /// The part of the memory that may be plugged in while the guest runs.
    pub(crate) pluggable: Range<u64>,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) end: &'a Arc<End>,
    /// Confines the thread of a device.
    pub(crate) setup: ThreadSetup,
    /// Confines the thread that watches a shared folder.
    pub(crate) watch_setup: VcpuSetup,
    /// Confines the thread of a device whose requests another process serves.
    pub(crate) front_end_setup: ThreadSetup,
}

/// The state of all devices. The panic notifier and the power registers have none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BoardState {
    serial: SerialState,
    hotplug: HotplugState,
    slots: SlotsState,
}

impl BoardState {
    /// The devices that were added while the guest ran.
    pub(crate) fn added(&self) -> impl Iterator<Item = &DeviceConfig> {
        self.slots.late()
    }
}

/// Adds the counters of one device to all.
type Collect = Box<dyn Fn(&mut BTreeMap<String, u64>) + Send + Sync>;

/// The devices of a VM.
pub(crate) struct Board {
    pub(crate) buses: Arc<Buses>,
    serial: Arc<SerialPort>,
    hotplug: Arc<HotplugRegisters>,
    mem: Option<MemHandle>,
    slots: Arc<Slots>,
    vsock: VsockHandle,
    changes: Arc<Changes>,
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board")
            .field("buses", &self.buses)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl Board {
    /// Makes all devices. `on_ready` is called, on the thread of the socket device, when the guest connects to the ready
    /// port.
    pub(crate) fn new(
        parts: Parts<'_>,
        on_ready: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Error> {
        let interrupts = Interrupts::new(Arc::clone(&parts.hypervisor));
        let mut buses = Buses::default();
        let (serial, hotplug) = add_platform_devices(&mut buses, &parts, &interrupts)?;

        let site = Site {
            memory: parts.memory.clone(),
            interrupts,
            hypervisor: Arc::clone(&parts.hypervisor),
            setup: parts.setup,
            max_vcpus: parts.config.max_vcpus,
        };
        let slots = Slots::new(site, hotplug.interrupt()?);
        let changes = Arc::default();
        let (vsock, mem) = add_virtio_devices(&slots, parts, &changes, on_ready)?;
        buses.ports.attach(SLOT_PORTS, slots.registers.clone())?;
        buses.mmio.attach(
            ECAM_BASE..ECAM_BASE + ECAM_SIZE,
            Arc::new(Ecam(Arc::clone(&slots.bus))),
        )?;
        buses.mmio.attach(
            PCI_WINDOW_32,
            Arc::new(MemoryWindow(Arc::clone(&slots.bus))),
        )?;
        Ok(Self {
            buses: Arc::new(buses),
            serial,
            hotplug,
            mem,
            slots: Arc::new(slots),
            vsock,
            changes,
        })
    }

    /// What others have changed in the shared folder that is watched.
    pub(crate) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Where devices come and go.
    pub(crate) fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// The first PCI slot for devices that are added later.
    pub(crate) fn first_late_slot(&self) -> u8 {
        self.slots.first_late()
    }

    /// The way to open connections into the guest.
    pub(crate) fn vsock(&self) -> VsockHandle {
        self.vsock.clone()
    }

    /// Tells the guest that it shall have this many vCPUs; KVM has them.
    pub(crate) fn resize_vcpus(&self, vcpus: u8) {
        self.hotplug.resize(vcpus);
    }

    /// Tells the guest that it shall use `size` bytes of the memory that may be plugged in.
    pub(crate) fn resize_memory(&self, size: u64) {
        // Without the device there is nothing that could be plugged in.
        if let Some(mem) = &self.mem {
            mem.request(size);
        }
    }

    /// Stops all devices where they stand. The vCPUs are paused.
    pub(crate) fn pause(&self) {
        for function in self.slots.bus.functions().values() {
            function.pause();
        }
    }

    /// Goes on after [`Self::pause`] or [`Self::restore`].
    pub(crate) fn resume(&self) {
        for function in self.slots.bus.functions().values() {
            function.resume();
        }
    }

    /// Copies the state of the paused devices.
    pub(crate) fn save(&self) -> BoardState {
        BoardState {
            serial: self.serial.save(),
            hotplug: self.hotplug.save(),
            slots: self.slots.save(),
        }
    }

    /// Puts a state into new devices; `added` are the descriptors of those that [`BoardState::added`] names.
    pub(crate) fn restore(&self, state: BoardState, added: Vec<OwnedFd>) -> Result<(), Error> {
        self.serial.restore(state.serial)?;
        self.hotplug.restore(state.hotplug)?;
        self.slots.restore(state.slots, added)
    }

    /// Adds every counter, by name.
    pub(crate) fn collect(&self, into: &mut BTreeMap<String, u64>) {
        let serial = self.serial.metrics();
        for (name, counter) in [
            ("serial_bytes", &serial.bytes),
            ("serial_lost_bytes", &serial.lost_bytes),
        ] {
            into.insert(name.to_owned(), counter.load(Ordering::Relaxed));
        }
        into.insert("vcpus".to_owned(), self.hotplug.vcpus() as u64);
        if let Some(mem) = &self.mem {
            mem.collect(into);
        }
        self.slots.collect(into);
    }
}

/// Serial port, panic notifier, registers for power and hot-plug.
fn add_platform_devices(
    buses: &mut Buses,
    parts: &Parts<'_>,
    interrupts: &Interrupts,
) -> Result<(Arc<SerialPort>, Arc<HotplugRegisters>), Error> {
    let out = parts
        .console
        .try_clone()
        .map_err(|err| broken("serial", err))?;
    let serial = Arc::new(SerialPort::new(interrupts.pin(SERIAL_GSI)?, out));
    let notifier = Arc::new(PanicNotifier::new(Arc::clone(parts.end)));
    let hotplug = Arc::new(HotplugRegisters::new(
        parts.config.vcpus,
        parts.config.max_vcpus,
        interrupts.pin(HOTPLUG_GSI)?,
    ));
    let power = Arc::new(PowerRegisters::new(Arc::clone(parts.end)));
    buses.ports.attach(SERIAL_PORTS, serial.clone())?;
    buses.ports.attach(PVPANIC_PORTS, notifier)?;
    buses.ports.attach(POWER_PORTS, power)?;
    buses.ports.attach(HOTPLUG_PORTS, hotplug.clone())?;
    Ok((serial, hotplug))
}

/// The device of a shared folder, for so many vCPUs.
fn make_share(
    share: &ShareConfig,
    window: Option<Arc<SharedMemory>>,
    vcpus: u8,
    setup: ThreadSetup,
    watch: (VcpuSetup, &Arc<Changes>),
) -> Result<Made, Error> {
    let name = format!("file system ({})", share.tag);
    let tag = Tag::try_from(share.tag.clone()).map_err(|err| broken(&name, err))?;
    let label = share.tag.clone();
    let writeback = matches!(
        share.protocol,
        ShareProtocol::Fuse {
            writeback: true,
            ..
        }
    );
    let mut exported =
        Share::new(&share.path, share.cache, writeback).map_err(|err| broken(&name, err))?;
    if let Some(window) = window {
        exported
            .set_window(window)
            .map_err(|err| broken(&name, err))?;
    }
    Ok(match share.protocol {
        ShareProtocol::Fuse { .. } => {
            let mut fs =
                FsDevice::new(tag, exported, vcpus, setup).map_err(|err| broken(&name, err))?;
            if let Some(config) = &share.watch {
                let (setup, changes) = watch;
                fs.watch(config.clone(), Arc::clone(changes), setup)
                    .map_err(|err| broken(&name, err))?;
            }
            let metrics = fs.metrics();
            Made::new(fs, move |into| metrics.collect(&label, into))
        }
        ShareProtocol::P9 => {
            let p9 = P9Device::new(tag, exported, setup).map_err(|err| broken(&name, err))?;
            let metrics = p9.metrics();
            Made::new(p9, move |into| metrics.collect(&label, into))
        }
    })
}

/// Every virtio device of the configuration. Returns the ways to open connections into the guest, and to plug in memory.
fn add_virtio_devices(
    slots: &Slots,
    parts: Parts<'_>,
    changes: &Arc<Changes>,
    on_ready: impl FnOnce() + Send + 'static,
) -> Result<(VsockHandle, Option<MemHandle>), Error> {
    let Parts {
        config,
        setup,
        watch_setup,
        pluggable,
        windows,
        front_end_setup,
        ..
    } = parts;

    // The console first: the guest's kernel can say what is wrong with the others.
    let console =
        ConsoleDevice::new(parts.console.into(), setup).map_err(|err| broken("console", err))?;
    let metrics = console.metrics();
    slots.add(Made::new(console, move |into| metrics.collect(into)))?;

    let rng = RngDevice::new(setup).map_err(|err| broken("rng", err))?;
    let metrics = rng.metrics();
    slots.add(Made::new(rng, move |into| metrics.collect(into)))?;

    let vsock = VsockConfig::new(config.guest_cid, config.ready_port)
        .and_then(|config| VsockDevice::new(config, on_ready, setup))
        .map_err(|err| broken("vsock", err))?;
    let metrics = vsock.metrics();
    let vsock_handle = vsock.handle();
    slots.add(Made::new(vsock, move |into| metrics.collect(into)))?;

    for (share, window) in config.shares.iter().zip(windows) {
        let watch = (watch_setup, changes);
        slots.add(make_share(share, window, config.max_vcpus, setup, watch)?)?;
    }

    for (server, socket) in config.file_servers.iter().zip(parts.file_servers) {
        let name = format!("file system ({})", server.tag);
        let device = Tag::try_from(server.tag.clone())
            .map_err(|err| broken(&name, err))
            .and_then(|tag| {
                let end = Arc::clone(parts.end);
                VhostFsDevice::new(tag, socket, config.max_vcpus, end, front_end_setup)
                    .map_err(|err| broken(&name, err))
            })?;
        // What it serves is for the server to count.
        slots.add(Made::new(device, |_| ()))?;
    }

    for (disk, file) in config.disks.iter().zip(parts.disks) {
        slots.add_disk(disk.clone(), file.into())?;
    }

    for (nic, files) in config.nics.iter().zip(parts.nics) {
        slots.add_nic(nic.clone(), files)?;
    }

    let balloon = BalloonDevice::new(setup).map_err(|err| broken("balloon", err))?;
    let metrics = balloon.metrics();
    slots.add(Made::new(balloon, move |into| metrics.collect(into)))?;

    if pluggable.is_empty() {
        return Ok((vsock_handle, None));
    }
    let mem = MemDevice::new(pluggable, setup).map_err(|err| broken("memory", err))?;
    let metrics = mem.metrics();
    let mem_handle = mem.handle();
    slots.add(Made::new(mem, move |into| metrics.collect(into)))?;
    Ok((vsock_handle, Some(mem_handle)))
}

fn broken(device: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Device {
        device: device.to_owned(),
        source: source.into(),
    }
}
