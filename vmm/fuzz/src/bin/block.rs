//! Requests of virtio-blk on a disk of 1 MiB, all of them in flight at the same time, by io_uring where the machine has it.
//! `to` is the sector, and beyond 240 the body begins with it.
#![no_main]

use std::io::Write;

use husk_vmm::devices::block::{BlockConfig, BlockDevice, REQUEST_QUEUE};
use husk_vmm::virtio::VirtioDevice;
use husk_vmm::virtio::testing::{Buffer, Driver};
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
    let records = records(data);
    for record in &records {
        let (sector, body) = match record.body.split_first_chunk::<8>() {
            Some((sector, rest)) if record.to >= SECTOR_IN_BODY => {
                (u64::from_le_bytes(*sector), rest)
            }
            _ => (record.to.into(), record.body),
        };
        let kind = u64::from(record.kind).to_le_bytes();
        let header = [kind, sector.to_le_bytes()].concat();
        let request = [
            Buffer::read(&header),
            Buffer::read(body),
            Buffer::write(record.room),
            Buffer::write(1),
        ];
        driver.make_available(REQUEST_QUEUE, &request);
        driver.kick_if_wanted(REQUEST_QUEUE);
    }
    for _ in &records {
        driver.wait_any_used(REQUEST_QUEUE);
    }
    device.reset();
    let len = file.metadata().expect("it is there").len();
    assert_eq!(len, DISK_LEN as u64, "the disk has another size");
});
