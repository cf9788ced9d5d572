//! Tests of the 9P device, by a driver that plays a guest's 9P client, honest or not.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use super::message::{Answer as Body, HEADER_LEN, NONE};
use super::server::MAX_MSIZE;
use super::{P9Device, REQUEST_QUEUE};
use crate::config::CachePolicy;
use crate::devices::fs::tests::{with_own_mounts, without_root};
use crate::devices::fs::{Share, Tag};
use crate::snapshot::Snapshot;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;

const TAG: u16 = 77;
const ROOT: u32 = 0;

/// Types of requests.
const STATFS: u8 = 8;
const OPEN: u8 = 12;
const CREATE: u8 = 14;
const SYMLINK: u8 = 16;
const MKNOD: u8 = 18;
const RENAME: u8 = 20;
const READLINK: u8 = 22;
const GETATTR: u8 = 24;
const SETATTR: u8 = 26;
const XATTR_WALK: u8 = 30;
const XATTR_CREATE: u8 = 32;
const READDIR: u8 = 40;
const FSYNC: u8 = 50;
const LOCK: u8 = 52;
const GETLOCK: u8 = 54;
const LINK: u8 = 70;
const MKDIR: u8 = 72;
const RENAME_AT: u8 = 74;
const UNLINK_AT: u8 = 76;
const VERSION: u8 = 100;
const AUTH: u8 = 102;
const ATTACH: u8 = 104;
const FLUSH: u8 = 108;
const WALK: u8 = 110;
const READ: u8 = 116;
const WRITE: u8 = 118;
const CLUNK: u8 = 120;
const REMOVE: u8 = 122;

const RDWR: u32 = 2;

struct Guest {
    device: P9Device,
    driver: Driver,
    folder: TempDir,
}

/// The body of an answer, or an errno.
type Answer = Result<Vec<u8>, i32>;

fn device(folder: &TempDir) -> P9Device {
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    let share = Share::new(folder.path(), CachePolicy::None, false).unwrap();
    P9Device::new(tag, share, |_| Ok(())).unwrap()
}

fn body() -> Body {
    Body::default()
}

fn fid(fid: u32) -> Body {
    body().u32(fid)
}

fn message(kind: u8, body: &Body) -> Vec<u8> {
    let len = u32::try_from(HEADER_LEN + body.as_bytes().len()).unwrap();
    let head = Body::default().u32(len).u8(kind).u16(TAG);
    head.bytes(body.as_bytes()).as_bytes().to_vec()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Guest {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let mut device = device(&folder);
        let driver = Driver::activate(&mut device);
        Self {
            device,
            driver,
            folder,
        }
    }

    /// Version and root are agreed on.
    fn attached() -> Self {
        let mut guest = Self::new();
        guest.version(8192).unwrap();
        guest.attach(ROOT, 0).unwrap();
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ask(&mut self, kind: u8, body: &Body) -> Answer {
        let used = self
            .driver
            .request(REQUEST_QUEUE, &[&message(kind, body)], &[8192]);
        let answer = used.bytes;
        assert!(answer.len() >= HEADER_LEN, "no answer");
        assert_eq!(u32_at(&answer, 0), used.written);
        assert_eq!(answer[5..7], TAG.to_le_bytes());
        match answer[4] {
            7 => Err(i32::try_from(u32_at(&answer, HEADER_LEN)).unwrap()),
            found => {
                assert_eq!(found, kind + 1);
                Ok(answer[HEADER_LEN..].to_vec())
            }
        }
    }

    fn version(&mut self, msize: u32) -> Answer {
        self.ask(VERSION, &body().u32(msize).string(b"9P2000.L"))
    }

    fn attach(&mut self, new: u32, user: u32) -> Answer {
        let wanted = fid(new).u32(NONE).string(b"").string(b"").u32(user);
        self.ask(ATTACH, &wanted)
    }

    fn walk(&mut self, from: u32, new: u32, names: &[&[u8]]) -> Answer {
        let count = u16::try_from(names.len()).unwrap();
        let start = fid(from).u32(new).u16(count);
        let all = names.iter().fold(start, |body, name| body.string(name));
        self.ask(WALK, &all)
    }

    fn open(&mut self, file: u32, flags: u32) -> Answer {
        self.ask(OPEN, &fid(file).u32(flags))
    }

    /// Walks from the root to `name`, and opens that.
    fn open_at(&mut self, file: u32, name: &str, flags: u32) {
        self.walk(ROOT, file, &[name.as_bytes()]).unwrap();
        self.open(file, flags).unwrap();
    }

    /// Makes a file, for which `new` stands then.
    fn create(&mut self, new: u32, name: &[u8]) -> Answer {
        self.walk(ROOT, new, &[]).unwrap();
        let wanted = fid(new).string(name).u32(RDWR).u32(0o640).u32(0);
        self.ask(CREATE, &wanted)
    }

    fn read(&mut self, file: u32, offset: u64, count: u32) -> Answer {
        self.data(READ, file, offset, count)
    }

    fn data(&mut self, kind: u8, file: u32, offset: u64, count: u32) -> Answer {
        let answer = self.ask(kind, &fid(file).u64(offset).u32(count))?;
        assert_eq!(u32_at(&answer, 0) as usize, answer.len() - 4);
        Ok(answer[4..].to_vec())
    }

    fn write(&mut self, file: u32, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let count = u32::try_from(data.len()).unwrap();
        let answer = self.ask(WRITE, &fid(file).u64(offset).u32(count).bytes(data))?;
        Ok(u32_at(&answer, 0))
    }

    fn sync(&mut self, file: u32) -> Answer {
        self.ask(FSYNC, &fid(file).u32(0))
    }

    fn clunk(&mut self, file: u32) -> Answer {
        self.ask(CLUNK, &fid(file))
    }

    fn unlink(&mut self, name: &[u8], flags: i32) -> Answer {
        self.ask(
            UNLINK_AT,
            &fid(ROOT).string(name).u32(flags.cast_unsigned()),
        )
    }

    fn attributes(&mut self, file: u32) -> Answer {
        self.ask(GETATTR, &fid(file).u64(0x7ff))
    }

    /// All names of a folder that is open, read in pieces of at most `count` bytes.
    fn names(&mut self, dir: u32, count: u32) -> BTreeSet<Vec<u8>> {
        let (mut names, mut offset) = (BTreeSet::new(), 0);
        loop {
            let piece = self.data(READDIR, dir, offset, count).unwrap();
            assert!(piece.len() <= count as usize);
            if piece.is_empty() {
                return names;
            }
            let mut rest = piece.as_slice();
            while !rest.is_empty() {
                offset = u64_at(rest, 13);
                let len = usize::from(u16::from_le_bytes([rest[22], rest[23]]));
                assert!(names.insert(rest[24..24 + len].to_vec()), "a name twice");
                rest = &rest[24 + len..];
            }
        }
    }

    /// Fids and open files.
    fn held(&self) -> [u64; 2] {
        let mut all = std::collections::BTreeMap::new();
        self.device.metrics().collect("husk", &mut all);
        ["p9_husk_fids", "p9_husk_open_files"].map(|name| all[name])
    }
}

#[test]
fn configuration_space_holds_the_tag() {
    let folder = TempDir::new().unwrap();
    let mut bytes = [0xff; 8];
    device(&folder).read_config(0, &mut bytes);
    assert_eq!(&bytes[..6], b"\x04\0husk");
}

#[test]
fn version_is_agreed_on_before_all_else() {
    let mut guest = Guest::new();
    assert_eq!(guest.attach(ROOT, 0), Err(libc::EPROTO));
    let answer = guest.version(u32::MAX).unwrap();
    assert_eq!(u32_at(&answer, 0) as usize, MAX_MSIZE);
    assert_eq!(&answer[4..], b"\x08\x009P2000.L");
    assert_eq!(u32_at(&guest.version(5000).unwrap(), 0), 5000);
    assert_eq!(guest.version(4095), Err(libc::EMSGSIZE));
    guest.attach(ROOT, 0).unwrap_err();
    let other = body().u32(8192).string(b"9P2000.u");
    assert_eq!(&guest.ask(VERSION, &other).unwrap()[4..], b"\x07\0unknown");
    assert_eq!(guest.attach(ROOT, 0), Err(libc::EPROTO));
    // There is nobody to authenticate to.
    let auth = fid(5).string(b"").string(b"").u32(0);
    assert_eq!(guest.ask(AUTH, &auth), Err(libc::EOPNOTSUPP));
}

#[test]
fn a_file_is_made_written_read_and_removed() {
    let mut guest = Guest::attached();
    let answer = guest.create(1, b"file").unwrap();
    assert_eq!((answer[0], answer.len()), (0, 13 + 4));
    assert_eq!(guest.write(1, 0, b"some words").unwrap(), 10);
    assert_eq!(guest.write(1, 5, b"w").unwrap(), 1);
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"some words");
    assert_eq!(guest.read(1, 5, 100).unwrap(), b"words");
    assert_eq!(guest.read(1, 10, 100).unwrap(), b"");
    assert_eq!(guest.read(1, u64::MAX, 1), Err(libc::EINVAL));
    for data_only in [0, 1] {
        guest.ask(FSYNC, &fid(1).u32(data_only)).unwrap();
    }
    guest.clunk(1).unwrap();
    assert_eq!(guest.read(1, 0, 1), Err(libc::EBADF));
    let metadata = fs::metadata(guest.path("file")).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o640);

    guest.open_at(1, "file", 0o1000 | RDWR);
    assert_eq!(
        fs::metadata(guest.path("file")).unwrap().len(),
        0,
        "O_TRUNC"
    );
    guest.unlink(b"file", 0).unwrap();
    assert_eq!(guest.walk(ROOT, 2, &[b"file"]), Err(libc::ENOENT));
}

#[test]
fn file_lives_on_without_a_name() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    guest.write(1, 0, b"kept").unwrap();
    guest.walk(ROOT, 2, &[b"file"]).unwrap();
    guest.unlink(b"file", 0).unwrap();
    assert_eq!(guest.read(1, 0, 9).unwrap(), b"kept");
    // One that was not open, too.
    assert_eq!(u64_at(&guest.attributes(2).unwrap(), 49), 4);
    guest.open(2, 0).unwrap();
    assert_eq!(guest.read(2, 0, 9).unwrap(), b"kept");
}

#[test]
fn names_do_not_lead_out_of_the_folder() {
    let mut guest = Guest::attached();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), guest.path("link")).unwrap();
    fs::create_dir(guest.path("dir")).unwrap();
    let names: [&[u8]; 6] = [b"..", b".", b"", b"dir/x", b"/etc", b"nul\0"];
    for name in names {
        assert_eq!(guest.walk(ROOT, 1, &[name]), Err(libc::EINVAL), "{name:?}");
        assert_eq!(guest.walk(ROOT, 1, &[b"dir", name]), Err(libc::EINVAL));
        guest.create(1, name).unwrap_err();
        guest.clunk(1).unwrap();
        assert_eq!(guest.unlink(name, 0), Err(libc::EINVAL));
    }
    // A symbolic link is a file, and none that has others in it.
    assert_eq!(guest.walk(ROOT, 1, &[b"link", b"secret"]).unwrap()[0], 1);
    guest.walk(1, 2, &[]).unwrap_err();
    guest.walk(ROOT, 1, &[b"link"]).unwrap();
    guest.open(1, 0).unwrap_err();
    guest.walk(1, 2, &[b"secret"]).unwrap_err();
    assert_eq!(
        guest.walk(ROOT, 3, &[&[b'x'; 256]]),
        Err(libc::ENAMETOOLONG)
    );
    guest.create(4, &[b'x'; 255]).unwrap();
}

#[test]
fn walk_tells_how_far_it_came() {
    let mut guest = Guest::attached();
    fs::create_dir_all(guest.path("a/b")).unwrap();
    let whole = guest.walk(ROOT, 1, &[b"a", b"b"]).unwrap();
    assert_eq!((whole[0], whole.len()), (2, 2 + 2 * 13));
    assert_eq!(whole[2], 0x80, "a folder");
    assert_ne!(u64_at(&whole, 7), u64_at(&whole, 20));
    let part = guest.walk(ROOT, 2, &[b"a", b"none", b"b"]).unwrap();
    assert_eq!((part[0], part.len()), (1, 2 + 13));
    assert_eq!(guest.clunk(2), Err(libc::EBADF), "no fid of a part");
    assert_eq!(guest.walk(ROOT, 2, &[b"none"]), Err(libc::ENOENT));
    assert_eq!(
        guest.walk(ROOT, 2, &[b"a".as_slice(); 17]),
        Err(libc::EINVAL)
    );
    assert_eq!(guest.walk(ROOT, 1, &[]), Err(libc::EINVAL), "taken");
    assert_eq!(guest.walk(ROOT, NONE, &[]), Err(libc::EINVAL));
    assert_eq!(guest.walk(9, 2, &[]), Err(libc::EBADF));
    // In its own place.
    guest.walk(1, 1, &[]).unwrap();
}

#[test]
fn folders_links_and_devices_are_made() {
    let mut guest = Guest::attached();
    let wanted = fid(ROOT).string(b"dir").u32(0o750).u32(0);
    assert_eq!(guest.ask(MKDIR, &wanted).unwrap()[0], 0x80);
    assert_eq!(guest.ask(MKDIR, &wanted), Err(libc::EEXIST));
    let wanted = fid(ROOT).string(b"link").string(b"../any/where").u32(0);
    assert_eq!(guest.ask(SYMLINK, &wanted).unwrap()[0], 0x02);
    guest.walk(ROOT, 1, &[b"link"]).unwrap();
    assert_eq!(guest.ask(READLINK, &fid(1)).unwrap(), b"\x0c\0../any/where");
    let fifo = fid(ROOT).string(b"fifo").u32(libc::S_IFIFO | 0o600);
    guest.ask(MKNOD, &fifo.u32(0).u32(0).u32(0)).unwrap();
    let found = fs::symlink_metadata(guest.path("fifo")).unwrap();
    assert!(found.file_type().is_fifo());

    guest.create(2, b"file").unwrap();
    let wanted = fid(ROOT).u32(2).string(b"second");
    guest.ask(LINK, &wanted).unwrap();
    assert_eq!(fs::metadata(guest.path("file")).unwrap().nlink(), 2);
    guest.walk(ROOT, 3, &[b"dir"]).unwrap();
    let wanted = fid(ROOT).string(b"second").u32(3).string(b"moved");
    guest.ask(RENAME_AT, &wanted).unwrap();
    assert!(guest.path("dir/moved").exists());
    assert_eq!(
        guest.unlink(b"dir", libc::AT_REMOVEDIR),
        Err(libc::ENOTEMPTY)
    );
    assert_eq!(guest.unlink(b"dir", 0), Err(libc::EISDIR));
    assert_eq!(guest.unlink(b"dir", 7), Err(libc::EINVAL));

    // Linux uses the ones with a name after this.
    let wanted = fid(2).u32(3).string(b"name");
    assert_eq!(guest.ask(RENAME, &wanted), Err(libc::EOPNOTSUPP));
    assert_eq!(guest.ask(REMOVE, &fid(2)), Err(libc::EOPNOTSUPP));
    assert_eq!(guest.clunk(2), Err(libc::EBADF), "a remove clunks");
}

#[test]
fn attributes_are_told_and_set() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    let set = |valid: u32, mode: u32, size: u64, seconds: u64, nanoseconds: u64| {
        let times = [seconds, nanoseconds, seconds, nanoseconds];
        let start = fid(1).u32(valid).u32(mode).u32(0).u32(0).u64(size);
        times.into_iter().fold(start, Body::u64)
    };
    let before_1970 = (-5_i64).cast_unsigned();
    guest
        .ask(
            SETATTR,
            &set(0x1 | 0x8 | 0x1b0, 0o604, 5000, before_1970, 7),
        )
        .unwrap();
    let found = fs::metadata(guest.path("file")).unwrap();
    assert_eq!((found.mode() & 0o7777, found.len()), (0o604, 5000));
    assert_eq!((found.mtime(), found.mtime_nsec()), (-5, 7));
    assert_eq!((found.atime(), found.atime_nsec()), (-5, 7));

    let told = guest.attributes(1).unwrap();
    assert_eq!(u64_at(&told, 0), 0x7ff);
    assert_eq!(u32_at(&told, 21), found.mode());
    assert_eq!(
        (u32_at(&told, 25), u32_at(&told, 29)),
        (found.uid(), found.gid())
    );
    assert_eq!(u64_at(&told, 33), 1, "links");
    assert_eq!(u64_at(&told, 49), 5000);
    assert_eq!(u64_at(&told, 65), found.blocks());
    assert_eq!(u64_at(&told, 89).cast_signed(), -5, "seconds of mtime");
    assert_eq!(told.len(), 153);

    // Now.
    guest.ask(SETATTR, &set(0x20, 0, 0, 0, 0)).unwrap();
    assert!(fs::metadata(guest.path("file")).unwrap().mtime() > 1_000_000_000);
    for bad in [
        set(0x1b0, 0, 0, 0, 1_000_000_000),
        set(0x1b0, 0, 0, 0, u64::MAX),
        set(0x8, 0, u64::MAX, 0, 0),
    ] {
        assert_eq!(guest.ask(SETATTR, &bad), Err(libc::EINVAL));
    }
    let told = guest.ask(STATFS, &fid(ROOT)).unwrap();
    assert_eq!((told.len(), u32_at(&told, 56)), (60, 255));
}

#[test]
fn files_are_their_makers() {
    if without_root() {
        return;
    }
    let mut guest = Guest::attached();
    fs::set_permissions(
        guest.folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    guest.attach(1, 1234).unwrap();
    guest.walk(1, 2, &[]).unwrap();
    let wanted = fid(2).string(b"file").u32(RDWR).u32(0o644).u32(567);
    guest.ask(CREATE, &wanted).unwrap();
    let wanted = fid(1).string(b"dir").u32(0o755).u32(568);
    guest.ask(MKDIR, &wanted).unwrap();
    let owners = ["file", "dir"].map(|name| {
        let found = fs::metadata(guest.path(name)).unwrap();
        (found.uid(), found.gid())
    });
    assert_eq!(owners, [(1234, 567), (1234, 568)]);
}

#[test]
fn folder_lists_each_name_once() {
    let mut guest = Guest::attached();
    let mut expected = BTreeSet::from([b".".to_vec(), b"..".to_vec()]);
    for number in 0..100_u8 {
        let mut name = b"a name of some length \xff\xfe ".to_vec();
        name.extend(number.to_string().bytes());
        let path = guest.folder.path().join(std::ffi::OsStr::from_bytes(&name));
        fs::write(path, "").unwrap();
        expected.insert(name);
    }
    guest.walk(ROOT, 1, &[]).unwrap();
    assert_eq!(guest.data(READDIR, 1, 0, 4096), Err(libc::EBADF), "closed");
    guest.open(1, 0o200_000).unwrap();
    for count in [200, 4096, 8000] {
        assert_eq!(guest.names(1, count), expected, "{count}");
    }
    assert_eq!(guest.data(READDIR, 1, 0, 10), Err(libc::EINVAL), "no room");
    assert_eq!(guest.read(1, 0, 10), Err(libc::EISDIR));
    guest.create(2, b"file").unwrap();
    assert_eq!(guest.data(READDIR, 2, 0, 4096), Err(libc::ENOTDIR));
}

#[test]
fn extended_attributes_are_written_and_read() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    let set = |guest: &mut Guest, value: &[u8], flags: u32| {
        guest.walk(ROOT, 2, &[b"file"]).unwrap();
        let len = value.len() as u64;
        guest.ask(
            XATTR_CREATE,
            &fid(2).string(b"user.husk").u64(len).u32(flags),
        )?;
        for (index, piece) in value.chunks(3).enumerate() {
            guest.write(2, 3 * index as u64, piece).unwrap();
        }
        guest.clunk(2)
    };
    let get = |guest: &mut Guest, name: &[u8]| {
        let told = guest.ask(XATTR_WALK, &fid(1).u32(3).string(name))?;
        let value = guest.read(3, 0, 4096).unwrap();
        assert_eq!(u64_at(&told, 0), value.len() as u64);
        assert_eq!(guest.read(3, 2, 4096).unwrap(), value[2..]);
        guest.clunk(3).unwrap();
        Ok(value)
    };
    match set(&mut guest, b"a value", 0) {
        Err(libc::EOPNOTSUPP) => {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: the temporary folder has no user attributes"
            );
            return;
        }
        result => result.unwrap(),
    };
    assert_eq!(get(&mut guest, b"user.husk").unwrap(), b"a value");
    let list = get(&mut guest, b"").unwrap();
    assert!(list.windows(10).any(|name| name == b"user.husk\0"));
    assert_eq!(get(&mut guest, b"user.none"), Err(libc::ENODATA));
    // XATTR_CREATE.
    assert_eq!(set(&mut guest, b"other", 1), Err(libc::EEXIST));
    // Nothing in the place of something is how Linux removes one.
    set(&mut guest, b"", 2).unwrap();
    assert_eq!(get(&mut guest, b"user.husk"), Err(libc::ENODATA));

    // Not as long as was said.
    guest.walk(ROOT, 4, &[b"file"]).unwrap();
    guest
        .ask(XATTR_CREATE, &fid(4).string(b"user.husk").u64(5).u32(0))
        .unwrap();
    assert_eq!(guest.write(4, 1, b"x"), Err(libc::EINVAL));
    assert_eq!(guest.write(4, 0, b"longer"), Err(libc::EINVAL));
    guest.write(4, 0, b"four").unwrap();
    assert_eq!(guest.clunk(4), Err(libc::EINVAL));
    guest.walk(ROOT, 4, &[b"file"]).unwrap();
    let huge = fid(4).string(b"user.husk").u64(1 << 40).u32(0);
    assert_eq!(guest.ask(XATTR_CREATE, &huge), Err(libc::E2BIG));
    assert_eq!(guest.held()[0], 3);
}

#[test]
fn locks_are_the_guests_own() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    let wanted = fid(1).u8(1).u32(0).u64(0).u64(0).u32(42).string(b"client");
    assert_eq!(guest.ask(LOCK, &wanted).unwrap(), [0]);
    let wanted = fid(1).u8(1).u64(3).u64(4).u32(42).string(b"client");
    let told = guest.ask(GETLOCK, &wanted).unwrap();
    assert_eq!((told[0], u64_at(&told, 1), u64_at(&told, 9)), (2, 3, 4));
}

#[test]
fn everything_is_given_back() {
    for end in [
        (|guest: &mut Guest| {
            for fid in 0..5 {
                guest.clunk(fid).unwrap();
            }
        }) as fn(&mut Guest),
        |guest| drop(guest.version(8192).unwrap()),
        |guest| guest.device.reset(),
    ] {
        let mut guest = Guest::attached();
        fs::create_dir(guest.path("dir")).unwrap();
        guest.create(1, b"file").unwrap();
        guest.open_at(2, "file", 0);
        guest.open_at(3, "dir", 0);
        guest.walk(ROOT, 4, &[b"file"]).unwrap();
        assert_eq!(guest.held(), [5, 3]);
        end(&mut guest);
        assert_eq!(guest.held(), [0, 0]);
    }
}

#[test]
fn state_is_saved_and_goes_on() {
    let mut guest = Guest::attached();
    guest.attach(7, 1000).unwrap();
    guest.create(1, b"file").unwrap();
    let queues = guest.device.pause();
    let state = guest.device.save();
    assert_eq!(state.msize, Some(8192));
    assert_eq!(state.roots, [(ROOT, 0), (7, 1000)]);

    let Guest { driver, folder, .. } = guest;
    let mut device = device(&folder);
    device.restore(state.clone()).unwrap();
    assert_eq!(device.save(), state);
    driver.reactivate(&mut device, queues);
    let mut guest = Guest {
        device,
        driver,
        folder,
    };
    guest.walk(7, 2, &[b"file"]).unwrap();
    assert_eq!(guest.read(1, 0, 1), Err(libc::EBADF), "stale");

    for msize in [0, MAX_MSIZE + 1] {
        let bad = super::P9State {
            msize: Some(msize),
            ..state.clone()
        };
        assert!(guest.device.restore(bad).is_err());
    }
}

#[test]
fn malformed_messages_are_answered_with_an_error() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    let mut ask_raw = |bytes: &[u8]| {
        let used = guest.driver.request(REQUEST_QUEUE, &[bytes], &[64]);
        assert_eq!((used.bytes[4], used.written), (7, 11), "{bytes:?}");
        i32::try_from(u32_at(&used.bytes, 7)).unwrap()
    };
    let whole = message(STATFS, &fid(ROOT));
    let with_len = |len: u32| [&len.to_le_bytes(), &whole[4..]].concat();
    for len in [0, 6, 10, 12, u32::MAX] {
        assert_eq!(ask_raw(&with_len(len)), libc::EPROTO, "{len}");
    }
    for kind in [0, 6, 7, 9, 101, 117, 255] {
        let bytes = message(kind, &fid(ROOT));
        assert_eq!(ask_raw(&bytes), libc::EOPNOTSUPP, "{kind}");
    }
    // A name that is longer than the message, and bytes that nobody asked for.
    let wanted = fid(ROOT).u32(2).u16(1).u16(500).bytes(b"short");
    assert_eq!(ask_raw(&message(WALK, &wanted)), libc::EPROTO);
    let wanted = fid(ROOT).u32(2).u16(0).u8(0);
    assert_eq!(ask_raw(&message(WALK, &wanted)), libc::EPROTO);
    // More and less data than is counted.
    for count in [3, 5, u32::MAX] {
        let wanted = fid(1).u64(0).u32(count).bytes(b"four");
        assert_eq!(ask_raw(&message(WRITE, &wanted)), libc::EPROTO);
    }
    assert_eq!(fs::metadata(guest.path("file")).unwrap().len(), 0);
    // Flushing what is long answered.
    assert_eq!(guest.ask(FLUSH, &body().u16(3)).unwrap(), b"");
}

#[test]
fn chains_without_a_header_or_room_are_counted() {
    let mut guest = Guest::attached();
    let whole = message(STATFS, &fid(ROOT));
    let requests: [(&[u8], usize); 4] = [(&whole, 10), (&whole, 0), (&whole[..6], 64), (b"", 64)];
    for (bytes, room) in requests {
        let request: &[&[u8]] = if bytes.is_empty() { &[] } else { &[bytes] };
        let room: &[usize] = if room == 0 { &[] } else { &[room] };
        let used = guest.driver.request(REQUEST_QUEUE, request, room);
        assert_eq!(used.written, 0);
    }
    assert_eq!(guest.device.metrics().bad_chains.get(), 4);
    // An answer that does not fit is an error that does.
    let used = guest.driver.request(REQUEST_QUEUE, &[&whole], &[20]);
    assert_eq!((used.bytes[4], used.written), (7, 11));
}

#[test]
fn a_read_takes_no_more_than_its_room() {
    let mut guest = Guest::attached();
    fs::write(guest.path("file"), vec![7; 20_000]).unwrap();
    guest.open_at(1, "file", 0);
    assert_eq!(guest.read(1, 0, u32::MAX).unwrap().len(), 8192 - 11);
    let request = message(READ, &fid(1).u64(0).u32(5000));
    let used = guest
        .driver
        .request(REQUEST_QUEUE, &[&request], &[11, 30, 20]);
    assert_eq!((used.bytes[4], used.written), (READ + 1, 11 + 50));
    assert_eq!(u32_at(&used.bytes, 7), 50);
}

#[test]
fn fids_are_bounded() {
    let mut guest = Guest::attached();
    let mut made = 0;
    let refused = loop {
        match guest.walk(ROOT, made + 1, &[]) {
            Ok(_) => made += 1,
            Err(errno) => break errno,
        }
    };
    assert_eq!((made, refused), (4096 - 1, libc::ENFILE));
    guest.clunk(1).unwrap();
    guest.walk(ROOT, 1, &[]).unwrap();
}

#[test]
fn a_fifo_holds_nobody_up() {
    let mut guest = Guest::attached();
    let fifo = fid(ROOT).string(b"fifo").u32(libc::S_IFIFO | 0o600);
    guest.ask(MKNOD, &fifo.u32(0).u32(0).u32(0)).unwrap();
    guest.walk(ROOT, 1, &[b"fifo"]).unwrap();
    // Whatever it says: it says it at once.
    let _ = guest.open(1, 0);
    guest.attributes(1).unwrap();
}

#[test]
fn writes_of_a_device_reach_the_hosts_file_at_their_place() {
    let mut guest = Guest::attached();
    let file = fs::File::create(guest.path("file")).unwrap();
    file.write_all_at(b"0123456789", 0).unwrap();
    // O_APPEND is the guest's own affair.
    guest.open_at(1, "file", 1 | 0o2000);
    guest.write(1, 2, b"xx").unwrap();
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"01xx456789");
}

#[test]
fn a_sync_tells_what_a_write_by_another_fid_failed_with() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    guest.create(2, b"other").unwrap();
    guest.open_at(3, "file", 0);
    guest.open_at(4, "file", RDWR);
    // Where no file can end.
    let far = i64::MAX.cast_unsigned();
    let errno = guest.write(4, far, b"some words").unwrap_err();
    guest.sync(2).unwrap();
    for file in [3, 1, 4] {
        assert_eq!(guest.sync(file), Err(errno), "{file}");
        guest.sync(file).unwrap();
    }
    // By one who opens it later, if by nobody else.
    guest.write(4, far, b"some words").unwrap_err();
    for expected in [Err(errno), Ok(Vec::new())] {
        guest.open_at(5, "file", 0);
        assert_eq!(guest.sync(5), expected);
        guest.clunk(5).unwrap();
    }
    guest.walk(ROOT, 5, &[]).unwrap();
    guest.open(5, 0).unwrap();
    guest.sync(5).unwrap();
}

#[test]
fn a_file_that_is_made_anew_has_not_failed() {
    let mut guest = Guest::attached();
    guest.create(1, b"file").unwrap();
    guest.write(1, i64::MAX.cast_unsigned(), b"x").unwrap_err();
    guest.unlink(b"file", 0).unwrap();
    guest.clunk(1).unwrap();
    guest.create(1, b"file").unwrap();
    guest.sync(1).unwrap();
}

#[test]
fn a_write_for_which_there_is_no_room_fails_as_a_whole() {
    if without_root() {
        return;
    }
    with_own_mounts(|| {
        let mut guest = Guest::attached();
        let below = guest.path("below");
        fs::create_dir(&below).unwrap();
        mount("none", &below, "tmpfs", MountFlags::empty(), c"size=64k").unwrap();
        fs::write(below.join("file"), "content").unwrap();
        guest.open_at(1, "below", 0o200_000);
        guest.walk(ROOT, 2, &[b"below", b"file"]).unwrap();
        guest.open(2, RDWR).unwrap();
        let data = [7; 8000];
        assert_eq!(guest.write(2, 0, &data).unwrap(), 8000);
        fs::write(below.join("rest"), [0; 13 * 4096]).unwrap();
        // One page is left.
        assert_eq!(guest.write(2, 8000, &data), Err(libc::ENOSPC));
        guest.sync(1).unwrap();
        assert_eq!(guest.sync(2), Err(libc::ENOSPC));
        assert_eq!(guest.write(2, 0, &data).unwrap(), 8000);
        guest.sync(2).unwrap();
        unmount(&below, UnmountFlags::DETACH).unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest sends, the device answers the next honest request.
    #[test]
    fn no_sequence_of_messages_stops_the_device(
        requests in prop::collection::vec(
            (any::<u8>(), 0_u32..4, prop::collection::vec(any::<u8>(), 0..200), 0_usize..5000),
            1..40,
        )
    ) {
        let mut guest = Guest::attached();
        fs::write(guest.path("file"), "content").unwrap();
        guest.open_at(1, "file", RDWR);
        for (kind, file, rest, room) in requests {
            let bytes = message(kind, &fid(file).bytes(&rest));
            guest.driver.request(REQUEST_QUEUE, &[&bytes], &[room + 1]);
        }
        guest.version(8192).unwrap();
        guest.attach(ROOT, 0).unwrap();
        prop_assert!(guest.ask(STATFS, &fid(ROOT)).is_ok());
        prop_assert_eq!(guest.held(), [1, 0]);
    }

    #[test]
    fn random_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 1..300)) {
        let mut guest = Guest::attached();
        guest.driver.request(REQUEST_QUEUE, &[&bytes], &[200]);
        guest.version(8192).unwrap();
    }
}
