//! Guests that grow and shrink while they run.

use husk_vmm::control::Resize;

use crate::memory::{MIB, resident, wait_until};
use crate::support::{self, Guest, Running};

pub(crate) fn vcpus(count: u8) -> Resize {
    Resize {
        vcpus: Some(count),
        memory_mib: None,
    }
}

fn memory(mib: u32) -> Resize {
    Resize {
        vcpus: None,
        memory_mib: Some(mib),
    }
}

#[track_caller]
fn wait_for_counter(running: &Running, name: &str, is_due: impl Fn(u64) -> bool) {
    wait_until(name, || running.vmm.metrics()[name], is_due);
}

#[test]
fn vcpus_come_and_go() {
    support::require_kvm!();
    let mut guest = Guest::new(&support::on_uevent(
        "[ $SUBSYSTEM = cpu ] || exit 0\n\
         [ $ACTION != add ] || echo 1 > /sys$DEVPATH/online\n\
         [ $ACTION != remove ] || mkdir /again 2>/dev/null\n\
         echo HUSK $ACTION ${DEVPATH##*/} $(cat /sys/devices/system/cpu/online; ls -d again 2>/dev/null)\n",
    ));
    guest.config.max_vcpus = 4;
    let running = guest.start();
    running.console.wait_for("HUSK is up\n");
    assert!(running.vmm.resize(vcpus(5)).is_err());
    assert!(running.vmm.resize(vcpus(0)).is_err());
    // Alone first, then two at once.
    running.vmm.resize(vcpus(2)).unwrap();
    running.console.wait_for("HUSK add cpu1 0-1\n");
    running.vmm.resize(vcpus(4)).unwrap();
    running.console.wait_for("HUSK add cpu3 0-3\n");
    running.vmm.resize(vcpus(3)).unwrap();
    running.console.wait_for("HUSK remove cpu3 0-2 again\n");
    wait_for_counter(&running, "vcpus", |count| count == 3);
    running.vmm.resize(vcpus(1)).unwrap();
    running.console.wait_for("HUSK remove cpu1 0");
    running.console.wait_for("HUSK remove cpu2 0");
    wait_for_counter(&running, "vcpus", |count| count == 1);
    // One that has been there before.
    running.vmm.resize(vcpus(2)).unwrap();
    running.console.wait_for("HUSK add cpu1 0-1 again\n");
    drop(running);
}

#[test]
fn memory_comes_and_goes() {
    support::require_kvm!();
    let mut guest = Guest::new(&support::on_uevent(
        "[ $SUBSYSTEM = memory ] || exit 0\n\
         total=$(awk '/MemTotal/{print $2}' /proc/meminfo)\n\
         if [ $total -gt 300000 ] && mkdir /filled 2>/dev/null; then\n\
           mount -t tmpfs -o size=90% t /mnt; head -c 96m /dev/zero > /mnt/file\n\
           echo HUSK filled; umount /mnt; echo HUSK emptied\n\
         fi\n",
    ));
    guest.config.max_memory_mib = 512;
    let running = guest.start();
    running.console.wait_for("HUSK is up\n");
    assert!(running.vmm.resize(memory(513)).is_err());
    let before = resident();
    running.vmm.resize(memory(512)).unwrap();
    running.console.wait_for("HUSK emptied\n");
    wait_for_counter(&running, "mem_plugged_bytes", |bytes| bytes == 256 * MIB);
    running.vmm.resize(memory(256)).unwrap();
    wait_for_counter(&running, "mem_plugged_bytes", |bytes| bytes <= 128 * MIB);
    wait_until("resident", resident, |now| now < before + 64 * MIB);
    println!(
        "resident before {} MiB, after {} MiB; {} MiB are plugged",
        before / MIB,
        resident() / MIB,
        running.vmm.metrics()["mem_plugged_bytes"] / MIB
    );
    drop(running);
}
