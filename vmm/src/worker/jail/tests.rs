//! Each test runs this very test binary again as a child that enters the jail and tries one thing. They need root, as
//! the worker does, and say so when they have not got it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use io_uring::IoUring;
use rustix::fs::{AtFlags, Gid, Uid};
use rustix::net::{AddressFamily, SocketType};

use super::*;
use crate::devices::block::{BlockConfig, BlockDevice, REQUEST_QUEUE};
use crate::virtio::DeviceType;
use crate::virtio::testing::Driver;
use crate::worker::seccomp::{self, Role};
use crate::workshop::Workshop;

const ATTEMPT: &str = "HUSK_JAIL_TEST_ATTEMPT";
const SHARE: &str = "HUSK_JAIL_TEST_SHARE";

/// The child of all tests: not a test of its own.
#[test]
#[ignore = "run by the other tests as their child"]
fn child() {
    let share = PathBuf::from(std::env::var_os(SHARE).unwrap());
    let attempt = std::env::var(ATTEMPT).unwrap();
    let shared = [share.as_path()];
    enter(if attempt == "nothing" { &[] } else { &shared }).unwrap();
    match attempt.as_str() {
        "see" => see(&share),
        "nothing" => {
            assert_eq!(fs::read_dir("/").unwrap().count(), 1);
            File::open("/dev/kvm").unwrap();
            let sets = rustix::thread::capabilities(None).unwrap();
            assert!(sets.effective.is_empty() && sets.permitted.is_empty());
            drop_capabilities().unwrap();
        }
        "open-outside" => {
            for path in ["/etc/passwd", "/proc/1/root", "/sys", "/root", "/dev/null"] {
                let err = File::open(path).unwrap_err();
                assert_eq!(err.kind(), io::ErrorKind::NotFound, "{path}");
            }
            for path in ["../../../../../../etc/passwd", "/proc/self/fd/../status"] {
                assert!(File::open(share.join(path)).is_err(), "{path}");
            }
        }
        "network" => {
            let names = interfaces();
            assert_eq!(names, ["lo"]);
        }
        "later-mount" => {
            // The parent mounts something and says so.
            println!("ready");
            std::io::stdin().read_exact(&mut [0]).unwrap();
            assert_eq!(fs::read_to_string(share.join("sub/later")).unwrap(), "seen");
        }
        "serve-files" => serve_files(&share),
        "capabilities" => {
            let sets = rustix::thread::capabilities(None).unwrap();
            assert_eq!(sets.effective, FILE_SERVER_CAPABILITIES);
            assert_eq!(sets.permitted, FILE_SERVER_CAPABILITIES);
            assert!(sets.inheritable.is_empty());
            assert!(rustix::thread::no_new_privs().unwrap());
            drop_capabilities().unwrap();
            let sets = rustix::thread::capabilities(None).unwrap();
            assert!(sets.permitted.is_empty());
        }
        "mount" => {
            let err = rustix::mount::mount("none", &share, "tmpfs", MountFlags::empty(), None)
                .unwrap_err();
            assert_eq!(err, rustix::io::Errno::PERM);
        }
        "limits" => {
            let files = rustix::process::getrlimit(Resource::Nofile);
            assert_eq!(files.current, files.maximum);
            let core = rustix::process::getrlimit(Resource::Core);
            assert_eq!(core.maximum, Some(0));
        }
        "socket" => {
            seccomp::install(Role::Device(DeviceType::Fs)).unwrap();
            let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None);
            unreachable!("{socket:?}");
        }
        "exec" => {
            seccomp::install(Role::Device(DeviceType::Fs)).unwrap();
            let err = std::os::unix::process::CommandExt::exec(&mut Command::new("/bin/true"));
            unreachable!("{err}");
        }
        "executable-memory" => {
            seccomp::install(Role::Vcpu).unwrap();
            // SAFETY: a fresh private mapping, placed by the kernel and never used.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            unreachable!("{address:?}");
        }
        "thread" => {
            seccomp::install(Role::Vcpu).unwrap();
            let thread = std::thread::Builder::new().spawn(|| {});
            unreachable!("{thread:?}");
        }
        "thread-of-workshop" => {
            let made = thread_of_workshop(|| {
                seccomp::install(Role::Vcpu).unwrap();
                drop(vec![1; 1 << 20]);
            });
            assert!(made);
        }
        "thread-of-thread-of-workshop" => {
            thread_of_workshop(|| {
                seccomp::install(Role::Vcpu).unwrap();
                let thread = std::thread::Builder::new().spawn(|| {});
                unreachable!("{thread:?}");
            });
        }
        "disk-of-workshop" => disk_of_workshop(&share),
        "make-ring" => {
            seccomp::install(Role::Device(DeviceType::Block)).unwrap();
            let ring = IoUring::new(1);
            unreachable!("{:?}", ring.err());
        }
        "change-ring" => {
            let ring = IoUring::new(1).unwrap();
            seccomp::install(Role::Device(DeviceType::Block)).unwrap();
            let changed = ring.submitter().register_files(&[0]);
            unreachable!("{changed:?}");
        }
        "process-of-workshop" => {
            seccomp::install(Role::Workshop).unwrap();
            // SAFETY: the child, which there must not be, does nothing but panic, as its parent.
            let child = unsafe { libc::fork() };
            unreachable!("process {child}");
        }
        other => panic!("no attempt {other}"),
    }
}

fn workshop() -> Workshop {
    Workshop::open(|| {
        drop_capabilities()?;
        seccomp::install(Role::Workshop).map_err(io::Error::other)
    })
    .unwrap()
}

/// A disk that is plugged in does its requests, by a ring, and is taken apart again, all of it under the filters.
fn disk_of_workshop(share: &Path) {
    let rings = || {
        fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target == Path::new("anon_inode:[io_uring]"))
            .count()
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(share.join("disk"))
        .unwrap();
    file.set_len(1 << 20).unwrap();
    let workshop = workshop();
    let config = BlockConfig::new("disk".to_owned(), false).unwrap();
    let mut device = workshop
        .run(|| {
            BlockDevice::new(config, file.into(), |device| {
                seccomp::install(Role::Device(device)).map_err(io::Error::other)
            })
        })
        .unwrap()
        .unwrap();
    assert_eq!(rings(), 1);
    let mut driver = Driver::activate(&mut device);
    // To write by the ring, to flush, and to read.
    let header = |kind: u64| (u128::from(kind)).to_le_bytes();
    let content = vec![7; 128 << 10];
    let used = driver.request(REQUEST_QUEUE, &[&header(1), &content], &[1]);
    assert_eq!(used.bytes, [0]);
    let used = driver.request(REQUEST_QUEUE, &[&header(4)], &[1]);
    assert_eq!(used.bytes, [0]);
    let used = driver.request(REQUEST_QUEUE, &[&header(0)], &[content.len(), 1]);
    assert_eq!(used.bytes.split_last(), Some((&0, &content[..])));
    workshop.run(move || drop(device)).unwrap();
    assert_eq!(rings(), 0);
}

/// Runs something on a thread that the workshop has made. True if that comes to an end.
fn thread_of_workshop(first: impl FnOnce() + Send + 'static) -> bool {
    let made = workshop().run(move || {
        std::thread::Builder::new()
            .name("vcpu".to_owned())
            .spawn(move || {
                drop_capabilities().unwrap();
                first();
            })
    });
    made.unwrap().unwrap().join().is_ok()
}

/// All that is below the root.
fn see(share: &Path) {
    let list = |path: &str| {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let top = share
        .components()
        .nth(1)
        .unwrap()
        .as_os_str()
        .to_str()
        .unwrap();
    let mut expected = vec!["dev".to_owned(), "proc".to_owned(), top.to_owned()];
    expected.sort();
    assert_eq!(list("/"), expected);
    assert_eq!(list("/dev"), ["kvm"]);
    assert_eq!(list("/proc"), ["self"]);
    assert_eq!(list("/proc/self"), ["fd"]);
    assert!(!list("/proc/self/fd").is_empty());
    let err = fs::write("/written", "").unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
}

/// What the file server does for the guest still works, under its filter.
fn serve_files(share: &Path) {
    seccomp::install(Role::Device(DeviceType::Fs)).unwrap();
    let path = share.join("made");
    fs::write(&path, "by the jailed").unwrap();
    // By the calls that the server makes, which take a folder's descriptor.
    let folder = File::open(share).unwrap();
    let (user, group) = (Uid::from_raw(1000), Gid::from_raw(1000));
    rustix::fs::chownat(&folder, "made", Some(user), Some(group), AtFlags::empty()).unwrap();
    rustix::fs::chmodat(
        &folder,
        "made",
        Mode::from_raw_mode(0o4755),
        AtFlags::empty(),
    )
    .unwrap();
    let file = File::open(&path).unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    let mut text = String::new();
    File::open(format!("/proc/self/fd/{descriptor}"))
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "by the jailed");
}

fn interfaces() -> Vec<String> {
    // SAFETY: no arguments; the list is given back below.
    let list = unsafe { libc::if_nameindex() };
    let mut names = Vec::new();
    let mut entry = list;
    loop {
        // SAFETY: the list ends with an entry without a name, behind which this does not go.
        let libc::if_nameindex { if_name, .. } = unsafe { *entry };
        if if_name.is_null() {
            break;
        }
        // SAFETY: if_nameindex's names are C strings.
        names.push(
            unsafe { CStr::from_ptr(if_name) }
                .to_str()
                .unwrap()
                .to_owned(),
        );
        // SAFETY: the next entry is there, at the latest the one without a name.
        entry = unsafe { entry.add(1) };
    }
    // SAFETY: from if_nameindex, and not used again.
    unsafe { libc::if_freenameindex(list) };
    names
}

/// Not by eprintln!, whose output is only shown for a test that fails.
fn say_skipped(reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

/// A shared folder, and whether there can be a jail at all.
fn share() -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        say_skipped("entering the jail needs root");
        return None;
    }
    if !Path::new(KVM).exists() {
        say_skipped("the jail holds /dev/kvm, which this machine has not got");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

fn spawn(attempt: &str, share: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "worker::jail::tests::child",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(ATTEMPT, attempt)
        .env(SHARE, share)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(attempt: &str) -> Option<(ExitStatus, tempfile::TempDir)> {
    let share = share()?;
    let status = spawn(attempt, share.path()).wait().unwrap();
    Some((status, share))
}

fn succeeds(attempt: &str) {
    if let Some((status, _share)) = run(attempt) {
        assert!(status.success(), "{attempt}: {status}");
    }
}

fn is_killed(attempt: &str) {
    if let Some((status, _share)) = run(attempt) {
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{attempt}: {status}");
    }
}

/// Whether this machine lets a process have an io_uring.
fn has_rings() -> bool {
    IoUring::new(1)
        .inspect_err(|err| say_skipped(&format!("this machine has no io_uring: {err}")))
        .is_ok()
}

#[test]
fn disk_is_served_by_a_ring_under_the_filters() {
    if has_rings() {
        succeeds("disk-of-workshop");
    }
}

#[test]
fn no_ring_is_made_or_changed_where_it_is_used() {
    if has_rings() {
        is_killed("make-ring");
        is_killed("change-ring");
    }
}

#[test]
fn root_holds_only_the_share_kvm_and_own_descriptors() {
    succeeds("see");
}

#[test]
fn files_of_the_host_are_not_there() {
    succeeds("open-outside");
}

#[test]
fn network_is_an_empty_one() {
    succeeds("network");
}

#[test]
fn capabilities_are_those_of_a_file_server() {
    succeeds("capabilities");
}

#[test]
fn without_a_share_there_is_nothing_but_kvm_and_no_capability() {
    succeeds("nothing");
}

#[test]
fn mounting_is_refused() {
    succeeds("mount");
}

#[test]
fn limits_are_set() {
    succeeds("limits");
}

#[test]
fn socket_kills() {
    is_killed("socket");
}

#[test]
fn exec_kills() {
    is_killed("exec");
}

#[test]
fn executable_memory_kills() {
    is_killed("executable-memory");
}

#[test]
fn new_thread_of_a_vcpu_kills() {
    is_killed("thread");
}

#[test]
fn workshop_makes_threads_that_confine_themselves() {
    succeeds("thread-of-workshop");
}

#[test]
fn new_thread_of_a_thread_of_the_workshop_kills() {
    is_killed("thread-of-thread-of-workshop");
}

#[test]
fn new_process_of_the_workshop_kills() {
    is_killed("process-of-workshop");
}

#[test]
fn file_server_works_within_its_filter_and_capabilities() {
    if let Some((status, share)) = run("serve-files") {
        assert!(status.success(), "{status}");
        let made = fs::metadata(share.path().join("made")).unwrap();
        assert_eq!((made.uid(), made.mode() & 0o7777), (1000, 0o4755));
    }
}

/// As the shim does: in a mount namespace of its own, on a shared mount.
#[test]
fn mount_made_later_below_the_share_is_seen() {
    let Some(share) = share() else { return };
    // The thread of this test alone gets the namespace, and the child from it.
    // SAFETY: the flags do not share out descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .unwrap();
    let tmpfs = |path: &Path| {
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
    };
    tmpfs(share.path());
    rustix::mount::mount_change(share.path(), MountPropagationFlags::SHARED).unwrap();
    fs::create_dir(share.path().join("sub")).unwrap();

    let mut child = spawn("later-mount", share.path());
    wait_for_line(&mut child, "ready");
    tmpfs(&share.path().join("sub"));
    fs::write(share.path().join("sub/later"), "seen").unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    rustix::mount::unmount(share.path(), UnmountFlags::DETACH).unwrap();
}

fn wait_for_line(child: &mut Child, line: &str) {
    use std::io::BufRead;
    let stdout = std::io::BufReader::new(child.stdout.as_mut().unwrap());
    // libtest writes "test name ... " before it, without a line break.
    assert!(
        stdout.lines().any(|text| text.unwrap().ends_with(line)),
        "the child ended early"
    );
}
