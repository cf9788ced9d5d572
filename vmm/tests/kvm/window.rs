//! The DAX window by the guest's own driver: what a program maps is the host's page cache, whatever the host does with it.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something of its own fails"
)]

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;

use husk_vmm::config::{CachePolicy, DiskConfig, NicConfig, ShareConfig, ShareProtocol};
use husk_vmm::control::ExitReason;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::support::{self, Guest, Running, net};

/// What the guests run, step by step as they are told by their arguments.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static void must(int ok, const char *what)
{
    if (!ok) {
        printf("HUSK FAIL %s: %m\n", what);
        exit(1);
    }
}

static volatile char *map(const char *path, size_t len)
{
    int fd = open(path, O_RDWR);
    must(fd >= 0, path);
    char *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(at != MAP_FAILED, "mmap");
    return at;
}

/* Both sides write to one page, and neither says so but by that. */
static void share(const char *path)
{
    volatile char *at = map(path, 8192);
    at[0] = 'g';
    puts("HUSK wrote");
    while (at[4097] != 'h')
        ;
    at[1] = 'G';
    puts("HUSK saw");
}

/* What devices read from, and write to, is a mapped file. */
static void buffers(const char *path, const char *other, const char *disk)
{
    volatile char *at = map(path, 8192);
    int fd = open(other, O_RDWR | O_CREAT | O_TRUNC, 0600);
    must(fd >= 0, other);
    must(write(fd, (char *)at, 8192) == 8192, "write of what is mapped");
    at[0] = 0;
    must(pread(fd, (char *)at, 4096, 4096) == 4096, "read into what is mapped");
    fd = open(disk, O_RDWR | O_DIRECT);
    must(fd >= 0, disk);
    must(pwrite(fd, (char *)at + 4096, 4096, 0) == 4096, "direct write of what is mapped");
    must(pread(fd, (char *)at + 4096, 4096, 4096) == 4096, "direct read into what is mapped");
    puts("HUSK moved");
}

/* What the network sends is a mapped file, without a copy of it. */
static void deliver(const char *path, const char *address)
{
    volatile char *at = map(path, 8192);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(5000), .sin_addr.s_addr = inet_addr(address)};
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    must(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one) == 0, "SO_ZEROCOPY");
    must(connect(fd, (struct sockaddr *)&to, sizeof to) == 0, "connect");
    must(send(fd, (char *)at, 8192, MSG_ZEROCOPY) == 8192, "send");
    shutdown(fd, SHUT_WR);
    while (read(fd, &one, 1) > 0)
        ;
}

/* The host takes the file away under it. */
static void touch(const char *path, const char *other)
{
    const size_t len = 5 << 20;
    volatile char *at = map(path, len);
    must(at[len - 1] == 'a' && at[0] == 'a', "content");
    int fd = open(other, O_RDWR | O_CREAT | O_TRUNC, 0600);
    must(fd >= 0, other);
    puts("HUSK touches");
    while (at[len - 1] == 'a' || at[0] == 'a')
        ;
    must(at[len - 1] == 0, "zero");
    at[len - 2] = 'l';
    /* Its kernel touches it, too. */
    must(write(fd, (char *)at + (1 << 20), 4096) == 4096, "write of what is gone");
    puts("HUSK lost");
    while (at[0] != 'n')
        ;
    puts("HUSK found");
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    if (!strcmp(argv[1], "share"))
        share(argv[2]);
    if (!strcmp(argv[1], "buffers"))
        buffers(argv[2], argv[3], argv[4]);
    if (!strcmp(argv[1], "deliver"))
        deliver(argv[2], argv[3]);
    if (!strcmp(argv[1], "touch"))
        touch(argv[2], argv[3]);
    return 0;
}
"#;

/// A guest that shares `folder`, with a window of 16 MiB.
fn guest(folder: &Path, script: &str) -> Guest {
    let script = format!("mount -t virtiofs husk /mnt\n{script}\necho HUSK END; poweroff -f\n");
    let mut guest = Guest::new(&script);
    guest.config.shares = vec![ShareConfig {
        tag: "husk".to_owned(),
        path: folder.to_owned(),
        cache: CachePolicy::Auto,
        protocol: ShareProtocol::Fuse {
            writeback: false,
            dax_window_mib: 16,
        },
        watch: None,
    }];
    guest
}

/// Starts it, with the program as /bin/probe.
fn start(guest: Guest) -> Running {
    let program = support::compile(PROGRAM);
    let initramfs = support::initramfs_with(&guest.init, &[("bin/probe", &program)]);
    guest.start_with(initramfs)
}

#[track_caller]
fn assert_passed(running: Running) {
    let metrics = running.vmm.metrics();
    let (reason, output) = running.end();
    assert_eq!(reason, ExitReason::PowerOff, "{output}");
    assert!(
        !output.contains("HUSK FAIL") && output.contains("HUSK END"),
        "{output}"
    );
    assert!(metrics["fs_husk_mappings"] > 0, "{metrics:?}");
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[test]
fn a_mapped_file_is_the_hosts_and_a_buffer_like_any_other() {
    support::require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shared");
    fs::write(&path, [b'a'; 8192]).unwrap();
    let disk = support::file_of(&[b'd'; 1 << 20]);
    let mut guest = guest(
        folder.path(),
        "probe share /mnt/shared; probe buffers /mnt/shared /mnt/other /dev/vda",
    );
    guest.disks = vec![disk.try_clone().unwrap()];
    guest.config.disks = vec![DiskConfig {
        serial: "data".to_owned(),
        read_only: false,
    }];
    let running = start(guest);
    running.console.wait_for("HUSK wrote\n");
    let file = open(&path);
    let byte = |at| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    };
    assert_eq!(byte(0), b'g');
    file.write_all_at(b"h", 4097).unwrap();
    running.console.wait_for("HUSK saw\n");
    assert_eq!(byte(1), b'G');
    running.console.wait_for("HUSK moved\n");
    let other = fs::read(folder.path().join("other")).unwrap();
    assert_eq!((&other[..3], other[4097]), (&b"gGa"[..], b'h'));
    assert_eq!(
        (byte(0), byte(1)),
        (b'a', b'h'),
        "the second page of the other"
    );
    let mut written = [0; 4096];
    disk.read_exact_at(&mut written, 0).unwrap();
    assert_eq!((written[0], written[1]), (b'a', b'h'));
    assert_eq!(byte(4097), b'd');
    assert_passed(running);
}

#[test]
fn a_mapped_file_is_sent_as_it_is() {
    support::require_kvm!();
    for vhost in [false, true] {
        net::in_own_network(move || {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("shared"), [b'a'; 8192]).unwrap();
            let nic = NicConfig {
                mac: [2, 0, 0, 0, 0, 0x11],
                mtu: 1500,
                queue_pairs: 1,
                vhost,
            };
            let mut guest = guest(
                folder.path(),
                "ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; probe deliver /mnt/shared 10.9.0.1",
            );
            guest.nics = vec![net::open("tap0", "10.9.0.1/24", &nic)];
            guest.config.nics = vec![nic];
            let port = TcpListener::bind(("10.9.0.1", 5000)).unwrap();
            let running = start(guest);
            let (mut stream, _) = port.accept().unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(got == [b'a'; 8192], "{} bytes came", got.len());
            drop(stream);
            running.console.wait_for("HUSK END\n");
            assert_passed(running);
        });
    }
}

#[test]
fn what_the_host_cuts_off_hurts_nobody_else() {
    support::require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, vec![b'a'; 5 << 20]).unwrap();
    let running = start(guest(folder.path(), "probe touch /mnt/file /mnt/other"));
    running.console.wait_for("HUSK touches\n");
    let file = open(&path);
    file.set_len(0).unwrap();
    running.console.wait_for("HUSK lost\n");
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(fs::read(folder.path().join("other")).unwrap(), [0; 4096]);
    file.write_all_at(b"new", 0).unwrap();
    running.console.wait_for("HUSK found\n");
    assert_passed(running);
}

#[test]
fn a_window_that_is_too_small_for_all_is_shared() {
    support::require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    // Three times the window.
    let content: Vec<u8> = (0..12_u32 << 20).flat_map(u32::to_le_bytes).collect();
    fs::write(folder.path().join("large"), &content).unwrap();
    let running = start(guest(
        folder.path(),
        "cmp /mnt/large /mnt/large || echo HUSK FAIL read\n\
         cp /mnt/large /mnt/copy || echo HUSK FAIL copy\n\
         echo -n over | dd of=/mnt/copy bs=1 seek=30000000 conv=notrunc 2>/dev/null || echo HUSK FAIL write",
    ));
    running.console.wait_for("HUSK END\n");
    assert_passed(running);
    let copy = fs::read(folder.path().join("copy")).unwrap();
    assert_eq!(copy.len(), content.len());
    assert_eq!(&copy[30_000_000..30_000_004], b"over");
    assert!(copy[..30_000_000] == content[..30_000_000]);
    assert!(copy[30_000_004..] == content[30_000_004..]);
}

/// An overlay in a folder, as the root file systems of containers are, taken apart in the end.
struct Overlay(tempfile::TempDir);

impl Overlay {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let none = None::<&str>;
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("lower/file"), [b'a'; 100]).unwrap();
        fs::write(path("lower/other"), [b'a'; 100]).unwrap();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path("lower"),
            path("upper"),
            path("work")
        );
        let merged = path("merged");
        let flags = MsFlags::empty();
        mount(
            Some("overlay"),
            merged.as_str(),
            Some("overlay"),
            flags,
            Some(options.as_str()),
        )
        .unwrap();
        Self(dir)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        for path in [self.0.path().join("merged"), self.0.path().to_owned()] {
            let _ = umount2(&path, MntFlags::MNT_DETACH);
        }
    }
}

#[test]
fn a_file_of_a_lower_layer_is_followed_to_the_upper_one() {
    support::require_kvm!();
    let overlay = Overlay::new();
    let merged = overlay.0.path().join("merged");
    let running = start(guest(
        &merged,
        "exec 3</mnt/file; is() { [ \"$2\" = \"$3\" ] || echo HUSK FAIL $1: $2; }\n\
         is before $(md5sum < /mnt/file | cut -c1-6) 36a92c\n\
         echo -n more >> /mnt/file\n\
         is after $(tail -c 5 /mnt/file) amore; is open $(tail -c 5 <&3) amore\n\
         echo -n b | dd of=/mnt/file bs=1 seek=99 conv=notrunc 2>/dev/null\n\
         is written $(tail -c 5 /mnt/file) bmore\n\
         is other $(head -c 1 /mnt/other) a; echo HUSK has read\n\
         until [ $(head -c 1 /mnt/other) = z ]; do :; done",
    ));
    running.console.wait_for("HUSK has read\n");
    // As long as it was, and the host's own work.
    open(&merged.join("other")).write_all_at(b"z", 0).unwrap();
    running.console.wait_for("HUSK END\n");
    assert_passed(running);
    let content = |name: &str| fs::read(overlay.0.path().join(name)).unwrap();
    assert!(content("upper/file").ends_with(b"abmore"));
    assert_eq!(content("lower/file"), [b'a'; 100]);
}
