//! Guests that give memory back.

use std::time::{Duration, Instant};

use crate::resize::vcpus;
use crate::support::{self, Guest};

pub(crate) const MIB: u64 = 1 << 20;

/// Waits until a number is as it shall be. What is measured here has no event: a guest that gives memory back does not
/// say so.
#[track_caller]
pub(crate) fn wait_until(what: &str, read: impl Fn() -> u64, is_due: impl Fn(u64) -> bool) {
    let begin = Instant::now();
    loop {
        let value = read();
        if is_due(value) {
            return;
        }
        assert!(begin.elapsed() < support::PATIENCE, "{what}: {value}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Bytes of this process's memory that the host has to hold.
pub(crate) fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let mut fields = status.split_whitespace();
    let kib = fields.find(|field| *field == "VmRSS:").and(fields.next());
    let kib: u64 = kib.and_then(|kib| kib.parse().ok()).expect("a size in KiB");
    kib << 10
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    support::require_kvm!();
    // A second processor is the word to go on.
    let mut guest = Guest::new(
        "mount -t tmpfs t /mnt; head -c 64m /dev/zero > /mnt/file; echo HUSK filled\n\
         until [ -e /sys/devices/system/cpu/cpu1 ]; do sleep 0.1; done; rm /mnt/file; sleep 1000\n",
    );
    guest.config.max_vcpus = 2;
    let running = guest.start();
    running.console.wait_for("HUSK filled\n");
    let filled = resident();
    running.vmm.resize(vcpus(2)).unwrap();
    // What of it is in pieces of less than 2 MiB stays.
    wait_until("resident", resident, |now| now + 48 * MIB < filled);
    println!(
        "resident filled {} MiB, emptied {} MiB",
        filled / MIB,
        resident() / MIB
    );
    drop(running);
}
