//! Requests of virtio-blk on a disk of 1 MiB. `to` is the sector, and beyond 240 the body begins with it.
#![no_main]

use std::io::Write;

use husk_vmm::devices::block::{BlockConfig, BlockDevice, REQUEST_QUEUE};
use husk_vmm::virtio::VirtioDevice;
use husk_vmm::virtio::testing::Driver;
use husk_vmm_fuzz::records;
use libfuzzer_sys::fuzz_target;

const DISK_LEN: usize = 1 << 20;
const SECTOR_IN_BODY: u8 = 240;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&vec![0xaa; DISK_LEN]).expect("a disk");
    let disk = file.try_clone().expect("a descriptor").into();
    let config = BlockConfig::new("fuzz".to_owned(), false).expect("a serial number");
    let mut device = BlockDevice::new(config, disk, |_| Ok(())).expect("a device");
    let mut driver = Driver::activate(&mut device);
    for record in records(data) {
        let (sector, body) = match record.body.split_first_chunk::<8>() {
            Some((sector, rest)) if record.to >= SECTOR_IN_BODY => {
                (u64::from_le_bytes(*sector), rest)
            }
            _ => (record.to.into(), record.body),
        };
        let kind = u64::from(record.kind).to_le_bytes();
        let header = [kind, sector.to_le_bytes()].concat();
        driver.request(REQUEST_QUEUE, &[&header, body], &[record.room, 1]);
    }
    device.reset();
    let len = file.metadata().expect("it is there").len();
    assert_eq!(len, DISK_LEN as u64, "the disk has another size");
});
