//! Guests from the first instruction to /init.

use husk_vmm::control::ExitReason;

use crate::support::{self, Guest};

/// Says what it is, and powers off.
const IDENTIFY: &str = "echo HUSK cpus=$(nproc) uptime=$(cut -d' ' -f1 /proc/uptime) mem=$(free -m | awk '/Mem/{print $2}'); poweroff -f\n";

#[track_caller]
fn boots_with(guest: Guest, expected: &str) {
    let (reason, output) = guest.start().end();
    println!("{output}");
    assert_eq!(reason, ExitReason::PowerOff);
    assert!(output.contains(expected), "no {expected:?} in:\n{output}");
    // With `quiet`, whatever the kernel says is that something is wrong, but for its last word.
    let complaints: Vec<_> = output
        .lines()
        .filter(|line| line.starts_with('[') && !line.ends_with("reboot: Power down"))
        .collect();
    assert_eq!(complaints, Vec::<&str>::new());
}

#[test]
fn elf_kernel_boots_to_init() {
    support::require_kvm!();
    boots_with(Guest::new(IDENTIFY), "HUSK cpus=1 ");
}

#[test]
fn bzimage_kernel_boots_to_init() {
    support::require_kvm!();
    let mut guest = Guest::new(IDENTIFY);
    guest.kernel = support::bzimage();
    boots_with(guest, "HUSK cpus=1 ");
}

#[test]
fn all_vcpus_come_online_in_one_package() {
    support::require_kvm!();
    let mut guest = Guest::new(
        "cd /sys/devices/system/cpu; cat online cpu3/topology/core_id cpu3/topology/physical_package_id \
         cpu3/topology/thread_siblings_list > /tmp.txt; echo HUSK $(cat /tmp.txt)\n\
         for cpu in 0 1 2 3; do taskset $((1 << cpu)) true || echo HUSK cpu $cpu does not work; done; poweroff -f\n",
    );
    (guest.config.vcpus, guest.config.max_vcpus) = (4, 4);
    boots_with(guest, "HUSK 0-3 3 0 3\n");
}

#[test]
fn memory_above_the_hole_is_used() {
    support::require_kvm!();
    // The kernel takes from the highest zone first, which is all above 4 GiB here.
    let mut guest = Guest::new(
        "free() { awk '/zone/{zone=$4} /pages free/ && zone == \"Normal\" {print $3}' /proc/zoneinfo; }\n\
         mount -t tmpfs t /mnt; before=$(free); head -c 32m /dev/zero > /mnt/zero; after=$(free)\n\
         [ $((before - after)) -gt 7000 ] && echo HUSK took it there; poweroff -f\n",
    );
    guest.config.memory_mib = 3 * 1024 + 128;
    guest.config.max_memory_mib = guest.config.memory_mib;
    boots_with(guest, "HUSK took it there\n");
}

#[test]
fn the_devices_are_on_the_pci_bus_and_interrupt() {
    support::require_kvm!();
    boots_with(
        Guest::new(
            "for d in /sys/bus/virtio/devices/*; do echo HUSK $(cat $d/device) $(basename $(readlink $d/driver)); done\n\
             head -c 512 /dev/hwrng | wc -c | sed 's/^/HUSK random bytes: /'\n\
             awk '/virtio1-input/ && $2 > 0 {print \"HUSK the entropy queue interrupted\"}' /proc/interrupts\n\
             poweroff -f\n",
        ),
        "HUSK 0x0003 virtio_console\nHUSK 0x0004 virtio_rng\nHUSK 0x0013 vmw_vsock_virtio_transport\n\
         HUSK 0x0005 virtio_balloon\n\
         HUSK random bytes: 512\nHUSK the entropy queue interrupted\n",
    );
}

#[test]
fn kernel_parameters_reach_the_guest() {
    support::require_kvm!();
    let mut guest =
        Guest::new("echo HUSK $(tr ' ' '\\n' < /proc/cmdline | grep ^husk.)\npoweroff -f\n");
    guest.config.kernel_params = "husk.test=1".to_owned();
    boots_with(guest, "HUSK husk.test=1\n");
}
