//! Devices that come and go, with a guest that the test plays, and without KVM.

use std::fs::File;
use std::sync::mpsc::{Receiver, channel};

use vm_memory::GuestAddress;

use super::*;
use crate::bus::BusDevice;
use crate::kvm::testing::FakeHypervisor;
use crate::pci::Ecam;
use crate::workshop::Workshop;

/// Registers of [`crate::platform::slots`].
const COME: u64 = 0;
const TO_GO: u64 = 1;
const LET_GO: u64 = 2;

/// Offsets in configuration space, and in the BAR.
const COMMAND: u64 = 0x04;
const MSIX_CONTROL: u64 = 0x42;
const MSIX_TABLE: u64 = 0x4000;

struct Scene {
    slots: Arc<Slots>,
    hypervisor: Arc<FakeHypervisor>,
    workshop: Workshop,
}

impl Scene {
    /// With a disk from the start, in slot 0.
    fn new() -> Self {
        let hypervisor = Arc::new(FakeHypervisor::default());
        let ranges = [(GuestAddress(0), 1 << 20)];
        let site = Site {
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            interrupts: Interrupts::new(hypervisor.clone()),
            hypervisor: hypervisor.clone(),
            setup: |_| Ok(()),
            max_vcpus: 1,
        };
        let slots = Slots::new(site, EventFd::new(libc::EFD_NONBLOCK).unwrap());
        slots.add_disk(config("first"), file()).unwrap();
        Self {
            slots: Arc::new(slots),
            hypervisor,
            workshop: Workshop::open(|| Ok(())).unwrap(),
        }
    }

    fn plug(&self, serial: &str) -> Result<(), Error> {
        let config = DeviceConfig::Disk(config(serial));
        self.slots.plug(config, vec![file()])
    }

    /// Asks the guest to let go of a disk.
    fn unplug(&self, serial: &str) -> Result<Receiver<Result<(), Error>>, Error> {
        let (sender, done) = channel();
        let orders = self.workshop.orders();
        self.slots
            .unplug(&id(serial), orders, move |result| {
                sender.send(result).unwrap();
            })
            .map(|()| done)
    }

    fn read(&self, register: u64) -> u8 {
        let mut data = [0];
        self.slots.registers.read(register, &mut data);
        data[0]
    }

    fn let_go(&self, slot: u8) {
        self.slots.registers.write(LET_GO, &[slot]);
    }

    fn ecam(&self) -> Ecam {
        Ecam(Arc::clone(&self.slots.bus))
    }

    /// The vendor of the function in a slot.
    fn vendor(&self, slot: u8) -> u16 {
        let mut data = [0; 2];
        self.ecam().read(u64::from(slot) << 15, &mut data);
        u16::from_le_bytes(data)
    }

    /// Has a function use a vector, as a driver does.
    fn use_interrupt(&self, slot: u8) {
        let config = u64::from(slot) << 15;
        self.ecam().write(config + COMMAND, &[6, 0]);
        let window = crate::pci::MemoryWindow(Arc::clone(&self.slots.bus));
        let offset = u64::from(first_bar(slot)) - crate::layout::PCI_WINDOW_32.start;
        window.write(offset + MSIX_TABLE, &0xfee0_0000_u64.to_le_bytes());
        window.write(offset + MSIX_TABLE + 12, &0_u32.to_le_bytes());
        self.ecam()
            .write(config + MSIX_CONTROL, &0x8000_u16.to_le_bytes());
    }
}

fn config(serial: &str) -> DiskConfig {
    DiskConfig {
        serial: serial.to_owned(),
        read_only: false,
    }
}

fn id(serial: &str) -> DeviceId {
    DeviceId::Disk {
        serial: serial.to_owned(),
    }
}

fn file() -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    file.into()
}

fn counters(slots: &Slots) -> BTreeMap<String, u64> {
    let mut counters = BTreeMap::new();
    slots.collect(&mut counters);
    counters
}

#[test]
fn disk_comes_and_goes_with_all_that_it_has() {
    let scene = Scene::new();
    let counted = counters(&scene.slots).len();
    for _ in 0..3 {
        assert_eq!(scene.vendor(1), 0xffff);
        scene.plug("data").unwrap();
        assert_eq!((scene.read(COME), scene.read(COME)), (1, 0xff));
        assert_eq!(scene.vendor(1), 0x1af4);
        scene.use_interrupt(1);
        assert_eq!(scene.hypervisor.irqfds().len(), 1);
        assert_eq!(counters(&scene.slots).len(), 2 * counted);

        let done = scene.unplug("data").unwrap();
        assert_eq!((scene.read(TO_GO), scene.read(TO_GO)), (1, 0xff));
        assert_eq!(
            scene.vendor(1),
            0x1af4,
            "it is there until the guest lets go"
        );
        scene.let_go(1);
        assert_eq!(scene.vendor(1), 0xffff);
        done.recv().unwrap().unwrap();
        assert!(scene.hypervisor.irqfds().is_empty());
        assert_eq!(counters(&scene.slots).len(), counted);
    }
}

#[test]
fn descriptor_is_closed_when_the_removal_is_done() {
    let scene = Scene::new();
    let file = file();
    // A lock that the open file description holds, and gives up with its last descriptor.
    let held = File::open(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&file)
    ));
    let probe = held.unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let lock = || rustix::fs::flock(&probe, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    let config = DeviceConfig::Disk(config("data"));
    scene.slots.plug(config, vec![file]).unwrap();
    let done = scene.unplug("data").unwrap();
    assert!(lock().is_err());
    scene.let_go(1);
    done.recv().unwrap().unwrap();
    lock().unwrap();
}

#[test]
fn guest_that_lets_go_unasked_changes_nothing() {
    let scene = Scene::new();
    scene.plug("data").unwrap();
    for slot in [0, 1, 2, 31, 0xff] {
        scene.let_go(slot);
    }
    assert_eq!((scene.vendor(0), scene.vendor(1)), (0x1af4, 0x1af4));
    scene.unplug("data").unwrap();
    scene.let_go(0);
    assert_eq!((scene.vendor(0), scene.vendor(1)), (0x1af4, 0x1af4));
}

#[test]
fn removal_that_is_given_up_leaves_the_disk_and_can_be_asked_again() {
    let scene = Scene::new();
    scene.plug("data").unwrap();
    let done = scene.unplug("data").unwrap();
    let pending = scene.unplug("data").unwrap_err();
    assert!(matches!(pending, Error::RemovalPending { .. }), "{pending}");
    scene.slots.keep(&id("data"));
    let kept = done.recv().unwrap().unwrap_err();
    assert_eq!(
        kept.to_string(),
        "the guest does not let go of the disk \"data\""
    );
    // The guest's answer comes late.
    scene.let_go(1);
    assert_eq!(scene.vendor(1), 0x1af4);
    let done = scene.unplug("data").unwrap();
    scene.let_go(1);
    done.recv().unwrap().unwrap();
    // And too late for this.
    scene.slots.keep(&id("data"));
}

#[test]
fn only_what_was_added_is_removed() {
    let scene = Scene::new();
    let fixed = scene.unplug("first").unwrap_err();
    assert!(matches!(fixed, Error::DeviceIsFixed { .. }), "{fixed}");
    let unknown = scene.unplug("second").unwrap_err();
    assert_eq!(unknown.to_string(), "the VM has no disk \"second\"");
}

#[test]
fn serial_of_another_disk_and_a_full_bus_are_refused() {
    let scene = Scene::new();
    assert!(matches!(scene.plug("first"), Err(Error::Config(_))));
    let no_file = DeviceConfig::Disk(config("data"));
    assert!(scene.slots.plug(no_file, Vec::new()).is_err());
    for slot in 1..SLOTS {
        scene.plug(&slot.to_string()).unwrap();
    }
    assert!(matches!(scene.plug("more"), Err(Error::PciBusFull)));
    let done = scene.unplug("5").unwrap();
    scene.let_go(5);
    done.recv().unwrap().unwrap();
    scene.plug("more").unwrap();
    assert_eq!(scene.vendor(5), 0x1af4);
}

#[test]
fn interrupts_are_given_back() {
    let scene = Scene::new();
    // More often than there are GSIs, with two vectors each.
    for _ in 0..3000 {
        scene.plug("data").unwrap();
        let done = scene.unplug("data").unwrap();
        scene.let_go(1);
        done.recv().unwrap().unwrap();
    }
}

#[test]
fn added_disks_survive_save_and_restore() {
    let before = Scene::new();
    before.plug("one").unwrap();
    before.plug("two").unwrap();
    assert_eq!(before.read(COME), 1);
    let done = before.unplug("one").unwrap();
    before.let_go(1);
    done.recv().unwrap().unwrap();
    let state = serde_json::to_string(&before.slots.save()).unwrap();
    let state = || -> SlotsState { serde_json::from_str(&state).unwrap() };
    let added: Vec<_> = state().late().cloned().collect();
    assert_eq!(added, [DeviceConfig::Disk(config("two"))]);

    for files in [0, 2] {
        let files = (0..files).map(|_| file()).collect();
        assert!(Scene::new().slots.restore(state(), files).is_err());
    }
    let after = Scene::new();
    after.slots.restore(state(), vec![file()]).unwrap();
    assert_eq!((after.vendor(1), after.vendor(2)), (0xffff, 0x1af4));
    assert_eq!((after.read(COME), after.read(COME)), (2, 0xff));
    let done = after.unplug("two").unwrap();
    after.let_go(2);
    done.recv().unwrap().unwrap();
}

#[test]
fn vm_that_ends_while_a_removal_is_pending_leaks_nothing() {
    let Scene {
        slots, workshop, ..
    } = {
        let scene = Scene::new();
        scene.plug("data").unwrap();
        scene.unplug("data").unwrap();
        scene
    };
    drop(workshop);
    let weak = Arc::downgrade(&slots);
    drop(slots);
    assert!(weak.upgrade().is_none());
}
