//! Disks and network devices that are added to a running guest, and removed from it.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something of its own fails"
)]

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};

use husk_vmm::config::{DeviceConfig, DeviceId, DiskConfig, NicConfig};
use husk_vmm::control::ExitReason;
use husk_vmm::{Error, Vmm};

use crate::memory::wait_until;
use crate::support::{self, Guest, Saved, net};

/// Reads what a disk begins with, when it comes.
const ON_DISK: &str = "[ $SUBSYSTEM = block ] || exit 0\n\
    [ $ACTION != add ] || echo HUSK add $(cat /sys$DEVPATH/serial) $(head -c 9 /dev/${DEVPATH##*/})\n\
    [ $ACTION != remove ] || echo HUSK remove ${DEVPATH##*/}\n";

fn disk(serial: &str) -> DeviceConfig {
    DeviceConfig::Disk(DiskConfig {
        serial: serial.to_owned(),
        read_only: false,
    })
}

fn content(text: &str) -> OwnedFd {
    let file = support::file_of(text.as_bytes());
    file.set_len(1 << 20).unwrap();
    file.into()
}

fn add(vmm: &Vmm, device: DeviceConfig, files: Vec<OwnedFd>) -> Result<(), Error> {
    let (sender, done) = channel();
    vmm.add(device, files, move |result| sender.send(result).unwrap())?;
    done.recv_timeout(support::PATIENCE).unwrap()
}

fn ask_to_go(vmm: &Vmm, device: &DeviceId) -> Receiver<Result<(), Error>> {
    let (sender, done) = channel();
    vmm.remove(device, move |result| sender.send(result).unwrap())
        .unwrap();
    done
}

fn remove(vmm: &Vmm, device: &DeviceId) -> Result<(), Error> {
    ask_to_go(vmm, device)
        .recv_timeout(support::PATIENCE)
        .unwrap()
}

fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

fn descriptors() -> usize {
    entries("/proc/self/fd")
}

/// A thread that was waited for, and one of the kernel's, leave the list a moment later.
#[track_caller]
fn wait_for_threads(count: usize) {
    let count = u64::try_from(count).unwrap();
    let now = || u64::try_from(entries("/proc/self/task")).unwrap();
    wait_until("threads", now, |now| now == count);
}

#[test]
fn disk_comes_and_goes_twenty_times_and_leaves_nothing() {
    support::require_kvm!();
    let running = Guest::new(&support::on_uevent(ON_DISK)).start();
    running.console.wait_for("HUSK is up\n");
    let (fds, threads) = (descriptors(), entries("/proc/self/task"));
    let device = disk("data").id();
    for turn in 0..20 {
        let said = format!("turn-{turn:04}");
        add(&running.vmm, disk("data"), vec![content(&said)]).unwrap();
        running.console.wait_for(&format!("HUSK add data {said}\n"));
        assert!(
            running
                .vmm
                .metrics()
                .keys()
                .any(|name| name.contains("data"))
        );
        remove(&running.vmm, &device).unwrap();
        assert!(
            !running
                .vmm
                .metrics()
                .keys()
                .any(|name| name.contains("data"))
        );
        assert_eq!(descriptors(), fds, "in turn {turn}");
        wait_for_threads(threads);
    }
    assert!(matches!(
        running.vmm.remove(&device, |_| ()),
        Err(Error::NoSuchDevice { .. })
    ));
    drop(running);
}

#[test]
fn several_disks_come_at_once_and_the_bus_has_an_end() {
    support::require_kvm!();
    let running = Guest::new(&support::on_uevent(ON_DISK)).start();
    running.console.wait_for("HUSK is up\n");
    let mut count = 0;
    let full = loop {
        let serial = format!("d{count}");
        match add(&running.vmm, disk(&serial), vec![content(&serial)]) {
            Ok(()) => count += 1,
            Err(err) => break err,
        }
    };
    assert!(matches!(full, Error::PciBusFull), "{full}");
    // Console, entropy, socket and balloon have the other slots.
    assert_eq!(count, 28);
    for number in 0..count {
        running
            .console
            .wait_for(&format!("HUSK add d{number} d{number}"));
    }
    let asked: Vec<_> = (0..count)
        .map(|number| ask_to_go(&running.vmm, &disk(&format!("d{number}")).id()))
        .collect();
    for done in asked {
        done.recv_timeout(support::PATIENCE).unwrap().unwrap();
    }
    drop(running);
}

#[test]
fn disk_in_use_goes_and_the_guest_lives_on() {
    support::require_kvm!();
    let script = "[ $SUBSYSTEM$ACTION = blockadd ] || exit 0\n\
        mkdir /lock || exit 0\n\
        exec 3< /dev/${DEVPATH##*/}; echo HUSK reads\n\
        while dd if=/dev/${DEVPATH##*/} of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null; do :; done\n\
        echo HUSK reads no more; poweroff -f\n";
    let running = Guest::new(&support::on_uevent(script)).start();
    running.console.wait_for("HUSK is up\n");
    add(&running.vmm, disk("data"), vec![content("data")]).unwrap();
    running.console.wait_for("HUSK reads\n");
    remove(&running.vmm, &disk("data").id()).unwrap();
    let (reason, output) = running.end();
    assert_eq!(reason, ExitReason::PowerOff, "{output}");
}

#[test]
fn disk_that_the_guest_does_not_let_go_of_stays() {
    support::require_kvm!();
    let mut guest = Guest::new(&support::on_uevent(
        "[ $SUBSYSTEM$ACTION = blockadd ] && echo HUSK add\n",
    ));
    // Neither hears of a device nor lets go of one.
    guest.config.kernel_params = "acpiphp.disable=1".to_owned();
    let running = guest.start();
    running.console.wait_for("HUSK is up\n");
    let (fds, threads) = (descriptors(), entries("/proc/self/task"));
    let device = disk("data").id();
    add(&running.vmm, disk("data"), vec![content("data")]).unwrap();
    let done = ask_to_go(&running.vmm, &device);
    let pending = running.vmm.remove(&device, |_| ()).unwrap_err();
    assert!(matches!(pending, Error::RemovalPending { .. }), "{pending}");
    running.vmm.keep(&device);
    let kept = done.recv_timeout(support::PATIENCE).unwrap().unwrap_err();
    assert!(matches!(kept, Error::NotLetGo { .. }), "{kept}");
    assert!(descriptors() > fds);
    wait_for_threads(threads + 1);
    drop(ask_to_go(&running.vmm, &device));
    // A VM that ends with a removal open.
    drop(running);
}

#[test]
fn network_device_comes_and_goes() {
    support::require_kvm!();
    net::in_own_network(|| {
        let nic = |last, vhost| NicConfig {
            mac: [2, 0, 0, 0, 0, last],
            mtu: 1400,
            queue_pairs: 1,
            vhost,
        };
        let script = "[ $SUBSYSTEM = net ] || exit 0\n\
            if [ $ACTION = remove ]; then echo HUSK remove $INTERFACE; exit; fi\n\
            [ $ACTION = add ] || exit 0\n\
            cd /sys$DEVPATH; n=$(cut -d: -f6 address); n=$((0x$n))\n\
            ip addr add 10.9.$n.2/24 dev $INTERFACE; ip link set $INTERFACE mtu 9000 up\n\
            ping -c 1 10.9.$n.1 > /dev/null && echo HUSK add $(cat address mtu)\n";
        let running = Guest::new(&support::on_uevent(script)).start();
        running.console.wait_for("HUSK is up\n");
        let (fds, threads) = (descriptors(), entries("/proc/self/task"));
        for (last, vhost) in [(1, false), (2, true)] {
            let config = nic(last, vhost);
            let files = net::open(&format!("tap{last}"), &format!("10.9.{last}.1/24"), &config);
            let files = files.taps.into_iter().chain(files.vhost).collect();
            let device = DeviceConfig::Nic(config);
            let id = device.id();
            add(&running.vmm, device, files).unwrap();
            // An MTU beyond that of the start can be set.
            running
                .console
                .wait_for(&format!("HUSK add 02:00:00:00:00:0{last} 9000\n"));
            remove(&running.vmm, &id).unwrap();
            assert_eq!(descriptors(), fds);
            wait_for_threads(threads);
        }
        drop(running);
    });
}

#[test]
fn added_disk_is_there_in_a_restored_vm() {
    support::require_kvm!();
    let script = "[ $SUBSYSTEM$ACTION = blockadd ] || exit 0\n\
        echo HUSK add; until read line < /dev/${DEVPATH##*/} && [ $line = after ]; do\n\
        echo 3 > /proc/sys/vm/drop_caches; sleep 0.1; done\n\
        echo HUSK $line\n";
    let guest = Guest::new(&support::on_uevent(script));
    let config = guest.config.clone();
    let running = guest.start();
    running.console.wait_for("HUSK is up\n");
    add(&running.vmm, disk("data"), vec![content("before\n")]).unwrap();
    running.console.wait_for("HUSK add\n");
    let saved = Saved::of(&running.vmm);
    drop(running.vmm);

    assert!(saved.state().added().eq([&disk("data")]));
    let running = saved.restore(&config, vec![content("after\n")]).unwrap();
    running.console.wait_for("HUSK after\n");
    remove(&running.vmm, &disk("data").id()).unwrap();
    drop(running);
}
