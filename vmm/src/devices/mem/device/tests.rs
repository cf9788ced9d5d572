//! The device through a driver that the test plays.

use super::*;
use crate::virtio::testing::Driver;

/// Within the driver's memory.
const BASE: u64 = 64 << 20;
const RANGE: Range<u64> = BASE..BASE + 16 * BLOCK_SIZE;

const ACK: u16 = Answer::Ack as u16;
const NACK: u16 = Answer::Nack as u16;
const ERROR: u16 = Answer::Error as u16;

fn device() -> MemDevice {
    MemDevice::new(RANGE, |_| Ok(())).unwrap()
}

fn request(kind: u16, addr: u64, nb_blocks: u16) -> Vec<u8> {
    let request = Request {
        kind: kind.into(),
        addr: addr.into(),
        nb_blocks: nb_blocks.into(),
        ..Default::default()
    };
    request.as_slice().to_vec()
}

/// Sends a request; returns the answer and the state.
fn ask(driver: &mut Driver, kind: u16, addr: u64, nb_blocks: u16) -> (u16, u16) {
    let request = request(kind, addr, nb_blocks);
    let used = driver.request(REQUEST_QUEUE, &[&request], &[size_of::<Response>()]);
    assert_eq!(used.written, 10);
    let response = Response::from_slice(&used.bytes).unwrap();
    (response.kind.to_native(), response.state.to_native())
}

fn config(device: &MemDevice) -> [u64; 7] {
    std::array::from_fn(|index| {
        let mut field = [0; 8];
        device.read_config(index as u64 * 8, &mut field);
        u64::from_le_bytes(field)
    })
}

#[test]
fn layouts_are_those_of_the_specification() {
    assert_eq!(size_of::<Config>(), 56);
    assert_eq!(size_of::<Request>(), 24);
    assert_eq!(size_of::<Response>(), 10);
}

#[test]
fn driver_reads_what_it_shall_use_and_is_told_of_changes() {
    let mut device = device();
    let size = 16 * BLOCK_SIZE;
    assert_eq!(config(&device), [BLOCK_SIZE, 0, BASE, size, size, 0, 0]);
    let handle = device.handle();
    handle.request(BLOCK_SIZE);
    let mut driver = Driver::activate(&mut device);
    assert_eq!(driver.interrupt.config_changes(), 0);
    handle.request(3 * BLOCK_SIZE);
    handle.request(3 * BLOCK_SIZE);
    assert_eq!(driver.interrupt.config_changes(), 1);
    assert_eq!(ask(&mut driver, PLUG, BASE, 2), (ACK, 0));
    assert_eq!(config(&device)[5..], [2 * BLOCK_SIZE, 3 * BLOCK_SIZE]);
    assert_eq!(handle.plugged(), 2 * BLOCK_SIZE);
}

#[test]
fn requests_are_answered_by_the_rules() {
    let mut device = device();
    let mut driver = Driver::activate(&mut device);
    assert_eq!(ask(&mut driver, PLUG, BASE, 1), (NACK, 0));
    device.handle().request(4 * BLOCK_SIZE);
    assert_eq!(ask(&mut driver, PLUG, BASE, 4), (ACK, 0));
    assert_eq!(ask(&mut driver, PLUG, BASE, 1), (ERROR, 0));
    assert_eq!(ask(&mut driver, STATE, BASE, 4), (ACK, 0));
    assert_eq!(ask(&mut driver, STATE, BASE, 5), (ACK, 2));
    assert_eq!(ask(&mut driver, STATE, BASE, 17), (ERROR, 0));
    assert_eq!(ask(&mut driver, UNPLUG, BASE, 1), (ACK, 0));
    assert_eq!(ask(&mut driver, STATE, BASE, 1), (ACK, 1));
    assert_eq!(ask(&mut driver, 4, BASE, 1), (ERROR, 0));
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(device.handle().plugged(), 0);
    assert_eq!(device.metrics().refused.get(), 3);
}

#[test]
fn unplugged_memory_is_given_back_and_its_neighbour_kept() {
    let mut device = device();
    let mut driver = Driver::activate(&mut device);
    device.handle().request(2 * BLOCK_SIZE);
    ask(&mut driver, PLUG, BASE, 2);
    driver.fill(BASE, usize::try_from(2 * BLOCK_SIZE).unwrap(), 7);
    ask(&mut driver, UNPLUG, BASE + BLOCK_SIZE, 1);
    assert_eq!(driver.bytes_at(BASE + BLOCK_SIZE - 1, 2), [7, 0]);
    ask(&mut driver, UNPLUG_ALL, 0, 0);
    assert_eq!(driver.bytes_at(BASE, 2), [0, 0]);
}

#[test]
fn hostile_chains_are_returned_and_serving_goes_on() {
    let mut device = device();
    let metrics = device.metrics();
    let mut driver = Driver::activate(&mut device);
    for chain in driver.hostile_chains() {
        assert_eq!(driver.submit_raw(REQUEST_QUEUE, &chain).written, 0);
    }
    let whole = request(UNPLUG_ALL, 0, 0);
    for (sent, room) in [(&whole[..23], 10), (&whole[..], 9), (&whole[..], 0)] {
        let room: &[usize] = if room == 0 { &[] } else { &[room] };
        assert_eq!(driver.request(REQUEST_QUEUE, &[sent], room).written, 0);
    }
    assert!(metrics.bad_chains.get() > 3);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
}

#[test]
fn plugged_memory_outlives_reset_and_restore() {
    let mut device = device();
    let mut driver = Driver::activate(&mut device);
    device.handle().request(2 * BLOCK_SIZE);
    ask(&mut driver, PLUG, BASE + BLOCK_SIZE, 2);
    device.reset();
    assert_eq!(device.handle().plugged(), 2 * BLOCK_SIZE);
    let mut restored = self::device();
    restored.restore(device.save()).unwrap();
    assert_eq!(config(&restored), config(&device));
    let mut small = MemDevice::new(BASE..BASE + BLOCK_SIZE, |_| Ok(())).unwrap();
    assert!(small.restore(device.save()).is_err());
    let mut driver = Driver::activate(&mut restored);
    assert_eq!(ask(&mut driver, UNPLUG, BASE + BLOCK_SIZE, 2), (ACK, 0));
}
