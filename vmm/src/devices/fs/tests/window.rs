//! What a guest may do with the DAX window, and what becomes of it when the host does something else with the files.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::mount::{mount_bind, mount_remount};
use vm_memory::GuestAddress;

use super::newer::COPY_FILE_RANGE;
use super::*;
use crate::virtio::SharedMemory;

const CHUNK: u64 = SharedMemory::UNIT;
const PAGE: u64 = 4096;
/// Flags of FUSE_SETUPMAPPING.
const WRITE: u64 = 1;
const READ: u64 = 2;
/// FUSE_HAS_INODE_DAX in `flags2`, and FUSE_ATTR_DAX.
const HAS_INODE_DAX: u32 = 1 << 1;
const ATTR_DAX: u32 = 1 << 1;

impl Guest {
    /// With a window of four pieces.
    fn windowed() -> (Self, Arc<SharedMemory>) {
        Self::windowed_with(CachePolicy::Auto)
    }

    fn windowed_with(cache: CachePolicy) -> (Self, Arc<SharedMemory>) {
        let folder = TempDir::new().unwrap();
        let window = Arc::new(SharedMemory::new(GuestAddress(1 << 36), 4 * CHUNK).unwrap());
        let mut share = Share::new(folder.path(), cache, false).unwrap();
        share.set_window(Arc::clone(&window)).unwrap();
        let tag = Tag::try_from("husk".to_owned()).unwrap();
        let device = FsDevice::new(tag, share, VCPUS, |_| Ok(())).unwrap();
        let mut guest = Self::with(device, folder);
        guest.init();
        (guest, window)
    }

    /// A file of so many bytes of `a`, and its node.
    fn file(&mut self, name: &str, len: u64) -> u64 {
        fs::write(self.path(name), vec![b'a'; usize::try_from(len).unwrap()]).unwrap();
        self.lookup(ROOT_ID, name).unwrap().nodeid
    }

    /// As the host has it.
    fn host(&self, name: &str) -> fs::File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path(name))
            .unwrap()
    }

    /// As Linux does, which names no handle.
    fn map(&mut self, node: u64, from: u64, len: u64, flags: u64, at: u64) -> Answer {
        let body: Vec<u8> = [u64::MAX, from, len, flags, at]
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        self.ask(Opcode::SetupMapping, node, &body, 0)
    }

    fn unmap(&mut self, node: u64, pieces: &[(u64, u64)]) -> Answer {
        let mut body = u32::try_from(pieces.len()).unwrap().to_le_bytes().to_vec();
        for (at, len) in pieces {
            body.extend([at.to_le_bytes(), len.to_le_bytes()].concat());
        }
        self.ask(Opcode::RemoveMapping, node, &body, 0)
    }

    fn set_size(&mut self, node: u64, size: u64) -> Answer {
        let body = SetattrIn {
            // FATTR_SIZE
            valid: 1 << 3,
            size,
            ..SetattrIn::default()
        };
        self.ask(Opcode::Setattr, node, body.as_slice(), 256)
    }

    fn attributes(&mut self, node: u64) -> AttrOut {
        let body = GetattrIn::default();
        object(
            &self
                .ask(Opcode::Getattr, node, body.as_slice(), 256)
                .unwrap(),
        )
    }
}

/// Waits until the rights of a page are others.
fn wait_for_rights(window: &SharedMemory, at: u64, rights: &str) {
    let begun = Instant::now();
    while window.rights(at) != rights {
        assert!(begun.elapsed() < Duration::from_secs(20), "{at:#x}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_mapped_file_is_the_hosts_file() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", CHUNK + 8192);
    guest
        .map(node, CHUNK, CHUNK, READ | WRITE, 2 * CHUNK)
        .unwrap();
    assert_eq!(window.peek(2 * CHUNK), b'a');
    window.poke(2 * CHUNK, b'g');
    assert_eq!(
        fs::read(guest.path("file")).unwrap()[usize::try_from(CHUNK).unwrap()],
        b'g'
    );
    guest.host("file").write_all_at(b"h", CHUNK + 1).unwrap();
    assert_eq!(window.peek(2 * CHUNK + 1), b'h');
    assert_eq!(guest.device.metrics().mappings.get(), 1);

    guest.unmap(node, &[(2 * CHUNK, CHUNK)]).unwrap();
    assert_eq!(window.rights(2 * CHUNK), "---p");
    assert_eq!(window.filled(), 0);
}

#[test]
fn guest_is_told_which_files_it_may_map() {
    let (mut guest, _window) = Guest::windowed();
    let agreed = guest.init();
    assert_eq!(agreed.flags2, HAS_INODE_DAX);
    assert_eq!(1 << agreed.map_alignment, CHUNK);
    assert_ne!(u64::from(agreed.flags) & FsOptions::MAP_ALIGNMENT.bits(), 0);
    let node = guest.file("file", 1);
    let entry = guest.lookup(ROOT_ID, "file").unwrap();
    assert_eq!(entry.attr.flags, ATTR_DAX);
    assert_eq!(guest.attributes(node).attr.flags, ATTR_DAX);
    assert_eq!(guest.attributes(node).attr.size, 1);
    let (made, _) = guest.create(ROOT_ID, "made", FLAGS).unwrap();
    assert_eq!(made.attr.flags, ATTR_DAX);
    assert_eq!(guest.attributes(ROOT_ID).attr.flags, 0, "a folder");
    let setuid = fs::Permissions::from_mode(0o4755);
    fs::set_permissions(guest.path("file"), setuid).unwrap();
    let entry = guest.lookup(ROOT_ID, "file").unwrap();
    assert_eq!(entry.attr.flags, 0, "writes take its setuid bit away");
    let handle = GetattrIn {
        flags: 1,
        fh: 77,
        ..GetattrIn::default()
    };
    let answer = guest.ask(Opcode::Getattr, node, handle.as_slice(), 256);
    assert_eq!(answer, Err(libc::EBADF));

    let (mut guest, _window) = Guest::windowed_with(CachePolicy::None);
    assert_eq!(guest.init().flags2, HAS_INODE_DAX | DIRECT_IO_ALLOW_MMAP);
}

#[test]
fn a_user_who_may_write_without_a_request_takes_the_setuid_bit_away() {
    let (mut guest, _window) = Guest::windowed();
    let node = guest.file("file", 1);
    let set = |guest: &Guest, mode| {
        fs::set_permissions(guest.path("file"), fs::Permissions::from_mode(mode)).unwrap();
    };
    let mode = |guest: &Guest| fs::metadata(guest.path("file")).unwrap().mode() & 0o7777;
    set(&guest, 0o6777);
    guest.open(node, FLAGS).unwrap();
    assert_eq!(mode(&guest), 0o6777, "root");
    assert_eq!(guest.attributes(node).attr_valid, 0);
    guest.uid = 1000;
    guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(mode(&guest), 0o6777);
    guest.open(node, libc::O_WRONLY).unwrap();
    assert_eq!(mode(&guest), 0o777);
    assert_eq!(guest.attributes(node).attr_valid, 1);
    set(&guest, 0o6767);
    guest.create(ROOT_ID, "file", FLAGS).unwrap();
    assert_eq!(mode(&guest), 0o2767, "mandatory locking, not setgid");
}

#[test]
fn files_that_do_not_say_when_they_change_are_not_mapped() {
    let window = Arc::new(SharedMemory::new(GuestAddress(1 << 36), CHUNK).unwrap());
    let mut share = Share::new(Path::new("/proc"), CachePolicy::Auto, false).unwrap();
    share.set_window(window).unwrap();
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    let device = FsDevice::new(tag, share, VCPUS, |_| Ok(())).unwrap();
    let mut guest = Guest::with(device, TempDir::new().unwrap());
    guest.init();
    let entry = guest.lookup(ROOT_ID, "version").unwrap();
    assert_eq!(entry.attr.flags, 0);
    // Nor for one that asks nevertheless.
    let answer = guest.map(entry.nodeid, 0, CHUNK, READ, 0);
    assert_eq!(answer, Err(libc::ENODEV));
}

#[test]
fn no_piece_is_let_go_of_more_than_once_in_a_request() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", CHUNK);
    guest.map(node, 0, CHUNK, READ, 0).unwrap();
    assert_eq!(guest.unmap(node, &[(0, 4 * CHUNK)]), Ok(Vec::new()));
    assert_eq!(window.rights(0), "---p");
    let answer = guest.unmap(node, &[(0, 4 * CHUNK), (0, CHUNK)]);
    assert_eq!(answer, Err(libc::EINVAL));
}

#[test]
fn a_mapping_has_the_rights_that_are_asked_for() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", 2 * CHUNK);
    guest.map(node, 0, CHUNK, READ, 0).unwrap();
    assert_eq!(window.rights(0), "r--s");
    guest.map(node, CHUNK, CHUNK, READ | WRITE, CHUNK).unwrap();
    assert_eq!([window.rights(0), window.rights(CHUNK)], ["r--s", "rw-s"]);
    // As Linux does when it is to be written to after all.
    guest.map(node, 0, CHUNK, READ | WRITE, 0).unwrap();
    assert_eq!(window.rights(0), "rw-s");
    // What is there is replaced.
    let other = guest.file("other", CHUNK);
    guest.map(other, 0, CHUNK, READ, CHUNK).unwrap();
    assert_eq!(window.rights(CHUNK), "r--s");
    guest.unmap(node, &[(0, CHUNK), (CHUNK, CHUNK)]).unwrap();
    assert_eq!([window.rights(0), window.rights(CHUNK)], ["---p", "---p"]);
}

#[test]
fn what_is_mounted_to_be_read_is_not_mapped_to_be_written() {
    if without_root() {
        return;
    }
    with_own_mounts(|| {
        let (mut guest, window) = Guest::windowed();
        let below = guest.path("below");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("file"), "content").unwrap();
        mount_bind(&below, &below).unwrap();
        mount_remount(&below, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
        let below = guest.lookup(ROOT_ID, "below").unwrap().nodeid;
        let node = guest.lookup(below, "file").unwrap().nodeid;
        let refused = guest.map(node, 0, CHUNK, READ | WRITE, 0);
        assert_eq!(refused, Err(libc::EROFS));
        assert_eq!(window.rights(0), "---p");
        guest.map(node, 0, CHUNK, READ, 0).unwrap();
        assert_eq!(window.rights(0), "r--s");
        let refused = guest.map(node, 0, CHUNK, READ | WRITE, 0);
        assert_eq!(refused, Err(libc::EROFS));
        assert_eq!(window.rights(0), "r--s");
        unmount(guest.path("below"), UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn mappings_that_are_none_are_refused() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", CHUNK);
    for (from, len, at) in [
        (0, 0, 0),
        (PAGE, CHUNK, 0),
        (0, PAGE, 0),
        (0, CHUNK + PAGE, 0),
        (0, CHUNK, PAGE),
        (0, CHUNK, 4 * CHUNK),
        (0, 5 * CHUNK, 0),
        (0, 2 * CHUNK, 3 * CHUNK),
        (0, CHUNK, u64::MAX - CHUNK + 1),
        (u64::MAX - CHUNK + 1, CHUNK, 0),
        (1 << 63, CHUNK, 0),
        (0, u64::MAX - CHUNK + 1, 0),
        (0, u64::MAX, 0),
    ] {
        let answer = guest.map(node, from, len, READ, at);
        assert_eq!(answer, Err(libc::EINVAL), "{from:#x} {len:#x} {at:#x}");
        let answer = guest.unmap(node, &[(at | 1, len)]);
        assert_eq!(answer, Err(libc::EINVAL), "{len:#x} {at:#x}");
    }
    for flags in [0, 4, READ | 4, u64::MAX] {
        assert_eq!(guest.map(node, 0, CHUNK, flags, 0), Err(libc::EINVAL));
    }
    let answer = guest.map(ROOT_ID, 0, CHUNK, READ, 0);
    assert_eq!(answer, Err(libc::EINVAL), "a folder");
    let answer = guest.map(777, 0, CHUNK, READ, 0);
    assert_eq!(answer, Err(libc::ESTALE), "no node");
    rustix::fs::mkfifoat(rustix::fs::CWD, guest.path("fifo"), rustix::fs::Mode::RUSR).unwrap();
    let fifo = guest.lookup(ROOT_ID, "fifo").unwrap().nodeid;
    let answer = guest.map(fifo, 0, CHUNK, READ, 0);
    assert_eq!(answer, Err(libc::EINVAL), "a fifo, which holds nobody up");
    assert_eq!(window.rights(0), "---p");
    // More pieces are announced than there are.
    let answer = guest.ask(Opcode::RemoveMapping, node, &u32::MAX.to_le_bytes(), 0);
    assert_eq!(answer, Err(libc::EINVAL));
    let answer = guest.ask(Opcode::SetupMapping, node, &[0; 39], 0);
    assert_eq!(answer, Err(libc::EINVAL));
    assert_eq!(guest.device.metrics().mappings.get(), 0);
    guest.lookup(ROOT_ID, "file").unwrap();
}

#[test]
fn nothing_stays_mapped_after_the_session() {
    for end in [
        (|guest: &mut Guest| {
            // The library does not answer it.
            let header = guest.header(Opcode::Destroy as u32, 0, 0);
            let room = [size_of::<OutHeader>()];
            guest
                .driver
                .request(REQUEST_QUEUE, &[header.as_slice()], &room);
        }) as fn(&mut Guest),
        |guest| guest.device.reset(),
    ] {
        let (mut guest, window) = Guest::windowed();
        let node = guest.file("file", PAGE);
        guest.map(node, 0, CHUNK, READ, 3 * CHUNK).unwrap();
        assert_eq!(window.rights(3 * CHUNK), "r--s");
        end(&mut guest);
        assert_eq!(window.rights(3 * CHUNK), "---p");
        assert_eq!(window.rights(3 * CHUNK + PAGE), "---p");
    }
}

#[test]
fn without_a_window_nothing_is_mapped() {
    let mut guest = Guest::mounted();
    let node = guest.file("file", PAGE);
    assert_eq!(guest.init().flags2, 0);
    assert_eq!(guest.attributes(node).attr.flags, 0);
    assert_eq!(guest.map(node, 0, CHUNK, READ, 0), Err(libc::ENOSYS));
    assert_eq!(guest.unmap(node, &[(0, CHUNK)]), Err(libc::ENOSYS));
    assert!(guest.device.shared_memory().is_none());
}

#[test]
fn what_is_behind_the_end_of_a_file_is_empty_until_it_grows() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", PAGE + 1);
    guest.map(node, 0, CHUNK, READ | WRITE, 0).unwrap();
    let rights = |page: u64| window.rights(page * PAGE);
    assert_eq!([rights(1), rights(2)], ["rw-s", "rw-p"]);
    // What the guest is told of, or makes longer, is there when it knows.
    guest.host("file").set_len(3 * PAGE).unwrap();
    assert_eq!(guest.attributes(node).attr.size, 3 * PAGE);
    assert_eq!([rights(2), rights(3)], ["rw-s", "rw-p"]);
    guest.host("file").set_len(4 * PAGE).unwrap();
    guest.lookup(ROOT_ID, "file").unwrap();
    assert_eq!([rights(3), rights(4)], ["rw-s", "rw-p"]);
    let open = guest.open(node, FLAGS).unwrap();
    let end = 4 * PAGE;
    guest.write(node, open.fh, end, b"more").unwrap();
    assert_eq!(window.peek(end), b'm');
    guest.set_size(node, 7 * PAGE).unwrap();
    assert_eq!([rights(6), rights(7)], ["rw-s", "rw-p"]);
    guest.set_size(node, 1).unwrap();
    assert_eq!([rights(0), rights(1)], ["rw-s", "rw-p"]);
    assert_eq!(window.peek(PAGE), 0);
    guest.open(node, FLAGS | libc::O_TRUNC).unwrap();
    assert_eq!(rights(0), "rw-p");
    assert_eq!(window.filled(), 0);
    guest.write(node, open.fh, 0, b"anew").unwrap();
    assert_eq!(window.peek(0), b'a');
}

#[test]
fn what_the_host_cuts_off_is_empty_and_comes_back() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", CHUNK + 2 * PAGE);
    guest.map(node, 0, CHUNK, READ, 0).unwrap();
    guest.map(node, CHUNK, CHUNK, READ | WRITE, CHUNK).unwrap();
    let file = guest.host("file");
    file.set_len(CHUNK - PAGE).unwrap();
    wait_for_rights(&window, CHUNK, "rw-p");
    wait_for_rights(&window, CHUNK - PAGE, "r--p");
    assert_eq!(window.peek(CHUNK - PAGE - 1), b'a');
    assert_eq!((window.peek(CHUNK - PAGE), window.peek(CHUNK)), (0, 0));
    window.poke(CHUNK, b'l');
    file.write_all_at(b"back", CHUNK).unwrap();
    wait_for_rights(&window, CHUNK, "rw-s");
    assert_eq!((window.peek(CHUNK), window.filled()), (b'b', 0));
    // Its names have no part in it.
    fs::remove_file(guest.path("file")).unwrap();
    file.set_len(0).unwrap();
    wait_for_rights(&window, 0, "r--p");
}

#[test]
fn a_device_that_was_faster_than_the_news_sees_the_file_again() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", 2 * PAGE);
    guest.map(node, 0, CHUNK, READ | WRITE, 0).unwrap();
    let queues = guest.device.pause();
    let file = guest.host("file");
    file.set_len(0).unwrap();
    window.poke(0, 7);
    assert_eq!(window.filled(), 1);
    file.write_all_at(b"anew", PAGE).unwrap();
    guest.driver.reactivate(&mut guest.device, queues);
    wait_for_rights(&window, 0, "rw-s");
    assert_eq!((window.peek(0), window.peek(PAGE)), (0, b'a'));
}

#[test]
fn what_is_mapped_to_be_written_has_its_blocks() {
    let (mut guest, _window) = Guest::windowed();
    let node = guest.file("file", 0);
    let file = guest.host("file");
    let blocks = || file.metadata().unwrap().blocks() * 512;
    file.set_len(3 * CHUNK).unwrap();
    guest.map(node, CHUNK, CHUNK, READ, 0).unwrap();
    assert!(blocks() < CHUNK);
    guest.map(node, CHUNK, CHUNK, READ | WRITE, 0).unwrap();
    assert!((CHUNK..2 * CHUNK).contains(&blocks()), "{}", blocks());
    guest.set_size(node, CHUNK + PAGE).unwrap();
    assert!(blocks() < CHUNK);
    guest.set_size(node, 3 * CHUNK).unwrap();
    assert!(
        (CHUNK - PAGE..2 * CHUNK).contains(&blocks()),
        "{}",
        blocks()
    );
    assert_eq!(file.metadata().unwrap().len(), 3 * CHUNK);
}

#[test]
fn what_is_mapped_to_be_written_keeps_its_blocks() {
    let (mut guest, window) = Guest::windowed();
    let node = guest.file("file", 2 * CHUNK);
    let other = guest.file("other", PAGE);
    let file = guest.host("file");
    let open = guest.open(node, libc::O_RDWR).unwrap();
    let from = guest.open(other, libc::O_RDONLY).unwrap();
    let fallocate = |guest: &mut Guest, mode: i32, offset, length| {
        let body = FallocateIn {
            fh: open.fh,
            offset,
            length,
            mode: mode.cast_unsigned(),
            padding: 0,
        };
        guest.ask(Opcode::Fallocate, node, body.as_slice(), 64)
    };
    let blocks = || file.metadata().unwrap().blocks() * 512;
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    guest.map(node, 0, CHUNK, READ | WRITE, 0).unwrap();
    fallocate(&mut guest, punch, CHUNK - 64 * PAGE, 128 * PAGE).unwrap();
    assert_eq!(window.peek(CHUNK - 64 * PAGE), 0);
    // Besides the file's there may be some for lists of them.
    let gone = 32 * PAGE..=64 * PAGE;
    assert!(gone.contains(&(2 * CHUNK - blocks())), "{}", blocks());

    // What is written behind its end leaves a gap.
    guest.set_size(node, PAGE).unwrap();
    fallocate(&mut guest, 0, 3 * PAGE, PAGE).unwrap();
    assert!(blocks() >= 4 * PAGE, "{}", blocks());
    let asked = [from.fh, 0, node, open.fh, 7 * PAGE, PAGE, 0];
    let body: Vec<u8> = asked.iter().flat_map(|word| word.to_le_bytes()).collect();
    let header = guest.header(COPY_FILE_RANGE, other, body.len());
    guest
        .ask_raw(&[header.as_slice(), &body], &[size_of::<OutHeader>(), 8])
        .unwrap();
    assert_eq!(file.metadata().unwrap().len(), 8 * PAGE);
    assert!(blocks() >= 8 * PAGE, "{}", blocks());
}
