//! Tests of the file system device, by a driver that plays a guest's FUSE client, honest or not.

mod notices;
mod window;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, CreateIn, Dirent, EntryOut, FallocateIn, GetattrIn, GetxattrIn, InHeader, InitIn,
    InitIn2, InitOut, MkdirIn, MknodIn, Opcode, OpenIn, OpenOut, OutHeader, ReadIn, ReleaseIn,
    SetattrIn, SetxattrIn, WRITE_CACHE, WriteIn, WriteOut,
};
use fuse_backend_rs::api::filesystem::{FsOptions, ROOT_ID};
use proptest::prelude::*;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::thread::UnshareFlags;
use tempfile::TempDir;
use vm_memory::ByteValued;

use super::{FsDevice, HIPRIO_QUEUE, REQUEST_QUEUE, Share, Tag};
use crate::config::CachePolicy;
use crate::snapshot::Snapshot;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Buffer, Driver};

const FLAGS: i32 = libc::O_RDWR;
/// FUSE_DIRECT_IO_ALLOW_MMAP, in `flags2`.
const DIRECT_IO_ALLOW_MMAP: u32 = 1 << 4;
const VCPUS: u8 = 2;

struct Guest {
    device: FsDevice,
    driver: Driver,
    folder: TempDir,
    uid: u32,
    gid: u32,
}

type Answer = Result<Vec<u8>, i32>;

fn device(folder: &Path) -> FsDevice {
    device_with(folder, CachePolicy::Auto, false)
}

fn device_with(folder: &Path, cache: CachePolicy, writeback: bool) -> FsDevice {
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    let share = Share::new(folder, cache, writeback).unwrap();
    FsDevice::new(tag, share, VCPUS, |_| Ok(())).unwrap()
}

fn object<T: ByteValued>(bytes: &[u8]) -> T {
    let mut object = T::zeroed();
    object
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    object
}

fn named(body: &[u8], name: &str) -> Vec<u8> {
    [body, name.as_bytes(), b"\0"].concat()
}

impl Guest {
    fn new() -> Self {
        Self::caching(CachePolicy::Auto, false)
    }

    fn caching(cache: CachePolicy, writeback: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let device = device_with(folder.path(), cache, writeback);
        Self::with(device, folder)
    }

    fn with(mut device: FsDevice, folder: TempDir) -> Self {
        let driver = Driver::activate(&mut device);
        Self {
            device,
            driver,
            folder,
            uid: 0,
            gid: 0,
        }
    }

    fn mounted() -> Self {
        let mut guest = Self::new();
        guest.init();
        guest
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn header(&self, opcode: u32, node: u64, body: usize) -> InHeader {
        InHeader {
            len: u32::try_from(size_of::<InHeader>() + body).unwrap(),
            opcode,
            unique: 77,
            nodeid: node,
            uid: self.uid,
            gid: self.gid,
            ..InHeader::default()
        }
    }

    /// Sends a request, with room for `room` bytes after the header of the answer.
    fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8], room: usize) -> Answer {
        let header = self.header(opcode as u32, node, body.len());
        self.ask_raw(&[header.as_slice(), body], &[size_of::<OutHeader>(), room])
    }

    fn ask_raw(&mut self, request: &[&[u8]], room: &[usize]) -> Answer {
        let used = self.driver.request(REQUEST_QUEUE, request, room);
        assert!(used.bytes.len() >= size_of::<OutHeader>(), "no answer");
        let header: OutHeader = object(&used.bytes);
        assert_eq!(header.unique, 77);
        assert_eq!(header.len, used.written);
        if header.error != 0 {
            return Err(-header.error);
        }
        Ok(used.bytes[size_of::<OutHeader>()..].to_vec())
    }

    fn init(&mut self) -> InitOut {
        let capable = FsOptions::all().bits();
        let body = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 1 << 17,
            flags: u32::try_from(capable & u64::from(u32::MAX)).unwrap(),
        };
        let more = InitIn2 {
            flags2: u32::try_from(capable >> 32).unwrap() | DIRECT_IO_ALLOW_MMAP,
            unused: [0; 11],
        };
        let body = [body.as_slice(), more.as_slice()].concat();
        object(&self.ask(Opcode::Init, 0, &body, 256).unwrap())
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.ask(Opcode::Lookup, parent, &named(&[], name), 256)
            .map(|bytes| object(&bytes))
    }

    fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<(EntryOut, OpenOut), i32> {
        let body = CreateIn {
            flags: flags.cast_unsigned(),
            mode: libc::S_IFREG | 0o644,
            ..CreateIn::default()
        };
        let bytes = self.ask(Opcode::Create, parent, &named(body.as_slice(), name), 256)?;
        Ok((object(&bytes), object(&bytes[size_of::<EntryOut>()..])))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<OpenOut, i32> {
        let body = OpenIn {
            flags: flags.cast_unsigned(),
            ..OpenIn::default()
        };
        self.ask(Opcode::Open, node, body.as_slice(), 64)
            .map(|bytes| object(&bytes))
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32, room: usize) -> Answer {
        let body = ReadIn {
            fh,
            offset,
            size,
            flags: FLAGS.cast_unsigned(),
            ..ReadIn::default()
        };
        self.ask(Opcode::Read, node, body.as_slice(), room)
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, bytes: &[u8]) -> Result<u32, i32> {
        self.write_with(node, fh, offset, bytes, 0)
    }

    fn write_with(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        bytes: &[u8],
        fuse_flags: u32,
    ) -> Result<u32, i32> {
        let body = WriteIn {
            fh,
            offset,
            size: u32::try_from(bytes.len()).unwrap(),
            fuse_flags,
            flags: FLAGS.cast_unsigned(),
            ..WriteIn::default()
        };
        let header = self.header(
            Opcode::Write as u32,
            node,
            size_of::<WriteIn>() + bytes.len(),
        );
        // Pages, as Linux sends them.
        let mut request = vec![header.as_slice(), body.as_slice()];
        request.extend(bytes.chunks(4096));
        let answer = self.ask_raw(&request, &[size_of::<OutHeader>(), 64])?;
        Ok(object::<WriteOut>(&answer).size)
    }

    fn unlink(&mut self, parent: u64, name: &str) -> Answer {
        self.ask(Opcode::Unlink, parent, &named(&[], name), 0)
    }

    fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Answer {
        let set = SetxattrIn {
            size: u32::try_from(value.len()).unwrap(),
            flags: 0,
        };
        let body = [&named(set.as_slice(), name), value].concat();
        self.ask(Opcode::Setxattr, node, &body, 0)
    }

    fn forget(&mut self, node: u64, nlookup: u64) {
        let header = self.header(Opcode::Forget as u32, node, 8);
        let used = self.driver.request(
            HIPRIO_QUEUE,
            &[header.as_slice(), &nlookup.to_le_bytes()],
            &[],
        );
        assert_eq!(used.written, 0);
    }
}

/// Not by eprintln!, whose output is only shown for a test that fails.
fn say_skipped(reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

/// Tests that act for other users need root, as the worker has.
pub(in crate::devices) fn without_root() -> bool {
    let without = !rustix::process::geteuid().is_root();
    if without {
        say_skipped("not root, and so no files of other users can be made, and nothing mounted");
    }
    without
}

#[test]
fn configuration_space_holds_tag_and_queues() {
    let folder = TempDir::new().unwrap();
    let device = device(folder.path());
    let mut bytes = [0xff; 44];
    device.read_config(0, &mut bytes);
    assert_eq!(&bytes[..5], b"husk\0");
    assert_eq!(bytes[36..40], u32::from(VCPUS).to_le_bytes());
    assert_eq!(device.queue_max_sizes(), [128, 1024, 1024]);
    assert_eq!(bytes[40..], [0; 4]);
    assert!(Tag::try_from(String::new()).is_err());
    assert!(Tag::try_from("x".repeat(37)).is_err());
}

#[test]
fn init_agrees_to_large_requests() {
    let mut guest = Guest::new();
    let out = guest.init();
    assert_eq!((out.major, out.max_write, out.max_pages), (7, 1 << 20, 256));
    let flags = FsOptions::from_bits_truncate(u64::from(out.flags) | u64::from(out.flags2) << 32);
    assert!(flags.contains(
        FsOptions::BIG_WRITES | FsOptions::AUTO_INVAL_DATA | FsOptions::HANDLE_KILLPRIV_V2
    ));
    assert!(!flags.intersects(
        FsOptions::WRITEBACK_CACHE
            | FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::POSIX_LOCKS
            | FsOptions::FLOCK_LOCKS
            | FsOptions::EXPORT_SUPPORT
    ));
}

#[test]
fn cache_policy_is_told_to_the_guest() {
    const DIRECT_IO: u32 = 1;
    const KEEP_CACHE: u32 = 2;
    const CACHE_DIR: u32 = 8;
    const NO_FLUSH: u32 = 32;
    const DAY: u64 = 24 * 60 * 60;
    for (cache, open_flags, valid) in [
        (CachePolicy::Auto, 0, 1),
        (CachePolicy::None, DIRECT_IO, 0),
        (CachePolicy::Always, KEEP_CACHE, DAY),
    ] {
        let mut guest = Guest::caching(cache, false);
        let agreed = guest.init();
        // Without pages that are kept there are shared mappings only by this.
        let maps = u64::from(agreed.flags) & FsOptions::INIT_EXT.bits() != 0
            && agreed.flags2 == DIRECT_IO_ALLOW_MMAP;
        assert_eq!(maps, cache == CachePolicy::None);
        fs::create_dir(guest.path("container")).unwrap();
        let container = guest.lookup(ROOT_ID, "container").unwrap();
        // The folder of a container that is gone may be made again, whatever the policy.
        assert_eq!(container.entry_valid, 0, "{cache:?}");
        let flags = libc::O_CREAT | libc::O_RDWR;
        let (file, created) = guest.create(container.nodeid, "file", flags).unwrap();
        assert_eq!((file.entry_valid, file.attr_valid), (valid, valid));
        assert_eq!(created.open_flags & !NO_FLUSH, open_flags, "{cache:?}");
        let opened = guest.open(file.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(opened.open_flags, created.open_flags, "{cache:?}");
        let folder = guest.ask(
            Opcode::Opendir,
            container.nodeid,
            OpenIn::default().as_slice(),
            64,
        );
        let folder: OpenOut = object(&folder.unwrap());
        let kept = cache == CachePolicy::Always;
        let folder_flags = if kept { KEEP_CACHE | CACHE_DIR } else { 0 };
        assert_eq!(folder.open_flags, folder_flags);
        // Of names that are not there as well.
        match guest.lookup(container.nodeid, "missing") {
            Ok(missing) => assert!(kept && missing.nodeid == 0 && missing.entry_valid == DAY),
            Err(err) => assert!(!kept && err == libc::ENOENT),
        }
        assert_eq!(guest.lookup(ROOT_ID, "missing").unwrap_err(), libc::ENOENT);
    }
}

#[test]
fn writeback_is_agreed_to_where_pages_are_kept() {
    for (cache, agreed) in [
        (CachePolicy::Auto, true),
        (CachePolicy::Always, true),
        (CachePolicy::None, false),
    ] {
        let flags = Guest::caching(cache, true).init().flags;
        let flags = FsOptions::from_bits_truncate(flags.into());
        assert_eq!(flags.contains(FsOptions::WRITEBACK_CACHE), agreed);
    }
}

#[test]
fn pages_written_back_go_where_they_belong_and_may_be_read_before() {
    let mut guest = Guest::caching(CachePolicy::Auto, true);
    guest.init();
    fs::write(guest.path("file"), "0123456789").unwrap();
    let node = guest.lookup(ROOT_ID, "file").unwrap().nodeid;
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let fh = guest.open(node, flags).unwrap().fh;
    assert_eq!(guest.read(node, fh, 0, 4, 64).unwrap(), b"0123");
    let body = WriteIn {
        fh,
        offset: 4,
        size: 2,
        // Other flags than at the open are handed on to the host's file.
        flags: (flags | libc::O_NONBLOCK).cast_unsigned(),
        ..WriteIn::default()
    };
    let body = [body.as_slice(), b"xx"].concat();
    guest.ask(Opcode::Write, node, &body, 64).unwrap();
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"0123xx6789");
}

/// Runs a test in a mount namespace of its own, which the threads that it makes inherit.
pub(in crate::devices) fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
    let test = std::thread::spawn(|| {
        // SAFETY: asks for no descriptor table of its own (CLONE_FILES), which is what could be unsound.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        test();
    });
    test.join().unwrap();
}

#[test]
fn pages_for_which_there_is_no_room_are_an_error_and_no_short_write() {
    if without_root() {
        return;
    }
    with_own_mounts(|| {
        let mut guest = Guest::mounted();
        let below = guest.path("below");
        fs::create_dir(&below).unwrap();
        mount("none", &below, "tmpfs", MountFlags::empty(), c"size=64k").unwrap();
        fs::write(below.join("file"), "").unwrap();
        fs::write(below.join("rest"), [0; 14 * 4096]).unwrap();
        let folder = guest.lookup(ROOT_ID, "below").unwrap().nodeid;
        let node = guest.lookup(folder, "file").unwrap().nodeid;
        let fh = guest.open(node, FLAGS).unwrap().fh;
        let data = [7; 3 * 4096];
        let kept = guest.write_with(node, fh, 0, &data, WRITE_CACHE);
        assert_eq!(kept, Err(libc::ENOSPC));
        // Two pages are there.
        assert_eq!(guest.write(node, fh, 0, &data), Ok(2 * 4096));
        let kept = guest.write_with(node, fh, 0, &data[..8000], WRITE_CACHE);
        assert_eq!(kept, Ok(8000));
        unmount(&below, UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn file_is_found_opened_and_read() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("dir")).unwrap();
    fs::write(guest.path("dir/file"), "content").unwrap();
    let dir = guest.lookup(ROOT_ID, "dir").unwrap();
    let file = guest.lookup(dir.nodeid, "file").unwrap();
    assert_eq!(file.attr.size, 7);
    let fh = guest.open(file.nodeid, libc::O_RDONLY).unwrap().fh;
    assert_eq!(guest.read(file.nodeid, fh, 3, 4096, 4096).unwrap(), b"tent");
    assert_eq!(guest.lookup(ROOT_ID, "nothing").unwrap_err(), libc::ENOENT);
}

#[test]
fn file_is_made_and_written() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "new", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, b"hello").unwrap(), 5);
    assert_eq!(fs::read(guest.path("new")).unwrap(), b"hello");
    let again = guest.create(ROOT_ID, "new", libc::O_CREAT | libc::O_EXCL | libc::O_RDWR);
    assert_eq!(again.unwrap_err(), libc::EEXIST);
}

#[test]
fn mebibyte_is_written_and_read_in_one_request() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "big", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    let bytes: Vec<u8> = (0..1 << 20)
        .map(|i: u32| (i ^ i >> 9).to_le_bytes()[0])
        .collect();
    assert_eq!(
        guest.write(entry.nodeid, open.fh, 0, &bytes).unwrap(),
        1 << 20
    );
    let header = guest.header(Opcode::Read as u32, entry.nodeid, size_of::<ReadIn>());
    let body = ReadIn {
        fh: open.fh,
        size: 1 << 20,
        flags: FLAGS.cast_unsigned(),
        ..ReadIn::default()
    };
    let mut room = vec![size_of::<OutHeader>()];
    room.extend([4096; 256]);
    let answer = guest
        .ask_raw(&[header.as_slice(), body.as_slice()], &room)
        .unwrap();
    assert!(answer == bytes);
}

#[test]
fn files_belong_to_who_makes_them() {
    if without_root() {
        return;
    }
    let mut guest = Guest::mounted();
    fs::set_permissions(guest.folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    (guest.uid, guest.gid) = (1234, 5678);
    guest
        .create(ROOT_ID, "file", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    let dir = MkdirIn {
        mode: 0o2755,
        umask: 0,
    };
    guest
        .ask(Opcode::Mkdir, ROOT_ID, &named(dir.as_slice(), "dir"), 256)
        .unwrap();
    for name in ["file", "dir"] {
        let metadata = fs::metadata(guest.path(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678), "{name}");
    }
    // The thread is root again.
    (guest.uid, guest.gid) = (0, 0);
    guest
        .create(ROOT_ID, "root", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    assert_eq!(fs::metadata(guest.path("root")).unwrap().uid(), 0);
}

#[test]
fn files_can_be_made_by_right_of_a_supplementary_group() {
    if without_root() {
        return;
    }
    let mut guest = Guest::mounted();
    // The guest's kernel knows that user 1000 is also in group 2000; the host does not.
    fs::create_dir(guest.path("volume")).unwrap();
    std::os::unix::fs::chown(guest.path("volume"), Some(0), Some(2000)).unwrap();
    fs::set_permissions(guest.path("volume"), fs::Permissions::from_mode(0o770)).unwrap();
    let volume = guest.lookup(ROOT_ID, "volume").unwrap();
    (guest.uid, guest.gid) = (1000, 1000);
    guest
        .create(volume.nodeid, "file", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    assert_eq!(fs::metadata(guest.path("volume/file")).unwrap().uid(), 1000);
}

/// An ACL as Linux has it in an extended attribute, which lets uid 1000 read and write what nobody else may.
fn acl() -> Vec<u8> {
    let entries = [
        (1_u16, 6_u16, u32::MAX),
        (2, 6, 1000),
        (4, 0, u32::MAX),
        (16, 6, u32::MAX),
        (32, 0, u32::MAX),
    ];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn default_acl_takes_the_place_of_the_umask() {
    let mut guest = Guest::mounted();
    let modes = |guest: &mut Guest| {
        let args = CreateIn {
            flags: FLAGS.cast_unsigned(),
            mode: libc::S_IFREG | 0o666,
            umask: 0o077,
            fuse_flags: 0,
        };
        let body = named(args.as_slice(), "file");
        guest.ask(Opcode::Create, ROOT_ID, &body, 256).unwrap();
        let args = MkdirIn {
            mode: 0o777,
            umask: 0o077,
        };
        let body = named(args.as_slice(), "folder");
        guest.ask(Opcode::Mkdir, ROOT_ID, &body, 256).unwrap();
        let args = MknodIn {
            mode: libc::S_IFIFO | 0o666,
            rdev: 0,
            umask: 0o077,
            padding: 0,
        };
        let body = named(args.as_slice(), "pipe");
        guest.ask(Opcode::Mknod, ROOT_ID, &body, 256).unwrap();
        let modes = ["file", "folder", "pipe"]
            .map(|name| fs::metadata(guest.path(name)).unwrap().mode() & 0o777);
        fs::remove_file(guest.path("file")).unwrap();
        fs::remove_dir(guest.path("folder")).unwrap();
        fs::remove_file(guest.path("pipe")).unwrap();
        modes
    };
    assert_eq!(modes(&mut guest), [0o600, 0o700, 0o600]);
    guest
        .setxattr(ROOT_ID, "system.posix_acl_default", &acl())
        .unwrap();
    assert_eq!(modes(&mut guest), [0o660; 3]);
}

#[test]
fn setting_an_acl_takes_the_setgid_bit_of_a_foreign_group() {
    if without_root() {
        return;
    }
    let mut guest = Guest::mounted();
    let (entry, _) = guest.create(ROOT_ID, "file", FLAGS).unwrap();
    std::os::unix::fs::chown(guest.path("file"), Some(1000), Some(44)).unwrap();
    let mut set_as = |uid, gid| {
        fs::set_permissions(guest.path("file"), fs::Permissions::from_mode(0o2770)).unwrap();
        (guest.uid, guest.gid) = (uid, gid);
        guest
            .setxattr(entry.nodeid, "system.posix_acl_access", &acl())
            .unwrap();
        fs::metadata(guest.path("file")).unwrap().mode() & libc::S_ISGID != 0
    };
    assert!(!set_as(1000, 1000));
    assert!(set_as(1000, 44));
    assert!(set_as(0, 0));
}

#[test]
fn unlinked_file_lives_while_it_is_open() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "gone", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    guest.unlink(ROOT_ID, "gone").unwrap();
    guest
        .write(entry.nodeid, open.fh, 0, b"still here")
        .unwrap();
    assert_eq!(
        guest.read(entry.nodeid, open.fh, 0, 64, 64).unwrap(),
        b"still here"
    );
    let attr: AttrOut = object(
        &guest
            .ask(
                Opcode::Getattr,
                entry.nodeid,
                GetattrIn::default().as_slice(),
                256,
            )
            .unwrap(),
    );
    assert_eq!((attr.attr.size, attr.attr.nlink), (10, 0));
    let truncate = SetattrIn {
        valid: 1 << 3,
        size: 5,
        ..SetattrIn::default()
    };
    guest
        .ask(Opcode::Setattr, entry.nodeid, truncate.as_slice(), 256)
        .unwrap();
    assert_eq!(
        guest.read(entry.nodeid, open.fh, 0, 64, 64).unwrap(),
        b"still"
    );
    // A new file of the same name is another one.
    let (other, _) = guest
        .create(ROOT_ID, "gone", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    assert_ne!(other.nodeid, entry.nodeid);
    let release = ReleaseIn {
        fh: open.fh,
        ..ReleaseIn::default()
    };
    guest
        .ask(Opcode::Release, entry.nodeid, release.as_slice(), 0)
        .unwrap();
    guest.forget(entry.nodeid, 1);
    let attr = guest.ask(
        Opcode::Getattr,
        entry.nodeid,
        GetattrIn::default().as_slice(),
        256,
    );
    assert_eq!(attr.unwrap_err(), libc::ESTALE);
}

#[test]
fn direct_io_of_the_guest_is_about_its_own_cache() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "x", libc::O_CREAT | libc::O_RDWR | libc::O_DIRECT)
        .unwrap();
    let body = WriteIn {
        fh: open.fh,
        offset: 1,
        size: 3,
        flags: (libc::O_RDWR | libc::O_DIRECT | libc::O_APPEND).cast_unsigned(),
        ..WriteIn::default()
    };
    let body = [body.as_slice(), b"odd"].concat();
    guest.ask(Opcode::Write, entry.nodeid, &body, 64).unwrap();
    assert_eq!(fs::read(guest.path("x")).unwrap(), b"odd");
}

/// The names in an answer to READDIRPLUS, and where to go on.
fn entries(answer: &[u8]) -> (Vec<String>, u64) {
    let mut names = Vec::new();
    let (mut at, mut next) = (0, 0);
    while at < answer.len() {
        let dirent: Dirent = object(&answer[at + size_of::<EntryOut>()..]);
        let name = at + size_of::<EntryOut>() + size_of::<Dirent>();
        let len = usize::try_from(dirent.namelen).unwrap();
        names.push(String::from_utf8(answer[name..name + len].to_vec()).unwrap());
        next = dirent.off;
        at = name + len.next_multiple_of(8);
    }
    (names, next)
}

fn is_dot(name: &str) -> bool {
    name == "." || name == ".."
}

#[test]
fn folder_can_be_emptied_while_it_is_read() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("dir")).unwrap();
    for number in 0..300 {
        fs::write(guest.path(&format!("dir/f{number}")), "").unwrap();
    }
    let dir = guest.lookup(ROOT_ID, "dir").unwrap().nodeid;
    let open: OpenOut = object(
        &guest
            .ask(Opcode::Opendir, dir, OpenIn::default().as_slice(), 64)
            .unwrap(),
    );
    let mut offset = 0;
    loop {
        let body = ReadIn {
            fh: open.fh,
            offset,
            size: 4096,
            ..ReadIn::default()
        };
        let answer = guest
            .ask(Opcode::Readdirplus, dir, body.as_slice(), 4096)
            .unwrap();
        let (names, next) = entries(&answer);
        if names.is_empty() {
            break;
        }
        for name in names.iter().filter(|name| !is_dot(name)) {
            guest.unlink(dir, name).unwrap();
        }
        offset = next;
    }
    guest
        .ask(Opcode::Rmdir, ROOT_ID, &named(&[], "dir"), 0)
        .unwrap();
}

#[test]
fn names_do_not_lead_out_of_the_folder() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("dir")).unwrap();
    let dir = guest.lookup(ROOT_ID, "dir").unwrap().nodeid;
    for parent in [ROOT_ID, dir] {
        for name in ["..", "../..", "/etc/passwd", "a/b", "../etc", "/"] {
            assert_eq!(
                guest.lookup(parent, name).unwrap_err(),
                libc::EINVAL,
                "{name}"
            );
        }
        for name in ["..", ".", "../x", "/tmp/husk-escape", "a/b"] {
            assert!(
                guest
                    .create(parent, name, libc::O_CREAT | libc::O_RDWR)
                    .is_err()
            );
            assert!(guest.unlink(parent, name).is_err());
            let mkdir = named(
                MkdirIn {
                    mode: 0o755,
                    umask: 0,
                }
                .as_slice(),
                name,
            );
            assert!(guest.ask(Opcode::Mkdir, parent, &mkdir, 256).is_err());
            let link = [named(&[], name), named(&[], "target")].concat();
            assert!(guest.ask(Opcode::Symlink, parent, &link, 256).is_err());
            let rename = [named(&ROOT_ID.to_le_bytes(), "dir"), named(&[], name)].concat();
            assert!(guest.ask(Opcode::Rename, parent, &rename, 0).is_err());
        }
    }
    assert!(guest.path("dir").is_dir());
}

#[test]
fn symbolic_links_are_not_followed() {
    let mut guest = Guest::mounted();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path().join("secret"), guest.path("file")).unwrap();
    symlink(outside.path(), guest.path("folder")).unwrap();
    let file = guest.lookup(ROOT_ID, "file").unwrap();
    assert_eq!(file.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(
        guest.open(file.nodeid, libc::O_RDONLY).unwrap_err(),
        libc::EBADF
    );
    for flags in [0, libc::O_PATH, libc::O_TMPFILE, libc::O_TRUNC] {
        let opened = guest.create(ROOT_ID, "file", libc::O_CREAT | libc::O_RDWR | flags);
        assert!(opened.is_err(), "{flags:o}");
    }
    let folder = guest.lookup(ROOT_ID, "folder").unwrap();
    assert_eq!(
        guest.lookup(folder.nodeid, "secret").unwrap_err(),
        libc::ENOTDIR
    );
    assert!(
        guest
            .create(folder.nodeid, "new", libc::O_CREAT | libc::O_RDWR)
            .is_err()
    );
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn special_files_are_not_opened() {
    let mut guest = Guest::mounted();
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        guest.path("fifo"),
        rustix::fs::FileType::Fifo,
        mode,
        0,
    )
    .unwrap();
    let fifo = guest.lookup(ROOT_ID, "fifo").unwrap();
    // This would block the device for ever.
    assert_eq!(
        guest.open(fifo.nodeid, libc::O_RDONLY).unwrap_err(),
        libc::EBADF
    );
}

#[test]
fn extended_attributes_are_stored_and_absurd_sizes_do_no_harm() {
    let mut guest = Guest::mounted();
    let (entry, _) = guest
        .create(ROOT_ID, "x", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    match guest.setxattr(entry.nodeid, "user.husk", b"value") {
        Err(libc::EOPNOTSUPP) => {
            return say_skipped("the temporary folder has no user attributes");
        }
        result => result.unwrap(),
    };
    for size in [5, 4096, u32::MAX] {
        let get = GetxattrIn { size, padding: 0 };
        let value = guest
            .ask(
                Opcode::Getxattr,
                entry.nodeid,
                &named(get.as_slice(), "user.husk"),
                4096,
            )
            .unwrap();
        assert_eq!(value, b"value");
        let list = guest.ask(Opcode::Listxattr, entry.nodeid, get.as_slice(), 4096);
        if size > 9 {
            assert!(
                list.unwrap()
                    .windows(10)
                    .any(|window| window == b"user.husk\0")
            );
        }
    }
}

#[test]
fn absurd_sizes_are_refused() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "x", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    guest.write(entry.nodeid, open.fh, 0, b"abc").unwrap();
    guest
        .read(entry.nodeid, open.fh, 0, u32::MAX, 64)
        .expect_err("there is no room for that");
    guest
        .read(entry.nodeid, open.fh, u64::MAX, 64, 64)
        .expect_err("there is no such offset");
    let dir: OpenOut = object(
        &guest
            .ask(Opcode::Opendir, ROOT_ID, OpenIn::default().as_slice(), 64)
            .unwrap(),
    );
    let readdir = ReadIn {
        fh: dir.fh,
        size: u32::MAX,
        ..ReadIn::default()
    };
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        let answer = guest.ask(opcode, ROOT_ID, readdir.as_slice(), 4096);
        assert_eq!(answer.unwrap_err(), libc::ENOMEM);
    }
    // A header that claims more than there is.
    let mut header = guest.header(Opcode::Lookup as u32, ROOT_ID, 0);
    for len in [0, 39, 40, 41, 4096, 1 << 20, u32::MAX] {
        header.len = len;
        // Some are refused, some are read as a shorter name; all are answered.
        let _ = guest.ask_raw(&[header.as_slice(), b"x\0"], &[16, 256]);
    }
    // Forgetting more than there can be.
    let header = guest.header(Opcode::BatchForget as u32, 0, 8);
    let used = guest.driver.request(
        HIPRIO_QUEUE,
        &[header.as_slice(), &u32::MAX.to_le_bytes(), &[0; 4]],
        &[],
    );
    assert_eq!(used.written, 0);
    guest.forget(ROOT_ID, u64::MAX);
    guest.lookup(ROOT_ID, "x").unwrap();
}

#[test]
fn unknown_requests_are_answered() {
    let mut guest = Guest::mounted();
    for opcode in [0, 7, 48, 49, 100, 4096, u32::MAX] {
        let header = guest.header(opcode, ROOT_ID, 64);
        let answer = guest.ask_raw(&[header.as_slice(), &[0; 64]], &[16, 4096]);
        assert!(answer.is_err(), "{opcode}");
    }
}

#[test]
fn malformed_chains_are_returned_and_serving_goes_on() {
    let mut guest = Guest::mounted();
    for queue in [HIPRIO_QUEUE, REQUEST_QUEUE] {
        for chain in guest.driver.hostile_chains() {
            guest.driver.submit_raw(queue, &chain);
        }
        assert_eq!(guest.driver.request(queue, &[&[0; 39]], &[64]).written, 0);
        assert_eq!(guest.driver.request(queue, &[], &[64]).written, 0);
        // Room without end, by the same buffer again and again, would be allocated for a folder's content.
        let header = guest.header(Opcode::Statfs as u32, ROOT_ID, 0);
        let used = guest
            .driver
            .request(queue, &[header.as_slice()], &[1 << 20, 1 << 20]);
        assert_eq!(used.written, 0);
    }
    // An answer that does not fit.
    let header = guest.header(Opcode::Statfs as u32, ROOT_ID, 0);
    let used = guest
        .driver
        .request(REQUEST_QUEUE, &[header.as_slice()], &[8]);
    assert!(used.written <= 8);
    assert!(guest.device.metrics().bad_chains.get() > 10);
    guest.ask(Opcode::Statfs, ROOT_ID, &[], 256).unwrap();
}

#[test]
fn reset_closes_what_was_open() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "x", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    guest.device.reset();
    guest.driver = Driver::activate(&mut guest.device);
    guest.init();
    assert_eq!(
        guest.read(entry.nodeid, open.fh, 0, 8, 8).unwrap_err(),
        libc::EBADF
    );
    guest.lookup(ROOT_ID, "x").unwrap();
}

#[test]
fn paused_device_keeps_what_is_open() {
    let mut guest = Guest::mounted();
    let (entry, open) = guest
        .create(ROOT_ID, "x", libc::O_CREAT | libc::O_RDWR)
        .unwrap();
    let queues = guest.device.pause();
    guest.driver.reactivate(&mut guest.device, queues);
    guest.write(entry.nodeid, open.fh, 0, b"after").unwrap();
    assert_eq!(fs::read(guest.path("x")).unwrap(), b"after");
}

#[test]
fn restored_device_serves_a_guest_that_has_mounted_it() {
    let mut guest = Guest::mounted();
    fs::write(guest.path("file"), "x").unwrap();
    let queues = guest.device.pause();
    let state = guest.device.save();
    assert!(state.capable.is_some());
    let json = serde_json::to_string(&state).unwrap();
    let mut restored = device(guest.folder.path());
    restored
        .restore(serde_json::from_str(&json).unwrap())
        .unwrap();
    assert_eq!(restored.save(), state);
    guest.driver.reactivate(&mut restored, queues);
    guest.device = restored;
    guest.lookup(ROOT_ID, "file").unwrap();

    let mut other = state.clone();
    other.tag = "other".to_owned();
    assert!(guest.device.restore(other).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a guest sends, the device answers the next honest request. No opcode that makes files is among what is
    /// sent: names would be random, but they would be made.
    #[test]
    fn no_sequence_of_requests_stops_the_device(
        requests in prop::collection::vec(
            (0_u32..53, 0_u64..4, prop::collection::vec(any::<u8>(), 0..200), 0_usize..5000, any::<bool>()),
            1..40,
        )
    ) {
        let mut guest = Guest::mounted();
        fs::write(guest.path("file"), "content").unwrap();
        guest.lookup(ROOT_ID, "file").unwrap();
        for (opcode, node, mut body, room, ends) in requests {
            if ends {
                body.push(0);
            }
            let header = guest.header(opcode, node, body.len());
            guest.driver.request(REQUEST_QUEUE, &[header.as_slice(), &body], &[16, room]);
        }
        guest.init();
        prop_assert!(guest.ask(Opcode::Statfs, ROOT_ID, &[], 256).is_ok());
    }
}

#[test]
fn indirect_chains_are_served() {
    let mut guest = Guest::mounted();
    let header = guest.header(Opcode::Statfs as u32, ROOT_ID, 0);
    let head = guest.driver.make_indirect_available(
        REQUEST_QUEUE,
        &[
            Buffer::read(header.as_slice()),
            Buffer::write(16),
            Buffer::write(128),
        ],
    );
    guest.driver.kick_if_wanted(REQUEST_QUEUE);
    let used = guest.driver.wait_used(REQUEST_QUEUE, head);
    assert!(used.written > 16);
}

/// What the library does not know is served all the same.
mod newer {
    use super::*;

    pub(super) const COPY_FILE_RANGE: u32 = 47;
    const SYNCFS: u32 = 50;
    const TMPFILE: u32 = 51;
    const STATX: u32 = 52;

    fn ask(guest: &mut Guest, opcode: u32, node: u64, body: &[u8], room: usize) -> Answer {
        let header = guest.header(opcode, node, body.len());
        guest.ask_raw(&[header.as_slice(), body], &[size_of::<OutHeader>(), room])
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn range_is_copied_on_the_host() {
        let mut guest = Guest::mounted();
        fs::write(guest.path("from"), "0123456789").unwrap();
        let from = guest.lookup(ROOT_ID, "from").unwrap().nodeid;
        let from_fh = guest.open(from, libc::O_RDONLY).unwrap().fh;
        let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_APPEND;
        let (to, open) = guest.create(ROOT_ID, "to", flags).unwrap();
        let mut copy = |from_fh, len, flags| {
            let body = words(&[from_fh, 2, to.nodeid, open.fh, 1, len, flags]);
            let answer = ask(&mut guest, COPY_FILE_RANGE, from, &body, 8)?;
            Ok::<_, i32>(object::<WriteOut>(&answer).size)
        };
        assert_eq!(copy(from_fh, 5, 0), Ok(5));
        assert_eq!(copy(from_fh, u64::MAX, 0), Ok(8));
        assert_eq!(copy(from_fh, 5, 1), Err(libc::EINVAL));
        assert_eq!(copy(open.fh, 5, 0), Err(libc::EBADF));
        assert_eq!(fs::read(guest.path("to")).unwrap(), b"\x0023456789");
    }

    #[test]
    fn file_without_a_name_is_made_and_given_one() {
        let mut guest = Guest::mounted();
        let body = CreateIn {
            flags: libc::O_RDWR.cast_unsigned(),
            mode: libc::S_IFREG | 0o640,
            umask: 0o22,
            ..CreateIn::default()
        };
        let answer = match ask(&mut guest, TMPFILE, ROOT_ID, body.as_slice(), 256) {
            Err(libc::EOPNOTSUPP) => return say_skipped("the temporary folder has no O_TMPFILE"),
            answer => answer.unwrap(),
        };
        let entry: EntryOut = object(&answer);
        let open: OpenOut = object(&answer[size_of::<EntryOut>()..]);
        assert_eq!((entry.attr.nlink, entry.attr.mode & 0o777), (0, 0o640));
        guest.write(entry.nodeid, open.fh, 0, b"content").unwrap();
        assert_eq!(fs::read_dir(guest.folder.path()).unwrap().count(), 0);
        let link = named(&entry.nodeid.to_le_bytes(), "name");
        guest.ask(Opcode::Link, ROOT_ID, &link, 256).unwrap();
        assert_eq!(fs::read(guest.path("name")).unwrap(), b"content");
    }

    #[test]
    fn time_of_birth_is_told() {
        let mut guest = Guest::mounted();
        fs::write(guest.path("file"), "content").unwrap();
        let file = guest.lookup(ROOT_ID, "file").unwrap().nodeid;
        let body = words(&[0, 0, u64::from(libc::STATX_BTIME) << 32]);
        let answer = ask(&mut guest, STATX, file, &body, 512).unwrap();
        assert_eq!(answer.len(), 32 + 256);
        let stat = &answer[32..];
        let word = |at: usize| u64::from_le_bytes(stat[at..at + 8].try_into().unwrap());
        let metadata = fs::metadata(guest.path("file")).unwrap();
        assert_eq!((word(32), word(40)), (metadata.ino(), 7));
        assert_eq!(word(112).cast_signed(), metadata.mtime());
        let Ok(born) = metadata.created() else {
            return say_skipped("the temporary folder tells no time of birth");
        };
        let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(
            (word(80), word(88)),
            (born.as_secs(), born.subsec_nanos().into())
        );
    }

    #[test]
    fn file_system_is_synced_and_what_is_not_one_is_not() {
        let mut guest = Guest::mounted();
        ask(&mut guest, SYNCFS, ROOT_ID, &[0; 8], 0).unwrap();
    }

    #[test]
    fn requests_cut_short_are_refused() {
        let mut guest = Guest::mounted();
        for opcode in [COPY_FILE_RANGE, TMPFILE, STATX] {
            for len in [0, 7, 12, 23] {
                let answer = ask(&mut guest, opcode, ROOT_ID, &vec![0; len], 512);
                assert!(answer.is_err(), "{opcode} {len}");
            }
        }
    }
}

#[test]
fn queues_are_served_beside_one_another() {
    let mut guest = Guest::mounted();
    fs::write(guest.path("file"), "content").unwrap();
    let file = guest.lookup(ROOT_ID, "file").unwrap().nodeid;
    let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
    // What one has opened is open for the other; it ends with the reset, whichever queue it came by.
    let body = ReadIn {
        fh,
        size: 64,
        ..ReadIn::default()
    };
    let header = guest.header(Opcode::Read as u32, file, size_of::<ReadIn>());
    let other = REQUEST_QUEUE + 1;
    let read = |guest: &mut Guest| {
        let request: [&[u8]; 2] = [header.as_slice(), body.as_slice()];
        let used = guest.driver.request(other, &request, &[16, 64]);
        object::<OutHeader>(&used.bytes).error
    };
    assert_eq!(read(&mut guest), 0);
    guest.device.reset();
    guest.driver = Driver::activate(&mut guest.device);
    guest.init();
    assert_eq!(read(&mut guest), -libc::EBADF);
}
