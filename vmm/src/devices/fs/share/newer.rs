//! What the library does not know of FUSE (include/uapi/linux/fuse.h of Linux 6.12): FUSE_COPY_FILE_RANGE, FUSE_SYNCFS,
//! FUSE_TMPFILE and FUSE_STATX, what FUSE_GETATTR and FUSE_CREATE tell of a DAX window, and two things of FUSE_INIT. A guest's kernel that is told ENOSYS does without, but then a copy
//! goes through the guest, syncfs(2) makes nothing durable, and files without a name or times of birth are not to be had.

use std::ffi::CStr;
use std::io;
use std::mem::offset_of;

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CreateIn, EntryOut, GetattrIn, InHeader, InitIn, InitIn2, InitOut, OpenOut,
    OutHeader,
};
use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
use rustix::fs::{Mode, OFlags, Statx, StatxFlags, StatxTimestamp};
use rustix::io::Errno;
use vm_memory::ByteValued;

use super::window::CHUNK;
use super::{Share, as_user, mode_of, node, open_flags};
use crate::config::CachePolicy;
use crate::virtio::queue::{Readable, Writable};

const GETATTR: u32 = 3;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const COPY_FILE_RANGE: u32 = 47;
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;
const STATX: u32 = 52;

/// Most bytes that one request copies: those after it wait meanwhile. Who copies goes on where this ends.
const MAX_COPY: u64 = 16 << 20;

/// Longest name.
const MAX_NAME: usize = 255;

/// FUSE_GETATTR_FH.
const BY_HANDLE: u32 = 1;

/// FUSE_DIRECT_IO_ALLOW_MMAP, as one of `flags2`: files of which the guest keeps nothing can have shared mappings.
const DIRECT_IO_ALLOW_MMAP: u32 = 1 << (36 - 32);

/// FUSE_HAS_INODE_DAX, as one of `flags2`: which files are accessed by the DAX window is told file by file.
const HAS_INODE_DAX: u32 = 1 << (33 - 32);

/// Where `map_alignment` stands in an answer to FUSE_INIT, behind its header, and `flags2` behind it.
const MAP_ALIGNMENT: usize = size_of::<OutHeader>() + offset_of!(InitOut, map_alignment);
const _: () = assert!(offset_of!(InitOut, map_alignment) + 2 == offset_of!(InitOut, flags2));

/// fuse_copy_file_range_in.
#[derive(Debug, Default, Clone, Copy)]
#[repr(C)]
struct CopyFileRangeIn {
    fh_in: u64,
    off_in: u64,
    nodeid_out: u64,
    fh_out: u64,
    off_out: u64,
    len: u64,
    flags: u64,
}

/// fuse_statx_in.
#[derive(Debug, Default, Clone, Copy)]
#[repr(C)]
struct StatxIn {
    getattr_flags: u32,
    reserved: u32,
    fh: u64,
    sx_flags: u32,
    sx_mask: u32,
}

// SAFETY: integers without padding, for which every bit pattern is valid.
unsafe impl ByteValued for CopyFileRangeIn {}
// SAFETY: as above.
unsafe impl ByteValued for StatxIn {}

/// What the library's answer to FUSE_INIT is to have as well. It sets none of these fields itself.
pub(in crate::devices::fs) struct Agreed {
    flags2: u32,
    map_alignment: u16,
}

impl Agreed {
    /// Adds the flags to the library's answer, of `written` bytes, in `room`, unless that is a refusal.
    pub(in crate::devices::fs) fn add_to(&self, room: &mut Writable<'_>, written: usize) {
        if written >= size_of::<OutHeader>() + size_of::<InitOut>() {
            room.take(MAP_ALIGNMENT);
            room.write(&self.map_alignment.to_le_bytes());
            room.write(&self.flags2.to_le_bytes());
        }
    }
}

impl Share {
    /// Serves the request `header`, of which `body` is what follows, if it is one of these.
    pub(in crate::devices::fs) fn serve_newer(
        &self,
        header: &InHeader,
        body: &mut Readable<'_>,
    ) -> Option<io::Result<Vec<u8>>> {
        let ctx = Context::from(header);
        Some(match header.opcode {
            COPY_FILE_RANGE => read(body).and_then(|asked| self.copy_range(header.nodeid, &asked)),
            SYNCFS => self.sync_all().map(|()| Vec::new()),
            // A name follows, which is nobody's.
            TMPFILE => read(body).and_then(|asked| self.make_unnamed(&ctx, header.nodeid, &asked)),
            GETATTR if self.window.is_some() => {
                read(body).and_then(|asked| self.get_attr(&ctx, header.nodeid, &asked))
            }
            CREATE if self.window.is_some() => {
                read(body).and_then(|asked| self.make_file(&ctx, header.nodeid, asked, body))
            }
            SETUPMAPPING => read(body)
                .and_then(|asked| self.set_up_mapping(header.nodeid, &asked))
                .map(|()| Vec::new()),
            REMOVEMAPPING => self.remove_mappings(body).map(|()| Vec::new()),
            STATX => read(body).and_then(|asked| self.statx(header.nodeid, &asked)),
            _ => return None,
        })
    }

    /// What is agreed on beyond what the library knows, if `header` and `body` are a FUSE_INIT that offers it.
    pub(in crate::devices::fs) fn agree(
        &self,
        header: &InHeader,
        body: &mut Readable<'_>,
    ) -> Option<Agreed> {
        if header.opcode != INIT {
            return None;
        }
        let mut known = 0;
        if self.cache() == CachePolicy::None {
            known |= DIRECT_IO_ALLOW_MMAP;
        }
        if self.window.is_some() {
            known |= HAS_INODE_DAX;
        }
        let offered: InitIn = body.read_obj()?;
        let more = if u64::from(offered.flags) & FsOptions::INIT_EXT.bits() == 0 {
            0
        } else {
            body.read_obj::<InitIn2>()?.flags2
        };
        let agreed = Agreed {
            flags2: more & known,
            map_alignment: if self.window.is_some() {
                u16::try_from(CHUNK.ilog2()).expect("a few bits")
            } else {
                0
            },
        };
        Some(agreed).filter(|agreed| agreed.flags2 != 0 || agreed.map_alignment != 0)
    }

    fn get_attr(&self, ctx: &Context, inode: u64, asked: &GetattrIn) -> io::Result<Vec<u8>> {
        let handle = (asked.flags & BY_HANDLE != 0).then_some(asked.fh);
        let (attr, valid, flags) = if self.notice(ctx).is_some() {
            let (attr, valid) = self.getattr(ctx, inode, handle)?;
            (attr, valid, 0)
        } else {
            let stat = self.stat(inode, handle)?;
            self.sized(inode, stat.stx_size);
            let attr = node::stat64_of(&stat);
            (
                attr,
                self.attr_timeout(&stat),
                self.attr_flags(inode, &stat),
            )
        };
        let answer = AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: Attr::with_flags(attr, flags),
        };
        Ok(answer.as_slice().to_vec())
    }

    /// Makes a file, or opens one that is there; what is left of `body` is its name.
    fn make_file(
        &self,
        ctx: &Context,
        parent: u64,
        asked: CreateIn,
        body: &mut Readable<'_>,
    ) -> io::Result<Vec<u8>> {
        let mut name = vec![0; body.len().min(MAX_NAME + 2)];
        body.read(&mut name);
        let name = CStr::from_bytes_until_nul(&name).or(Err(Errno::NAMETOOLONG))?;
        let (entry, handle, options, _) = self.create(ctx, parent, name, asked)?;
        let open = OpenOut {
            fh: handle.expect("each has one"),
            open_flags: options.bits(),
            ..OpenOut::default()
        };
        Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
    }

    fn copy_range(&self, inode: u64, asked: &CopyFileRangeIn) -> io::Result<Vec<u8>> {
        if asked.flags != 0 {
            return Err(Errno::INVAL.into());
        }
        let from = self.open.get(asked.fh_in, inode)?;
        let to = self.open.get(asked.fh_out, asked.nodeid_out)?;
        // The host refuses what is to be appended.
        let _as_wanted = to.appending(false)?;
        self.about_to_grow(asked.nodeid_out, asked.off_out)?;
        let (mut read_at, mut write_at) = (asked.off_in, asked.off_out);
        let len = usize::try_from(asked.len.min(MAX_COPY)).expect("it was limited");
        let copied = rustix::fs::copy_file_range(
            from.file(),
            Some(&mut read_at),
            to.file(),
            Some(&mut write_at),
            len,
        )?;
        self.written(asked.nodeid_out, write_at);
        let copied = u32::try_from(copied).expect("no more than was asked for");
        // fuse_write_out.
        Ok([copied.to_le_bytes(), [0; 4]].concat())
    }

    /// Makes all of the host's file systems durable of which the guest knows something: to its kernel they are one, and it
    /// names the root.
    fn sync_all(&self) -> io::Result<()> {
        let mut synced = Ok(());
        for node in self.nodes.tops() {
            match self.sync_fs(node) {
                // The host has taken it away, or it is no file or folder.
                Err(err) if matches!(err.raw_os_error(), Some(libc::ESTALE | libc::EBADF)) => {}
                done => synced = synced.and(done),
            }
        }
        synced
    }

    /// Makes all of the file system durable that the node is on.
    fn sync_fs(&self, inode: u64) -> io::Result<()> {
        let anchor = self.nodes.descriptor(inode)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = self.reopen(&anchor, self.nodes.kind(inode)?, flags)?;
        Ok(rustix::fs::syncfs(file)?)
    }

    /// Makes a file without a name in a folder (O_TMPFILE). It may be given one by a FUSE_LINK.
    fn make_unnamed(&self, ctx: &Context, parent: u64, asked: &CreateIn) -> io::Result<Vec<u8>> {
        self.open.check_room()?;
        let flags = open_flags(asked.flags);
        let mode: Mode = mode_of(asked.mode, self.umask(parent, asked.umask)?);
        let dir = self.nodes.descriptor(parent)?;
        // O_EXCL says that it shall never have a name, which is for the guest's kernel to see to as well.
        let new = self.host_flags(flags) | OFlags::TMPFILE;
        let file = as_user(ctx, || rustix::fs::openat(&*dir, c".", new, mode))?;
        let entry = self.entry(parent, c"", &node::stat(&file, c"")?)?;
        let anchor = self
            .anchor(entry.inode, &file)
            .inspect_err(|_| self.nodes.forget(entry.inode, 1))?;
        let opened = self.opened(entry.inode, file.into(), anchor, flags);
        let open = OpenOut {
            fh: opened.handle,
            open_flags: opened.options.bits(),
            ..OpenOut::default()
        };
        Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
    }

    fn statx(&self, inode: u64, asked: &StatxIn) -> io::Result<Vec<u8>> {
        let handle = (asked.getattr_flags & BY_HANDLE != 0).then_some(asked.fh);
        let stat = self.stat(inode, handle)?;
        self.sized(inode, stat.stx_size);
        // fuse_statx_out: how long it is valid, flags, and room to spare.
        let mut answer = Vec::with_capacity(288);
        let timeout = self.attr_timeout(&stat);
        answer.extend(timeout.as_secs().to_le_bytes());
        answer.extend(timeout.subsec_nanos().to_le_bytes());
        answer.extend([0; 20]);
        append_statx(&mut answer, &stat);
        Ok(answer)
    }
}

fn read<T: ByteValued + Default>(body: &mut Readable<'_>) -> io::Result<T> {
    Ok(body.read_obj().ok_or(Errno::INVAL)?)
}

/// fuse_statx, which is laid out as `struct statx` is.
fn append_statx(answer: &mut Vec<u8>, stat: &Statx) {
    let told = (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits() & stat.stx_mask;
    let time = |time: &StatxTimestamp| {
        let mut bytes = time.tv_sec.to_le_bytes().to_vec();
        bytes.extend(u64::from(time.tv_nsec).to_le_bytes());
        bytes
    };
    answer.extend(told.to_le_bytes());
    answer.extend(stat.stx_blksize.to_le_bytes());
    // Attributes: the guest does not ask for them.
    answer.extend([0; 8]);
    for number in [stat.stx_nlink, stat.stx_uid, stat.stx_gid] {
        answer.extend(number.to_le_bytes());
    }
    answer.extend(u32::from(stat.stx_mode).to_le_bytes());
    for number in [stat.stx_ino, stat.stx_size, stat.stx_blocks, 0] {
        answer.extend(number.to_le_bytes());
    }
    for moment in [
        &stat.stx_atime,
        &stat.stx_btime,
        &stat.stx_ctime,
        &stat.stx_mtime,
    ] {
        answer.extend(time(moment));
    }
    for number in [
        stat.stx_rdev_major,
        stat.stx_rdev_minor,
        stat.stx_dev_major,
        stat.stx_dev_minor,
    ] {
        answer.extend(number.to_le_bytes());
    }
    answer.extend([0; 112]);
}
