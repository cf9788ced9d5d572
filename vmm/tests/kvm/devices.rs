//! The guest's own drivers with our devices, through the PCI transport.

use std::io::{Read, Seek};
use std::sync::mpsc::channel;

use husk_vmm::config::{CachePolicy, DiskConfig, ShareConfig, ShareProtocol};
use husk_vmm::control::ExitReason;

use crate::support::{self, Guest};

#[test]
fn a_disk_is_written_and_flushed() {
    support::require_kvm!();
    let mut guest = Guest::new(
        "disk=/dev/$(grep -l ^data /sys/block/*/serial | cut -d/ -f4); other=/dev/$(grep -l ^fixed /sys/block/*/serial | cut -d/ -f4)\n\
         echo written by the guest | dd of=$disk bs=512 seek=3 conv=fsync 2>/dev/null\n\
         head -c 5 $other; dd if=/dev/zero of=$other bs=512 count=1 2>/dev/null || echo HUSK read-only; poweroff -f\n",
    );
    let mut data = support::file_of(&[0; 1 << 16]);
    guest.disks = vec![
        data.try_clone().unwrap(),
        support::file_of(&b"HUSK\n".repeat(1024)[..4608]),
    ];
    let disk = |serial: &str, read_only| DiskConfig {
        serial: serial.to_owned(),
        read_only,
    };
    guest.config.disks = vec![disk("data", false), disk("fixed", true)];
    let (reason, output) = guest.start().end();
    assert_eq!(reason, ExitReason::PowerOff, "{output}");
    assert!(output.contains("HUSK\nHUSK read-only\n"), "{output}");
    let mut content = Vec::new();
    data.rewind().unwrap();
    data.read_to_end(&mut content).unwrap();
    assert!(content[3 * 512..].starts_with(b"written by the guest\n"));
}

#[test]
fn a_folder_is_shared_both_ways() {
    support::require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("from-host"), "HUSK hello guest\n").unwrap();
    let mut guest = Guest::new(
        "mount -t virtiofs husk /mnt && cat /mnt/from-host && echo hello host > /mnt/from-guest; umount /mnt; poweroff -f\n",
    );
    guest.config.shares = vec![ShareConfig {
        tag: "husk".to_owned(),
        path: folder.path().to_owned(),
        cache: CachePolicy::Auto,
        protocol: ShareProtocol::Fuse {
            writeback: false,
            dax_window_mib: 0,
        },
        watch: None,
    }];
    let (reason, output) = guest.start().end();
    assert_eq!(reason, ExitReason::PowerOff, "{output}");
    assert!(output.contains("HUSK hello guest\n"), "{output}");
    assert_eq!(
        std::fs::read_to_string(folder.path().join("from-guest")).unwrap(),
        "hello host\n"
    );
}

#[test]
fn a_connection_that_nobody_accepts_is_reset() {
    support::require_kvm!();
    let running = Guest::new("echo HUSK is up; sleep 1000\n").start();
    running.console.wait_for("HUSK is up\n");
    let (done, outcome) = channel();
    running.vmm.vsock().connect(4321, move |result| {
        done.send(result.is_err()).unwrap();
    });
    assert!(outcome.recv_timeout(support::PATIENCE).unwrap());
}
