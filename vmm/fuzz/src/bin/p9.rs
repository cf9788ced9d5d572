//! 9P messages, through the 9P device. The guest has agreed on the version, and fid 0 stands for the root.
#![no_main]

use husk_vmm::config::CachePolicy;
use husk_vmm::devices::fs::{Share, Tag};
use husk_vmm::devices::p9::{P9Device, REQUEST_QUEUE};
use husk_vmm::virtio::VirtioDevice;
use husk_vmm::virtio::testing::Driver;
use husk_vmm_fuzz::{Folder, records};
use libfuzzer_sys::fuzz_target;

const VERSION: u8 = 100;
const ATTACH: u8 = 104;
const HEADER_LEN: usize = 7;

fn send(driver: &mut Driver, kind: u8, tag: u8, body: &[u8], room: usize) {
    let len = u32::try_from(HEADER_LEN + body.len()).expect("it is short");
    let header = [&len.to_le_bytes()[..], &[kind, tag, 0]].concat();
    driver.request(REQUEST_QUEUE, &[&header, body], &[room]);
}

fuzz_target!(|data: &[u8]| {
    let folder = Folder::new();
    let share = Share::new(&folder.shared(), CachePolicy::Always, false).expect("a shared folder");
    let tag = Tag::try_from("fuzz".to_owned()).expect("a tag");
    let mut device = P9Device::new(tag, share, |_| Ok(())).expect("a device");
    let mut driver = Driver::activate(&mut device);
    let version = [&8192_u32.to_le_bytes()[..], b"\x08\09P2000.L"].concat();
    send(&mut driver, VERSION, 0, &version, 64);
    // Fid 0, no authentication, no names, user 0.
    let attach = [&[0; 4][..], &[0xff; 4], &[0; 8]].concat();
    send(&mut driver, ATTACH, 0, &attach, 64);
    for record in records(data) {
        send(
            &mut driver,
            record.kind,
            record.to,
            record.body,
            record.room,
        );
    }
    device.reset();
    folder.check();
});
