//! FUSE requests, through the file system device.
#![no_main]

use husk_vmm_fuzz::fuse::Guest;
use husk_vmm_fuzz::records;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut guest = Guest::new();
    guest.init();
    for record in records(data) {
        guest.play(record);
    }
    guest.end();
});
