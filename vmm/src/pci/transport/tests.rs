//! The transport as a driver sees it, without KVM.

use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicU8, AtomicUsize};

use serde_json::json;

use super::*;
use crate::kvm::testing::FakeHypervisor;
use crate::snapshot::Snapshot;
use crate::virtio::{DeviceType, SharedMemory};

const BAR: u32 = 0xc000_0000;
const OFFERED: u64 = 1 << 5;

/// What the test sees of the device inside the transport.
#[derive(Debug, Default)]
struct Seen {
    active: StdMutex<Option<Activation>>,
    activations: AtomicUsize,
    resets: AtomicUsize,
    written: StdMutex<Vec<(u64, Vec<u8>)>>,
    refuse: AtomicU8,
}

#[derive(Debug)]
struct FakeDevice {
    seen: Arc<Seen>,
    value: u32,
    region: Option<Arc<SharedMemory>>,
}

impl VirtioDevice for FakeDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset.to_le_bytes()[0]);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.seen
            .written
            .lock()
            .unwrap()
            .push((offset, data.to_vec()));
    }

    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        self.region.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.seen.activations.fetch_add(1, Ordering::Relaxed);
        if self.seen.refuse.load(Ordering::Relaxed) != 0 {
            return Err(ActivateError::MissingQueue { index: 0 });
        }
        *self.seen.active.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let activation = self.seen.active.lock().unwrap().take();
        activation.map_or_else(Vec::new, |activation| activation.queues)
    }

    fn reset(&mut self) {
        self.seen.resets.fetch_add(1, Ordering::Relaxed);
        self.pause();
    }
}

impl Snapshot for FakeDevice {
    type State = u32;

    fn save(&self) -> u32 {
        self.value
    }

    fn restore(&mut self, state: u32) -> Result<(), RestoreError> {
        self.value = state;
        Ok(())
    }
}

/// A driver in front of a function.
struct Driver {
    function: VirtioPci,
    seen: Arc<Seen>,
    hypervisor: Arc<FakeHypervisor>,
}

impl Driver {
    fn new() -> Self {
        Self::with_region(None)
    }

    fn with_region(region: Option<Arc<SharedMemory>>) -> Self {
        let hypervisor = Arc::new(FakeHypervisor::default());
        let seen = Arc::new(Seen::default());
        let function = VirtioPci::new(
            Box::new(FakeDevice {
                seen: Arc::clone(&seen),
                value: 7,
                region,
            }),
            BAR,
            crate::memory::allocate(32, 32).unwrap(),
            &Interrupts::new(hypervisor.clone()),
            hypervisor.clone(),
        )
        .unwrap();
        function.write_config(COMMAND, &[6, 0]);
        Self {
            function,
            seen,
            hypervisor,
        }
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.function.read_window(offset, &mut data);
        data
    }

    fn read_config<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut data = [0xee; N];
        self.function.read_config(offset, &mut data);
        data
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.write_window(offset, data);
    }

    fn status(&self) -> u8 {
        self.read::<1>(COMMON + 0x14)[0]
    }

    fn set_status(&self, status: u8) {
        self.write(COMMON + 0x14, &[status]);
    }

    fn set_features(&self, features: u64) {
        for (select, half) in [(0u32, features), (1, features >> 32)] {
            self.write(COMMON + 0x08, &select.to_le_bytes());
            self.write(COMMON + 0x0c, &half.to_le_bytes()[..4]);
        }
    }

    fn negotiate(&self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.set_features(features);
        self.set_status(ACKNOWLEDGE | DRIVER | STATUS_FEATURES_OK);
    }

    fn set_queue(&self, index: u16, size: u16, base: u64) {
        self.write(COMMON + 0x16, &index.to_le_bytes());
        self.write(COMMON + 0x18, &size.to_le_bytes());
        for (field, address) in [
            (0x20, base),
            (0x28, base.wrapping_add(0x1000)),
            (0x30, base.wrapping_add(0x2000)),
        ] {
            self.write(COMMON + field, &address.to_le_bytes()[..4]);
            self.write(COMMON + field + 4, &address.to_le_bytes()[4..]);
        }
        self.write(COMMON + 0x1c, &[1, 0]);
    }

    fn start(&self) {
        self.set_status(ALL_OK);
    }

    /// All the way, with both queues.
    fn bring_up(&self) {
        self.negotiate(VERSION_1 | OFFERED);
        self.set_queue(0, 16, 0x1_0000);
        self.set_queue(1, 8, 0x2_0000);
        self.start();
        assert_eq!(self.status(), ALL_OK);
    }

    /// Offset of a virtio capability in configuration space.
    fn capability(&self, kind: u8) -> usize {
        let mut at = usize::from(self.read_config::<1>(0x34)[0]);
        while at != 0 {
            let [id, next, _, cap_kind] = self.read_config(at);
            if id == 9 && cap_kind == kind {
                return at;
            }
            at = next.into();
        }
        panic!("no capability of kind {kind}");
    }
}

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const ALL_OK: u8 = ACKNOWLEDGE | DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

#[test]
fn a_driver_brings_the_device_up() {
    let driver = Driver::new();
    driver.write(COMMON, &1u32.to_le_bytes());
    assert_eq!(driver.read::<4>(COMMON + 4), [1, 0, 0, 0], "VERSION_1");
    driver.write(COMMON, &0u32.to_le_bytes());
    assert_eq!(
        u32::from_le_bytes(driver.read(COMMON + 4)),
        u32::try_from(OFFERED | EVENT_IDX).unwrap()
    );
    driver.write(COMMON, &2u32.to_le_bytes());
    assert_eq!(driver.read::<4>(COMMON + 4), [0; 4]);
    assert_eq!(driver.read::<2>(COMMON + 0x12), [2, 0], "queues");

    driver.negotiate(VERSION_1 | EVENT_IDX);
    driver.set_queue(1, 4, 0x1_0000);
    driver.start();
    assert_eq!(driver.status(), ALL_OK);
    let active = driver.seen.active.lock().unwrap();
    let active = active.as_ref().unwrap();
    assert_eq!(active.features, VERSION_1 | EVENT_IDX);
    let [queue] = active.queues.as_slice() else {
        panic!("one queue was enabled");
    };
    assert_eq!((queue.index, queue.queue.size()), (1, 4));
    assert!(queue.queue.event_idx_enabled());
    assert_eq!(queue.queue.used_ring(), 0x1_2000);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let driver = Driver::new();
    driver.negotiate(VERSION_1 | 1 << 6);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.start();
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "and it cannot start");
    assert_eq!(driver.seen.activations.load(Ordering::Relaxed), 0);
}

#[test]
fn a_legacy_driver_is_refused() {
    let driver = Driver::new();
    driver.negotiate(OFFERED);
    assert_eq!(driver.status() & STATUS_FEATURES_OK, 0);
}

#[test]
fn features_are_fixed_once_accepted() {
    let driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_features(VERSION_1 | OFFERED);
    driver.start();
    let active = driver.seen.active.lock().unwrap();
    assert_eq!(active.as_ref().unwrap().features, VERSION_1);
}

#[test]
fn queues_that_are_none_ask_for_a_reset() {
    let ends_of_memory = 32 << 20;
    for (size, base) in [
        (0, 0x1_0000),
        (3, 0x1_0000),
        (32, 0x1_0000),
        (16, 0x1_0008),
        (16, ends_of_memory),
        (16, u64::MAX - 15),
    ] {
        let driver = Driver::new();
        driver.negotiate(VERSION_1);
        driver.set_queue(0, size, base);
        driver.start();
        assert_eq!(
            driver.status(),
            ALL_OK | STATUS_NEEDS_RESET,
            "size {size} at {base:#x}"
        );
        assert_eq!(driver.seen.activations.load(Ordering::Relaxed), 0);
        assert!(driver.hypervisor.doorbells().is_empty());
    }
}

#[test]
fn a_device_that_refuses_asks_for_a_reset() {
    let driver = Driver::new();
    driver.seen.refuse.store(1, Ordering::Relaxed);
    driver.negotiate(VERSION_1);
    driver.set_queue(0, 16, 0x1_0000);
    driver.start();
    assert_eq!(driver.status(), ALL_OK | STATUS_NEEDS_RESET);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    driver.seen.refuse.store(0, Ordering::Relaxed);
    driver.bring_up();
}

#[test]
fn a_reset_starts_over() {
    let driver = Driver::new();
    driver.bring_up();
    driver.write(COMMON + 0x10, &[1, 0]);
    driver.write(COMMON + 0x1a, &[2, 0]);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    assert!(driver.seen.active.lock().unwrap().is_none());
    assert!(driver.hypervisor.doorbells().is_empty());
    assert_eq!(driver.read::<2>(COMMON + 0x10), [0xff, 0xff]);
    assert_eq!(driver.read::<2>(COMMON + 0x18), [16, 0]);
    assert_eq!(driver.read::<2>(COMMON + 0x1c), [0, 0]);
    driver.bring_up();
    assert_eq!(driver.seen.activations.load(Ordering::Relaxed), 2);
}

#[test]
fn the_driver_cannot_take_status_bits_back_or_set_ours() {
    let driver = Driver::new();
    driver.bring_up();
    driver.set_status(ACKNOWLEDGE);
    assert_eq!(driver.status(), ALL_OK);
    driver.set_status(ALL_OK | STATUS_NEEDS_RESET);
    assert_eq!(driver.status(), ALL_OK);
    assert_eq!(driver.seen.activations.load(Ordering::Relaxed), 1);
}

#[test]
fn queues_are_fixed_while_active() {
    let driver = Driver::new();
    driver.bring_up();
    driver.write(COMMON + 0x16, &[0, 0]);
    driver.write(COMMON + 0x18, &[4, 0]);
    driver.write(COMMON + 0x20, &[0xff; 4]);
    assert_eq!(driver.read::<2>(COMMON + 0x18), [16, 0]);
    assert_eq!(driver.read::<4>(COMMON + 0x20), 0x1_0000u32.to_le_bytes());
}

#[test]
fn a_queue_that_is_not_there_reads_as_zero() {
    let driver = Driver::new();
    driver.write(COMMON + 0x16, &[2, 0]);
    for field in [0x18, 0x1c, 0x1e] {
        assert_eq!(driver.read::<2>(COMMON + field), [0, 0]);
    }
    driver.set_queue(2, 16, 0x1_0000);
    driver.write(COMMON + 0x1a, &[0, 0]);
    assert_eq!(driver.read::<2>(COMMON + 0x1a), [0xff, 0xff]);
}

#[test]
fn a_vector_that_is_not_there_reads_back_as_none() {
    let driver = Driver::new();
    for (vector, expected) in [(0u16, 0u16), (2, 2), (3, NO_VECTOR), (NO_VECTOR, NO_VECTOR)] {
        driver.write(COMMON + 0x10, &vector.to_le_bytes());
        assert_eq!(driver.read::<2>(COMMON + 0x10), expected.to_le_bytes());
        driver.write(COMMON + 0x1a, &vector.to_le_bytes());
        assert_eq!(driver.read::<2>(COMMON + 0x1a), expected.to_le_bytes());
    }
}

#[test]
fn doorbells_follow_the_bar() {
    let driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_queue(1, 8, 0x1_0000);
    driver.start();
    let doorbell = u64::from(BAR) + NOTIFY + u64::from(NOTIFY_MULTIPLIER);
    assert_eq!(driver.hypervisor.doorbells(), [doorbell], "of queue 1 only");
    driver.function.write_config(COMMAND, &[0, 0]);
    assert!(driver.hypervisor.doorbells().is_empty());
    driver
        .function
        .write_config(BAR0, &0xd000_0000u32.to_le_bytes());
    driver.function.write_config(COMMAND, &[6, 0]);
    assert_eq!(
        driver.hypervisor.doorbells(),
        [0xd000_0000 + NOTIFY + u64::from(NOTIFY_MULTIPLIER)]
    );
    // Over the local APICs: not forwarded by the host bridge.
    driver
        .function
        .write_config(BAR0, &0xfee0_0000u32.to_le_bytes());
    assert!(driver.hypervisor.doorbells().is_empty());
}

#[test]
fn a_doorbell_works_by_an_exit_too() {
    let driver = Driver::new();
    driver.bring_up();
    driver.write(NOTIFY + u64::from(NOTIFY_MULTIPLIER), &[1, 0]);
    driver.write(NOTIFY + 0xffc, &[1, 0]);
    let active = driver.seen.active.lock().unwrap();
    let queues = &active.as_ref().unwrap().queues;
    assert_eq!(queues[1].kick.read().unwrap(), 1);
    assert!(queues[0].kick.read().is_err());
}

#[test]
fn kicks_do_not_outlive_a_reset() {
    let driver = Driver::new();
    driver.bring_up();
    driver.write(NOTIFY, &[0, 0]);
    driver.set_status(0);
    driver.bring_up();
    let active = driver.seen.active.lock().unwrap();
    assert!(active.as_ref().unwrap().queues[0].kick.read().is_err());
}

#[test]
fn a_configuration_change_is_told_and_counted() {
    let driver = Driver::new();
    driver.bring_up();
    let generation = driver.read::<1>(COMMON + 0x15)[0];
    let interrupt = driver
        .seen
        .active
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .interrupt
        .clone();
    interrupt.config_change();
    assert_eq!(driver.read::<1>(COMMON + 0x15)[0], generation + 1);
    interrupt.queue(0);
    assert_eq!(driver.read::<1>(ISR), [0b11], "without MSI-X the ISR tells");
    assert_eq!(driver.read::<1>(ISR), [0], "reading clears it");
    interrupt.queue(99);
    interrupt.needs_reset();
    assert_eq!(driver.status(), ALL_OK | STATUS_NEEDS_RESET);
    assert_eq!(driver.read::<1>(ISR), [0b10]);
}

#[test]
fn the_device_configuration_is_the_devices() {
    let driver = Driver::new();
    assert_eq!(driver.read::<2>(DEVICE + 0x10), [0x10, 0x10]);
    driver.write(DEVICE + 4, &[1, 2, 3]);
    assert_eq!(*driver.seen.written.lock().unwrap(), [(4, vec![1, 2, 3])]);
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let driver = Driver::new();
    let at = driver.capability(5);
    let set = |offset: u32, len: u32| {
        driver
            .function
            .write_config(at + PCI_CAP_OFFSET, &offset.to_le_bytes());
        driver
            .function
            .write_config(at + PCI_CAP_LENGTH, &len.to_le_bytes());
    };
    set(0x14, 1);
    driver
        .function
        .write_config(at + PCI_CAP_DATA, &[ACKNOWLEDGE]);
    assert_eq!(driver.status(), ACKNOWLEDGE);
    assert_eq!(driver.read_config::<4>(at + PCI_CAP_DATA), [1, 0, 0, 0]);
    // Misaligned, of no register's size, past the end.
    for (offset, len) in [(0x15, 2), (0, 3), (0, 8), (BAR_SIZE, 4), (u32::MAX, 1)] {
        set(offset, len);
        driver.function.write_config(at + PCI_CAP_DATA, &[0xff; 4]);
        driver.read_config::<4>(at + PCI_CAP_DATA);
    }
    set(0x14, 1);
    driver.function.write_config(at + PCI_CAP_BAR, &[1]);
    driver.function.write_config(at + PCI_CAP_DATA, &[0]);
    assert_eq!(driver.status(), ACKNOWLEDGE, "there is no BAR 1");
}

#[test]
fn capabilities_describe_structures_inside_of_the_bar() {
    let driver = Driver::new();
    for kind in 1..=4 {
        let at = driver.capability(kind);
        assert_eq!(driver.read_config::<1>(at + 4), [0], "BAR");
        let offset = u32::from_le_bytes(driver.read_config(at + 8));
        let len = u32::from_le_bytes(driver.read_config(at + 12));
        assert!(len > 0 && offset + len <= BAR_SIZE);
    }
    let notify = driver.capability(2);
    assert_eq!(driver.read_config::<1>(notify + 2), [20]);
    assert_eq!(
        driver.read_config::<4>(notify + 16),
        NOTIFY_MULTIPLIER.to_le_bytes()
    );
}

#[test]
fn a_shared_memory_region_is_described_where_it_is() {
    const LEN: u64 = 6 << 20;
    const AT: u64 = 0x10_0000_0000;
    let region = SharedMemory::new(vm_memory::GuestAddress(AT), LEN).unwrap();
    let driver = Driver::with_region(Some(Arc::new(region)));
    let at = driver.capability(8);
    assert_eq!(driver.read_config::<1>(at + 2), [24], "length");
    assert_eq!(driver.read_config::<2>(at + 4), [2, 0], "BAR and id");
    let half = |offset: usize| u64::from(u32::from_le_bytes(driver.read_config(at + offset)));
    assert_eq!(half(8) | half(16) << 32, 0, "offset");
    assert_eq!(half(12) | half(20) << 32, LEN);
    let bar = || u64::from_le_bytes(driver.read_config(BAR0 + 8));
    assert_eq!(bar(), AT | 0b1100);
    // As Linux finds out its size.
    driver.function.write_config(COMMAND, &[0, 0]);
    driver.function.write_config(BAR0 + 8, &[0xff; 8]);
    assert_eq!(bar(), !((8 << 20) - 1) | 0b1100);
}

#[test]
fn a_device_without_a_region_has_no_second_bar() {
    let driver = Driver::new();
    driver.function.write_config(BAR0 + 8, &[0xff; 8]);
    assert_eq!(driver.read_config::<8>(BAR0 + 8), [0; 8]);
}

#[test]
fn every_access_of_every_width_is_harmless() {
    let driver = Driver::new();
    driver.bring_up();
    for offset in (0..u64::from(BAR_SIZE)).step_by(1) {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0xff; len];
            driver.function.read_window(offset, &mut data);
            if offset / PAGE != DEVICE / PAGE {
                driver.function.write_window(offset, &vec![0xff; len]);
            }
        }
    }
    for offset in 0..4096 {
        for len in [1, 2, 4, 8] {
            driver.function.read_config(offset, &mut vec![0; len]);
            driver.function.write_config(offset, &vec![0xff; len]);
        }
    }
}

#[test]
fn a_paused_device_goes_on_where_it_was() {
    let driver = Driver::new();
    driver.bring_up();
    {
        let mut active = driver.seen.active.lock().unwrap();
        let queue = &mut active.as_mut().unwrap().queues[1].queue;
        queue.set_next_avail(5);
        queue.set_next_used(3);
    }
    driver.function.pause();
    assert!(driver.seen.active.lock().unwrap().is_none());
    driver.function.resume();
    let active = driver.seen.active.lock().unwrap();
    let queue = &active.as_ref().unwrap().queues[1].queue;
    assert_eq!((queue.next_avail(), queue.next_used()), (5, 3));
}

#[test]
fn state_survives_save_and_restore() {
    let driver = Driver::new();
    driver.bring_up();
    driver.write(COMMON + 0x10, &[0, 0]);
    driver.write(MSIX_TABLE, &0xfee0_0000u64.to_le_bytes());
    driver.seen.active.lock().unwrap().as_mut().unwrap().queues[0]
        .queue
        .set_next_avail(9);
    driver.function.pause();
    let state = driver.function.save();
    let text = serde_json::to_string(&state).unwrap();

    let other = Driver::new();
    other
        .function
        .restore(serde_json::from_str(&text).unwrap())
        .unwrap();
    assert_eq!(other.function.save(), state);
    other.function.resume();
    assert_eq!(other.status(), ALL_OK);
    assert_eq!(other.hypervisor.doorbells().len(), 2);
    let active = other.seen.active.lock().unwrap();
    let active = active.as_ref().unwrap();
    assert_eq!(active.features, VERSION_1 | OFFERED);
    assert_eq!(active.queues[0].queue.next_avail(), 9);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let driver = Driver::new();
    driver.bring_up();
    driver.function.pause();
    let good = serde_json::to_value(driver.function.save()).unwrap();
    let changes: [fn(&mut serde_json::Value); 6] = [
        |state| state["config"][2] = json!(0),
        |state| state["registers"]["driver_features"] = json!(u64::MAX),
        |state| {
            state["registers"]["queues"].as_array_mut().unwrap().pop();
        },
        |state| {
            state["queue_vectors"].as_array_mut().unwrap().pop();
        },
        |state| {
            state["msix"]["entries"].as_array_mut().unwrap().pop();
        },
        |state| state["device"] = json!("no number"),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let fresh = Driver::new();
        let state = serde_json::from_value(state).unwrap();
        assert!(fresh.function.restore(state).is_err(), "change {index}");
    }
}

#[test]
fn a_call_raises_the_vector_that_the_driver_has_chosen_for_its_queue() {
    let driver = Driver::new();
    for vector in 0..3 {
        let entry = MSIX_TABLE + vector * 16;
        driver.write(entry, &0xfee0_0000u64.to_le_bytes());
        driver.write(entry + 8, &0x31u64.to_le_bytes());
    }
    let control = driver.function.lock().msix_capability + 2;
    driver.function.write_config(control, &[0, 0x80]);
    let own = [24, 25, 26];
    assert_eq!(driver.hypervisor.irqfds(), own);

    let choose = |queue: u16, vector: u16| {
        driver.write(COMMON + 0x16, &queue.to_le_bytes());
        driver.write(COMMON + 0x1a, &vector.to_le_bytes());
    };
    let with = |more: &[u32]| {
        let mut gsis = [&own, more].concat();
        gsis.sort_unstable();
        gsis
    };
    choose(0, 1);
    choose(1, 2);
    driver.bring_up();
    let call = |queue| {
        let active = driver.seen.active.lock().unwrap();
        active.as_ref().unwrap().interrupt.call(queue)
    };
    let _first = call(0).unwrap();
    let _second = call(1).unwrap();
    assert_eq!(driver.hypervisor.irqfds(), with(&[25, 26]));
    // While the device is active, too: there is no rule against it.
    choose(1, 0);
    assert_eq!(driver.hypervisor.irqfds(), with(&[24, 25]));
    choose(0, NO_VECTOR);
    assert_eq!(driver.hypervisor.irqfds(), with(&[24]));
    driver.function.write_config(control, &[0, 0]);
    assert_eq!(driver.hypervisor.irqfds(), own);
    driver.function.write_config(control, &[0, 0x80]);
    assert_eq!(driver.hypervisor.irqfds(), with(&[24]));
    driver.set_status(0);
    assert_eq!(driver.hypervisor.irqfds(), own);
}

#[test]
fn queue_memory_of_a_restored_state_is_checked_again() {
    let driver = Driver::new();
    driver.bring_up();
    driver.function.pause();
    let mut state = driver.function.save();
    state.registers.queues[0].descriptors = !0xf;
    let other = Driver::new();
    other.function.restore(state).unwrap();
    other.function.resume();
    assert_eq!(other.status(), ALL_OK | STATUS_NEEDS_RESET);
}
