//! The worker process as the shim uses it, on real KVM: spawned, asked over the control socket, jailed, and its end.
//! Its program is `examples/worker.rs`.

#![expect(
    clippy::unwrap_used,
    reason = "a test; clippy.toml's leave is for functions with #[test] alone"
)]

mod support;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};
use husk_vmm::NicFiles;
use husk_vmm::config::{
    CachePolicy, DiskConfig, NicConfig, NoticeGids, ShareConfig, ShareProtocol, VmConfig,
    WatchConfig,
};
use husk_vmm::control::{
    self, Call, ChangeKind, Event, ExitReason, FileChange, Message, Reply, Request, Resize,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use support::{Guest, file_of, initramfs, net};

/// Where the worker finds its socket.
const CONTROL: i32 = 3;

/// What the disk of each guest begins with.
const DISK: &[u8] = b"HUSK-DISK";

/// Whether there is a KVM that runs kernels.
fn has_kvm() -> bool {
    let has = std::env::var_os("HUSK_TEST_KVM").is_some();
    if !has {
        support::say_skipped(
            "needs real KVM (set HUSK_TEST_KVM where there is one; ci/test does, in the node)",
        );
    }
    has
}

/// Cargo builds examples together with tests, and puts them beside.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap();
    built.join("examples/worker")
}

/// The shim's view of a worker.
struct Worker {
    child: Child,
    control: OwnedFd,
    console: File,
    console_writer: OwnedFd,
}

impl Worker {
    fn spawn() -> Self {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new(program());
        command
            .fd_mappings(vec![FdMapping {
                parent_fd: theirs,
                child_fd: CONTROL,
            }])
            .unwrap();
        Self {
            child: command.spawn().unwrap(),
            control: ours,
            console: File::from(OwnedFd::from(reader)),
            console_writer: writer.into(),
        }
    }

    fn ask(&self, id: u64, call: Call, fds: &[BorrowedFd<'_>]) {
        control::send(&self.control, &Request { id, call }, fds).unwrap();
    }

    fn hear(&self) -> Message {
        let (message, _) = control::recv(&self.control)
            .unwrap()
            .expect("the worker has something to say");
        message
    }

    /// Whether it says something in this moment.
    fn speaks_soon(&self) -> bool {
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
        poll(&mut fds, Some(&moment)).unwrap() == 1
    }

    /// What has changed since, as soon as it tells of that.
    fn next_changes(&self) -> Vec<FileChange> {
        assert_eq!(self.hear(), Message::Event(Event::FilesChanged));
        let mut all = Vec::new();
        loop {
            self.ask(2, Call::TakeChanges, &[]);
            let mut again = false;
            let result = loop {
                match self.hear() {
                    Message::Event(Event::FilesChanged) => again = true,
                    Message::Reply { id: 2, result } => break result,
                    other => panic!("{other:?}"),
                }
            };
            let Ok(Reply::Changes { changes, more }) = result else {
                panic!("{result:?}");
            };
            all.extend(changes);
            if !again && !more {
                return all;
            }
        }
    }

    /// Boots a guest whose first process is the shell script `init`.
    fn boot(&self, init: &str, change: impl FnOnce(&mut VmConfig)) -> Result<Reply, String> {
        self.boot_with(init, change, &[])
    }

    /// As [`Self::boot`], with network devices.
    fn boot_with(
        &self,
        init: &str,
        change: impl FnOnce(&mut VmConfig),
        nics: &[NicFiles],
    ) -> Result<Reply, String> {
        let Guest {
            mut config, kernel, ..
        } = Guest::new(init);
        change(&mut config);
        let kernel = File::open(kernel).unwrap();
        let initramfs = initramfs(init);
        let disk = file_of(DISK);
        disk.set_len(1 << 20).unwrap();
        config.disks.push(DiskConfig {
            serial: "disk".to_owned(),
            read_only: false,
        });
        let mut files = vec![
            kernel.as_fd(),
            initramfs.as_fd(),
            self.console_writer.as_fd(),
            disk.as_fd(),
        ];
        for nic in nics {
            files.extend(nic.taps.iter().chain(&nic.vhost).map(AsFd::as_fd));
        }
        self.ask(1, Call::Boot(config), &files);
        match self.hear() {
            Message::Reply { id: 1, result } => result,
            other => panic!("{other:?}"),
        }
    }

    /// The io_urings that it has.
    fn rings(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target == Path::new("anon_inode:[io_uring]"))
            .count()
    }

    /// Waits until the guest says something.
    fn wait_for(&mut self, text: &str) {
        let mut said = String::new();
        while !said.contains(text) {
            let mut bytes = [0; 256];
            let count = self.console.read(&mut bytes).unwrap();
            said.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    fn resize(&self, vcpus: Option<u8>, memory_mib: Option<u32>) {
        self.ask(2, Call::Resize(Resize { vcpus, memory_mib }), &[]);
        assert_eq!(
            self.hear(),
            Message::Reply {
                id: 2,
                result: Ok(Reply::Resized)
            }
        );
    }

    /// Adds or removes a device.
    fn plug(&self, call: Call, files: &[OwnedFd], expected: Reply) {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.ask(2, call, &files);
        assert_eq!(
            self.hear(),
            Message::Reply {
                id: 2,
                result: Ok(expected)
            }
        );
    }

    /// All that the guest has said, once the worker is gone.
    fn output(self) -> String {
        let Self {
            mut console,
            console_writer,
            ..
        } = self;
        drop(console_writer);
        let mut text = String::new();
        console.read_to_string(&mut text).unwrap();
        text
    }
}

/// What containers do with files, in as many ways as busybox knows.
const USE_FILES: &str = "\
set -e
mount -t virtiofs share /mnt
cd /mnt
cat from-host
mkdir -p a/b
echo written > a/file
dd if=/dev/zero of=a/big bs=64k count=16 conv=fsync 2>/dev/null
truncate -s 3 a/big
ln a/file a/hard
ln -s file a/soft
cat a/soft a/hard
mv a/file a/b/moved
chown 1000:1000 a/b/moved
chmod 4711 a/b/moved
touch -d '2001-02-03 04:05:06' a/b/moved
mknod a/node c 1 3
mkfifo a/fifo
fallocate -l 8192 a/big
ls -la a a/b >/dev/null
find . >/dev/null
df . >/dev/null
mkdir -m 1777 open
echo secret > secret
chmod 600 secret
mkdir /etc
echo user:x:1000:1000::/:/bin/sh > /etc/passwd
su user -c 'echo mine > /mnt/open/mine && ! cat /mnt/secret 2>/dev/null'
[ $(stat -c %u:%g open/mine) = 1000:1000 ]
mkdir lost
cd lost
rmdir ../lost
cd ..
(cp from-host a/copy & cp from-host a/copy2 & wait)
cmp a/copy a/copy2
truncate -s 4M a/sparse
echo in-place | dd of=a/sparse bs=1 seek=3000000 conv=notrunc,fsync 2>/dev/null
grep -q in-place a/sparse
rm a/sparse
rm a/hard a/soft a/node a/fifo
rmdir a/b 2>/dev/null || rm -r a/b/
sync
cd /
umount /mnt
cat /dev/vda | head -c 9
dd if=/bin/busybox of=/dev/vda bs=64k count=8 conv=fsync 2>/dev/null
blkdiscard -l 65536 /dev/vda 2>/dev/null || true
echo FILES-DONE
poweroff -f
";

#[test]
fn guest_runs_jailed_until_it_powers_off() {
    if !has_kvm() {
        return;
    }
    let mut worker = Worker::spawn();
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("from-host"), "HUSK-SAYS hello\n").unwrap();
    let booted = worker.boot(USE_FILES, |config| {
        config.shares.push(ShareConfig {
            tag: "share".to_owned(),
            path: share.path().to_owned(),
            cache: CachePolicy::Auto,
            protocol: ShareProtocol::Fuse {
                writeback: false,
                dax_window_mib: 16,
            },
            // Nothing is told, since nobody else changes anything.
            watch: Some(watch("")),
        });
    });
    assert_eq!(booted, Ok(Reply::Booted));

    let root = format!("/proc/{}/root", worker.child.id());
    let mut names: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let top = share.path().components().nth(1).unwrap();
    assert_eq!(names, ["dev".as_ref(), "proc".as_ref(), top.as_os_str()]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.child.id())).unwrap();
    for line in ["Name:\thusk-vmm", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "no {line:?} in {status}");
    }

    let end = worker.hear();
    let status = worker.child.wait().unwrap();
    let output = worker.output();
    assert_eq!(
        end,
        Message::Event(Event::Exited(ExitReason::PowerOff)),
        "{output}"
    );
    assert!(status.success(), "{status}");
    assert!(output.contains("HUSK-SAYS hello"), "{output}");
    assert!(output.contains("HUSK-DISK"), "{output}");
    assert!(output.contains("FILES-DONE"), "{output}");
    let copy = std::fs::read_to_string(share.path().join("a/copy")).unwrap();
    assert_eq!(copy, "HUSK-SAYS hello\n");
}

fn watch(prefix: &str) -> WatchConfig {
    WatchConfig {
        prefix: prefix.to_owned(),
        gids: NoticeGids {
            changed: 1001,
            created: 1002,
            gone_file: 1003,
            gone_folder: 1004,
            moved_file: 1005,
            moved_folder: 1006,
        },
    }
}

const LOOK_AT_FILES: &str = "\
mount -t virtiofs share /mnt
cd /mnt/.volume-0
echo HUSK-LOOKED
while ! [ -e end ]; do sleep 1; done
poweroff -f
";

#[test]
fn what_others_change_is_told_from_inside_the_jail() {
    if !has_kvm() {
        return;
    }
    let mut worker = Worker::spawn();
    // The node's root is a file system of which not all kernels tell.
    let share = tempfile::tempdir_in("/dev/shm").unwrap();
    let volume = share.path().join(".volume-0");
    std::fs::create_dir(&volume).unwrap();
    std::fs::create_dir(share.path().join("other")).unwrap();
    let booted = worker.boot(LOOK_AT_FILES, |config| {
        config.shares.push(ShareConfig {
            tag: "share".to_owned(),
            path: share.path().to_owned(),
            cache: CachePolicy::Auto,
            protocol: ShareProtocol::Fuse {
                writeback: false,
                dax_window_mib: 0,
            },
            watch: Some(watch(".volume-")),
        });
    });
    assert_eq!(booted, Ok(Reply::Booted));
    worker.wait_for("HUSK-LOOKED");
    // It is watched a moment after it was looked at.
    let begin = Instant::now();
    while !worker.speaks_soon() {
        assert!(begin.elapsed() < support::PATIENCE, "nothing is told");
        std::fs::write(volume.join("probe"), "").unwrap();
    }
    std::fs::write(share.path().join("other/file"), "").unwrap();
    std::fs::write(volume.join("new"), "").unwrap();
    let new = FileChange {
        kind: ChangeKind::Created,
        path: b".volume-0/new".to_vec(),
        to: Vec::new(),
        file_type: libc::S_IFREG,
    };
    let mut changes = Vec::new();
    while !changes.contains(&new) {
        changes.extend(worker.next_changes());
    }
    let of_volume = |change: &FileChange| change.path.starts_with(b".volume-0/");
    assert!(changes.iter().all(of_volume), "{changes:?}");
    std::fs::write(volume.join("end"), "").unwrap();
    // What is told after that is of no interest.
    while worker.hear() == Message::Event(Event::FilesChanged) {}
    assert!(worker.child.wait().unwrap().success());
}

/// Uses each command of the driver's, takes the interfaces down and up again, and unbinds and binds their driver.
const USE_NETWORK: &str = "\
for n in 0 1; do
    ip addr add 10.9.$n.2/24 dev eth$n; ifconfig eth$n up promisc allmulti
    ping -c 1 -s 8000 10.9.$n.1 >/dev/null && echo HUSK eth$n
done
cd /sys/bus/virtio/drivers/virtio_net
for n in 0 1; do
    ip link set eth$n down; ip link set eth$n up
    device=$(basename $(readlink /sys/class/net/eth$n/device))
    echo $device > unbind; echo $device > bind
    ip addr add 10.9.$n.2/24 dev eth$n; ip link set eth$n up
    ping -c 1 10.9.$n.1 >/dev/null && echo HUSK eth$n again
done
poweroff -f
";

#[test]
fn packets_leave_the_jail_and_come_in() {
    if !has_kvm() {
        return;
    }
    net::in_own_network(|| {
        let nic = |number, vhost| NicConfig {
            mac: [2, 0, 0, 0, 0, number],
            mtu: 1500,
            queue_pairs: 2,
            vhost,
        };
        let nics = vec![nic(0, false), nic(1, true)];
        let files = [
            net::open("tap0", "10.9.0.1/24", &nics[0]),
            net::open("tap1", "10.9.1.1/24", &nics[1]),
        ];
        let mut worker = Worker::spawn();
        let change = |config: &mut VmConfig| {
            (config.vcpus, config.max_vcpus) = (2, 2);
            config.nics = nics;
        };
        let booted = worker.boot_with(USE_NETWORK, change, &files);
        assert_eq!(booted, Ok(Reply::Booted));
        let end = worker.hear();
        let status = worker.child.wait().unwrap();
        let output = worker.output().replace('\r', "");
        assert_eq!(
            end,
            Message::Event(Event::Exited(ExitReason::PowerOff)),
            "{output}"
        );
        assert!(status.success(), "{status}");
        for line in ["eth0", "eth1", "eth0 again", "eth1 again"] {
            assert!(output.contains(&format!("HUSK {line}\n")), "{output}");
        }
    });
}

#[test]
fn guest_is_asked_and_worker_ends_when_the_socket_closes() {
    if !has_kvm() {
        return;
    }
    let mut worker = Worker::spawn();
    assert_eq!(worker.boot("sleep 1000", |_| ()), Ok(Reply::Booted));

    // Answered by the guest's kernel, once it is up.
    worker.ask(2, Call::VsockConnect { port: 9 }, &[]);
    worker.ask(3, Call::Metrics, &[]);
    assert!(matches!(worker.hear(), Message::Reply { id: 3, .. }));
    assert_eq!(
        worker.hear(),
        Message::Reply {
            id: 2,
            result: Err("the guest refused the connection".to_owned())
        }
    );

    rustix::net::shutdown(&worker.control, rustix::net::Shutdown::Both).unwrap();
    let status = worker.child.wait().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn guest_grows_in_the_jail() {
    if !has_kvm() {
        return;
    }
    let mut worker = Worker::spawn();
    let init = support::on_uevent(
        "if [ $SUBSYSTEM$ACTION = cpuadd ]; then\n\
           echo 1 > /sys$DEVPATH/online; echo HUSK $(nproc) processors\n\
         fi\n\
         total=$(awk '/MemTotal/{print $2}' /proc/meminfo)\n\
         [ $total -gt 300000 ] && mkdir /grown 2>/dev/null && poweroff -f\n",
    );
    let booted = worker.boot(&init, |config| {
        config.max_vcpus = 2;
        config.max_memory_mib = 512;
    });
    assert_eq!(booted, Ok(Reply::Booted));
    worker.wait_for("HUSK is up");
    worker.resize(Some(2), None);
    worker.wait_for("HUSK 2 processors");
    worker.resize(None, Some(512));
    let end = worker.hear();
    let status = worker.child.wait().unwrap();
    let output = worker.output();
    assert_eq!(
        end,
        Message::Event(Event::Exited(ExitReason::PowerOff)),
        "{status}: {output}"
    );
}

/// Uses what comes.
const USE_WHAT_COMES: &str = "\
case $SUBSYSTEM$ACTION in
blockadd)
    disk=/dev/${DEVPATH##*/}
    head -c 9 $disk > /dev/null
    dd if=/bin/busybox of=$disk bs=64k count=8 conv=fsync 2>/dev/null
    blkdiscard -l 65536 $disk 2>/dev/null
    echo HUSK disk $(cat /sys$DEVPATH/serial);;
netadd)
    n=$((0x$(cut -d: -f6 /sys$DEVPATH/address)))
    ip addr add 10.9.$n.2/24 dev $INTERFACE; ifconfig $INTERFACE up promisc allmulti
    ping -c 1 -s 8000 10.9.$n.1 >/dev/null && echo HUSK nic $n;;
esac
";

#[test]
fn devices_come_and_go_in_the_jail() {
    if !has_kvm() {
        return;
    }
    net::in_own_network(|| {
        let mut worker = Worker::spawn();
        let change = |config: &mut VmConfig| (config.vcpus, config.max_vcpus) = (2, 2);
        let booted = worker.boot(&support::on_uevent(USE_WHAT_COMES), change);
        assert_eq!(booted, Ok(Reply::Booted));
        worker.wait_for("HUSK is up");
        for turn in 0..2 {
            let serial = format!("later-{turn}");
            let disk = DiskConfig {
                serial: serial.clone(),
                read_only: false,
            };
            let file = file_of(DISK);
            file.set_len(1 << 20).unwrap();
            worker.plug(Call::AddDisk(disk), &[file.into()], Reply::Added);
            worker.wait_for(&format!("HUSK disk {serial}"));
            // One for each queue of the disk of the start and of this one: what the jail forbids would be done without.
            assert_eq!(worker.rings(), 4);
            worker.plug(Call::RemoveDisk { serial }, &[], Reply::Removed);
            assert_eq!(worker.rings(), 2);
        }
        for (last, vhost) in [(1, false), (2, true)] {
            let nic = NicConfig {
                mac: [2, 0, 0, 0, 0, last],
                mtu: 1500,
                queue_pairs: 2,
                vhost,
            };
            let mac = nic.mac;
            let files = net::open(&format!("tap{last}"), &format!("10.9.{last}.1/24"), &nic);
            let files: Vec<_> = files.taps.into_iter().chain(files.vhost).collect();
            worker.plug(Call::AddNic(nic), &files, Reply::Added);
            worker.wait_for(&format!("HUSK nic {last}"));
            worker.plug(Call::RemoveNic { mac }, &[], Reply::Removed);
        }
        worker.ask(3, Call::RemoveNic { mac: [2; 6] }, &[]);
        let Message::Reply {
            id: 3,
            result: Err(message),
        } = worker.hear()
        else {
            panic!("there is no such device");
        };
        assert_eq!(message, "the VM has no network device 02:02:02:02:02:02");
        rustix::net::shutdown(&worker.control, rustix::net::Shutdown::Both).unwrap();
        let status = worker.child.wait().unwrap();
        assert!(status.success(), "{status}");
    });
}

#[test]
fn what_cannot_boot_is_told_and_ends_the_worker() {
    if !has_kvm() {
        return;
    }
    let mut worker = Worker::spawn();
    let missing = |config: &mut VmConfig| {
        config.shares.push(ShareConfig {
            tag: "share".to_owned(),
            path: "/does/not/exist".into(),
            cache: CachePolicy::Auto,
            protocol: ShareProtocol::Fuse {
                writeback: false,
                dax_window_mib: 0,
            },
            watch: None,
        });
    };
    let message = worker.boot("", missing).unwrap_err();
    assert!(message.contains("/does/not/exist"), "{message}");
    let status = worker.child.wait().unwrap();
    assert_eq!((status.success(), status.signal()), (false, None));
}
