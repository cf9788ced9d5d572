//! What the first process of a guest does before it serves: a root that containers can pivot away from, the kernel's file
//! systems, cgroups, the loopback interface. Everything here is on the way to the first process of the pod, so there is
//! nothing that nobody needs; containers mount what they use of mqueue or hugetlbfs themselves.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot, sethostname};

use crate::cgroup;
use crate::error::{During, Result};

/// Descriptors that a process of the guest may open; what containerd gives its children.
const OPEN_FILES: u64 = 1 << 20;

/// Where the new root is made, in the initramfs.
const NEW_ROOT: &str = "/root";

struct MountPoint {
    source: &'static str,
    target: &'static str,
    fstype: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// In this order: each may be below an earlier one.
const MOUNTS: [MountPoint; 8] = [
    MountPoint::new("proc", "/proc", "proc", SAFE, None),
    MountPoint::new("sysfs", "/sys", "sysfs", SAFE, None),
    MountPoint::new("cgroup2", cgroup::ROOT, "cgroup2", SAFE, None),
    MountPoint::new(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        Some("mode=0755"),
    ),
    MountPoint::new(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        Some("mode=0620,ptmxmode=0666"),
    ),
    MountPoint::new("tmpfs", "/dev/shm", "tmpfs", SAFE, Some("mode=1777")),
    MountPoint::new("tmpfs", "/run", "tmpfs", SAFE, Some("mode=0755")),
    MountPoint::new("tmpfs", "/tmp", "tmpfs", SAFE, Some("mode=1777")),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

const SYSCTLS: [(&str, &str); 1] = [
    // A guest whose kernel is damaged ends, and the host learns of it, rather than limp on.
    ("/proc/sys/kernel/panic_on_oops", "1"),
];

impl MountPoint {
    const fn new(
        source: &'static str,
        target: &'static str,
        fstype: &'static str,
        flags: MsFlags,
        data: Option<&'static str>,
    ) -> Self {
        Self {
            source,
            target,
            fstype,
            flags,
            data,
        }
    }
}

/// Turns the bare initramfs into a guest. Called once, first thing, by process 1.
pub(crate) fn prepare() -> Result<()> {
    leave_initramfs()?;
    for point in &MOUNTS {
        mount_one(point)?;
    }
    for (target, link) in LINKS {
        make_link(target, Path::new(link)).during(format!("linking {link}"))?;
    }
    fs::create_dir_all("/run/husk/state").during("making /run/husk")?;
    enable_controllers()?;
    for (file, value) in SYSCTLS {
        fs::write(file, value).during(format!("writing {file}"))?;
    }
    // The OOM killer may take anything but the agent; a creator resets this for what it makes.
    fs::write("/proc/self/oom_score_adj", "-1000").during("leaving the OOM killer")?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .during("raising the limit of open files")?;
    sethostname("husk").during("setting the host name")?;
    loopback_up().during("bringing lo up")
}

/// pivot_root(2) does not work from the initramfs, the root of all mounts: the agent, and with it every container, moves
/// onto a tmpfs first. The agent's program stays reachable as `/proc/self/exe`.
fn leave_initramfs() -> Result<()> {
    const FAILED: &str = "moving the root to a tmpfs";
    fs::create_dir_all(NEW_ROOT).during(FAILED)?;
    mount(
        Some("tmpfs"),
        NEW_ROOT,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .during(FAILED)?;
    chdir(NEW_ROOT).during(FAILED)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).during(FAILED)?;
    chroot(".").during(FAILED)?;
    chdir("/").during(FAILED)
}

fn mount_one(point: &MountPoint) -> Result<()> {
    let what = format!("mounting {}", point.target);
    fs::create_dir_all(point.target).during(&what)?;
    mount(
        Some(point.source),
        point.target,
        Some(point.fstype),
        point.flags,
        point.data,
    )
    .during(what)
}

fn make_link(target: &str, link: &Path) -> io::Result<()> {
    // devtmpfs has a ptmx of its own, of the first devpts instance.
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    symlink(target, link)
}

/// Gives the containers' groups every controller that the kernel has.
fn enable_controllers() -> Result<()> {
    let root = Path::new(cgroup::ROOT);
    const FAILED: &str = "enabling the cgroup controllers";
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).during(FAILED)?;
    let enable: Vec<String> = controllers
        .split_ascii_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let enable = enable.join(" ");
    let containers = root.join(cgroup::CONTAINERS);
    fs::create_dir(&containers).during(FAILED)?;
    for folder in [root, &containers] {
        fs::write(folder.join("cgroup.subtree_control"), &enable).during(FAILED)?;
    }
    Ok(())
}

/// netdevice(7).
fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = 1; // IFF_UP
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is, and keeps no reference to it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    nix::errno::Errno::result(result)
        .map(drop)
        .map_err(io::Error::from)
}
