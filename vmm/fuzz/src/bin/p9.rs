//! 9P messages, through the 9P device.
#![no_main]

use husk_vmm_fuzz::p9::Guest;
use husk_vmm_fuzz::records;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut guest = Guest::new();
    guest.attach();
    for record in records(data) {
        guest.play(record);
    }
    guest.end();
});
