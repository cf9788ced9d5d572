//! What the share does at each request: [`FileSystem`], as the library defines it.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ROOT_ID, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::common::file_traits::FileReadWriteVolatile;
use rustix::buffer::spare_capacity;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::process::{Gid, Uid};

use super::node::{self, stat64_of};
use super::open::FolderEntry;
use super::rights::{as_user, without_setgid_right};
use super::{Share, check_name, mode_of, open_flags, path_of};
use crate::config::CachePolicy;

/// What is agreed to with a guest that can. Not SUBMOUNTS: Linux, up to 6.12 at least, has neither ACLs nor cheap writes
/// (SB_POSIXACL, SB_NOSEC) on what it mounts by itself for a mount of the host. Not ATOMIC_O_TRUNC: its kernel asks for the
/// open before it finds that the file is a running program, which must not be emptied.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::DONT_MASK)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::POSIX_ACL)
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::INIT_EXT)
    // Writes clear setuid bits on the host in the same breath, without a request of their own.
    .union(FsOptions::HANDLE_KILLPRIV_V2);

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
const MAX_XATTR: usize = 64 * 1024;

/// Where Linux has the ACLs of files.
const ACCESS_ACL: &CStr = c"system.posix_acl_access";

/// Whether a write by somebody without rights changes the mode.
fn has_bits_to_lose(file: &File) -> io::Result<bool> {
    let mode = u32::from(node::stat(file, c"")?.stx_mode);
    Ok(mode & (libc::S_ISUID | libc::S_ISGID) != 0)
}

fn user(uid: u32) -> Option<Uid> {
    (uid != u32::MAX).then(|| Uid::from_raw(uid))
}

fn group(gid: u32) -> Option<Gid> {
    (gid != u32::MAX).then(|| Gid::from_raw(gid))
}

/// The times that SETATTR asks for.
fn times(attr: &stat64, valid: SetattrValid) -> Timestamps {
    let time = |given, now, tv_sec, tv_nsec| {
        let tv_nsec = if valid.contains(now) {
            UTIME_NOW
        } else if valid.contains(given) {
            tv_nsec
        } else {
            UTIME_OMIT
        };
        Timespec { tv_sec, tv_nsec }
    };
    Timestamps {
        last_access: time(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            attr.st_atime,
            attr.st_atime_nsec,
        ),
        last_modification: time(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            attr.st_mtime,
            attr.st_mtime_nsec,
        ),
    }
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.capable.store(capable.bits(), Ordering::Relaxed);
        let writeback = self.offers_writeback && capable.contains(FsOptions::WRITEBACK_CACHE);
        self.writeback.store(writeback, Ordering::Relaxed);
        let mut options = OPTIONS;
        if writeback {
            options |= FsOptions::WRITEBACK_CACHE;
        }
        if self.window.is_some() {
            // With what `agree` adds.
            options |= FsOptions::MAP_ALIGNMENT;
        }
        Ok(options)
    }

    fn destroy(&self) {
        if let Some(window) = &self.window {
            window.reset();
        }
        self.open.clear();
        if let Err(err) = self.nodes.reset() {
            log::warn!("the root of a shared folder is out of reach: {err}");
        }
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if let Some(notice) = self.notice(ctx) {
            return self.lookup_for_notice(notice, parent, name);
        }
        match self.walk(parent, name) {
            // Nobody else makes it, and so the guest need not ask again.
            Err(err)
                if err.raw_os_error() == Some(libc::ENOENT)
                    && self.cache == CachePolicy::Always
                    && parent != ROOT_ID =>
            {
                Ok(Entry {
                    entry_timeout: self.timeout,
                    ..Entry::default()
                })
            }
            found => found,
        }
    }

    fn forget(&self, _ctx: &Context, inode: u64, count: u64) {
        self.nodes.forget(inode, count);
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        if let Some(notice) = self.notice(ctx) {
            let attr = self.attr_for_notice(notice, inode)?;
            return Ok((attr, Duration::ZERO));
        }
        let stat = self.stat(inode, handle)?;
        self.sized(inode, stat.stx_size);
        Ok((stat64_of(&stat), self.attr_timeout(&stat)))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        if self.notice(ctx).is_some() {
            return self.getattr(ctx, inode, None);
        }
        let node = self.nodes.descriptor(inode)?;
        let name = DecInt::from_fd(&*node);
        let name = name.as_c_str();
        if valid.contains(SetattrValid::MODE) {
            let mode = mode_of(attr.st_mode, 0);
            rustix::fs::chmodat(&self.descriptors, name, mode, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let owner = user(attr.st_uid).filter(|_| valid.contains(SetattrValid::UID));
            let owners = group(attr.st_gid).filter(|_| valid.contains(SetattrValid::GID));
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&*node, c"", owner, owners, flags)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).or(Err(Errno::INVAL))?;
            self.about_to_grow(inode, size)?;
            let truncate = || -> io::Result<()> {
                if let Some(handle) = handle {
                    let file = self.open.get(handle, inode)?;
                    return Ok(rustix::fs::ftruncate(file.file(), size)?);
                }
                let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = self.reopen(&node, self.nodes.kind(inode)?, flags)?;
                Ok(rustix::fs::ftruncate(file, size)?)
            };
            if valid.contains(SetattrValid::KILL_SUIDGID) {
                without_setgid_right(truncate)?;
            } else {
                truncate()?;
            }
            self.opened_to_write(inode);
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = times(&attr, valid);
            rustix::fs::utimensat(&self.descriptors, name, &times, AtFlags::empty())?;
        }
        self.getattr(ctx, inode, handle)
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let link = self.nodes.descriptor(inode)?;
        // The host has put another in its place, maybe: the guest's kernel looks for that at ESTALE, while it would go on to what
        // is being removed. kubelet updates a ConfigMap by such a link.
        if node::stat(&*link, c"")?.stx_nlink == 0 && !self.nodes.is_kept(inode) {
            return Err(Errno::STALE.into());
        }
        Ok(rustix::fs::readlinkat(&*link, c"", Vec::new())?.into_bytes())
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        if self.notice(ctx).is_some() {
            return self.made_for_notice(parent, name, libc::S_IFLNK);
        }
        self.make(ctx, parent, name, |dir| {
            rustix::fs::symlinkat(linkname, dir, name)
        })
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        if self.notice(ctx).is_some() {
            let kind = match mode & libc::S_IFMT {
                0 => libc::S_IFREG,
                kind => kind,
            };
            return self.made_for_notice(parent, name, kind);
        }
        let rights = mode_of(mode, self.umask(parent, umask)?);
        let kind = match mode & libc::S_IFMT {
            0 => FileType::RegularFile,
            kind => FileType::from_raw_mode(kind),
        };
        self.make(ctx, parent, name, |dir| {
            rustix::fs::mknodat(dir, name, kind, rights, rdev.into())
        })
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        if self.notice(ctx).is_some() {
            return self.made_for_notice(parent, name, libc::S_IFDIR);
        }
        let rights = mode_of(mode, self.umask(parent, umask)?);
        self.make(ctx, parent, name, |dir| {
            rustix::fs::mkdirat(dir, name, rights)
        })
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        if self.notice(ctx).is_some() {
            return Ok(());
        }
        self.remove(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        if self.notice(ctx).is_some() {
            return Ok(());
        }
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        if self.notice(ctx).is_some() {
            return self.moved_for_notice(newdir, newname);
        }
        check_name(oldname)?;
        check_name(newname)?;
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (old, new) = (
            self.nodes.descriptor(olddir)?,
            self.nodes.descriptor(newdir)?,
        );
        if !flags.contains(RenameFlags::EXCHANGE) {
            self.nodes.keep(&*new, newname);
        }
        rustix::fs::renameat_with(&*old, oldname, &*new, newname, flags)?;
        if let Ok(stat) = node::stat(&*new, newname) {
            self.nodes.moved(newdir, newname, &stat);
        }
        if flags.contains(RenameFlags::EXCHANGE)
            && let Ok(stat) = node::stat(&*old, oldname)
        {
            self.nodes.moved(olddir, oldname, &stat);
        }
        Ok(())
    }

    fn link(
        &self,
        _ctx: &Context,
        inode: u64,
        newparent: u64,
        newname: &CStr,
    ) -> io::Result<Entry> {
        check_name(newname)?;
        let file = self.nodes.descriptor(inode)?;
        let dir = self.nodes.descriptor(newparent)?;
        rustix::fs::linkat(&*file, c"", &*dir, newname, AtFlags::EMPTY_PATH)?;
        self.find(newparent, &dir, newname)
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let opened = if self.notice(ctx).is_some() {
            self.open_for_notice(inode)?
        } else {
            let kills = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
            self.take_bits(ctx, inode, open_flags(flags))?;
            self.open_node(inode, open_flags(flags), kills)?
        };
        Ok((Some(opened.handle), opened.options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        check_name(name)?;
        self.open.check_room()?;
        let flags = open_flags(args.flags);
        let mode = mode_of(args.mode, self.umask(parent, args.umask)?);
        let dir = self.nodes.descriptor(parent)?;
        let new = self.host_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let made = as_user(ctx, || rustix::fs::openat(&*dir, name, new, mode));
        let entry = match &made {
            Ok(file) => self.entry(parent, name, &node::stat(file, c"")?)?,
            Err(err)
                if err.raw_os_error() == Some(libc::EEXIST) && !flags.contains(OFlags::EXCL) =>
            {
                self.find(parent, &dir, name)?
            }
            Err(_) => return Err(made.expect_err("it was matched")),
        };
        let opened = match made {
            Ok(file) => self
                .anchor(entry.inode, &file)
                .map(|anchor| self.opened(entry.inode, file.into(), anchor, flags)),
            Err(_) => {
                let kills = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                self.take_bits(ctx, entry.inode, flags)
                    .and_then(|()| self.open_node(entry.inode, flags, kills))
            }
        };
        let opened = opened.inspect_err(|_| self.nodes.forget(entry.inode, 1))?;
        Ok((entry, Some(opened.handle), opened.options, None))
    }

    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let file = self.open.get(handle, inode)?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        w.write_from(&mut *file.borrowed(), size, offset)
    }

    fn write(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let file = self.open.get(handle, inode)?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        // A page of the guest's cache belongs where it says, and the guest has found the end where it keeps pages.
        let append = open_flags(flags).contains(OFlags::APPEND)
            && !delayed_write
            && !self.writeback.load(Ordering::Relaxed);
        let _as_wanted = file.appending(append)?;
        self.about_to_grow(inode, offset)?;
        let mut write = || {
            let mut file = file.borrowed();
            if delayed_write {
                write_whole(r, &mut *file, size, offset)
            } else {
                r.read_to(&mut *file, size, offset)
            }
        };
        let written = if fuse_flags & WRITE_KILL_PRIV != 0 && has_bits_to_lose(file.file())? {
            without_setgid_right(write)?
        } else {
            write()?
        };
        self.written(inode, offset.saturating_add(written as u64));
        Ok(written)
    }

    fn flush(&self, _ctx: &Context, inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        let file = self.open.get(handle, inode)?;
        // What close(2) has to say it says at each of a file's closes.
        let copy = rustix::io::dup(file.file())?;
        // SAFETY: the descriptor is the copy's, which is owned here and nowhere used after.
        match unsafe { libc::close(copy.into_raw_fd()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn release(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.open.remove(handle, inode)
    }

    fn fsync(&self, _ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let file = self.open.get(handle, inode)?;
        let sync = if datasync {
            rustix::fs::fdatasync
        } else {
            rustix::fs::fsync
        };
        Ok(sync(file.file())?)
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let file = self.open.get(handle, inode)?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        let end = offset.saturating_add(length);
        if !mode.contains(FallocateFlags::KEEP_SIZE) {
            self.about_to_grow(inode, offset)?;
        }
        rustix::fs::fallocate(file.file(), mode, offset, length)?;
        if mode.contains(FallocateFlags::PUNCH_HOLE) {
            self.emptied(inode, offset, end)?;
        } else if !mode.contains(FallocateFlags::KEEP_SIZE) {
            self.written(inode, end);
        }
        Ok(())
    }

    fn lseek(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let file = self.open.get(handle, inode)?;
        let from = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(rustix::fs::seek(file.file(), from)?)
    }

    fn statfs(&self, _ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        let file = self.nodes.descriptor(inode)?;
        let mut stat = std::mem::MaybeUninit::zeroed();
        // SAFETY: the descriptor is open, and `stat` has room for what is written to it.
        match unsafe { libc::fstatvfs64(file.as_raw_fd(), stat.as_mut_ptr()) } {
            // SAFETY: the call has filled it in.
            0 => Ok(unsafe { stat.assume_init() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let file = self.nodes.descriptor(inode)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let set = || {
            Ok(rustix::fs::setxattr(
                path_of(file.as_fd()),
                name,
                value,
                flags,
            )?)
        };
        // Of the user's groups FUSE tells one. Where another is the file's, the bit goes although it might stay.
        if name == ACCESS_ACL && ctx.uid != 0 && self.nodes.stat(inode)?.stx_gid != ctx.gid {
            return without_setgid_right(set);
        }
        set()
    }

    fn getxattr(
        &self,
        _ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let file = self.nodes.descriptor(inode)?;
        let path = path_of(file.as_fd());
        if size == 0 {
            let size = rustix::fs::getxattr_query(path, name)?;
            return Ok(GetxattrReply::Count(xattr_count(size)));
        }
        let mut value = Vec::with_capacity(xattr_room(size));
        rustix::fs::getxattr(path, name, spare_capacity(&mut value))?;
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let file = self.nodes.descriptor(inode)?;
        let path = path_of(file.as_fd());
        if size == 0 {
            let size = rustix::fs::listxattr_query(path)?;
            return Ok(ListxattrReply::Count(xattr_count(size)));
        }
        let mut names = Vec::with_capacity(xattr_room(size));
        rustix::fs::listxattr(path, spare_capacity(&mut names))?;
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let file = self.nodes.descriptor(inode)?;
        Ok(rustix::fs::removexattr(path_of(file.as_fd()), name)?)
    }

    fn opendir(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let opened = self.open_node(inode, open_flags(flags) | OFlags::DIRECTORY, false)?;
        Ok((Some(opened.handle), opened.options))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let folder = self.open.get(handle, inode)?;
        folder.read_folder(offset, |entry| Ok(add_entry(dir_entry(entry))? > 0))
    }

    /// An entry that cannot be looked up is told without a node: the guest asks for it if it wants to know.
    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let folder = self.open.get(handle, inode)?;
        folder.read_folder(offset, |entry| {
            let name = &*entry.name;
            let looked_up = match node::stat(folder.file(), name) {
                _ if check_name(name).is_err() || self.knows_many() => Entry::default(),
                Ok(stat) => self.entry(inode, name, &stat).unwrap_or_default(),
                // It has gone since.
                Err(err) if err.raw_os_error() == Some(libc::ENOENT) => return Ok(true),
                Err(_) => Entry::default(),
            };
            let added = add_entry(dir_entry(entry), looked_up);
            if looked_up.inode != 0 && !matches!(added, Ok(1..)) {
                self.nodes.forget(looked_up.inode, 1);
            }
            Ok(added? > 0)
        })
    }

    fn releasedir(&self, _ctx: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.open.remove(handle, inode)
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.fsync(ctx, inode, datasync, handle)
    }
}

/// Writes all that there is, or fails, be there a part that is written. A guest that writes what it has kept makes nothing of
/// a part. Linux's FUSE does not look at how much it was. Its 9P client (6.12) asks for the rest, and if that fails asks once
/// more: for the rest, but at the place where the part began, over that; then it takes all for written.
fn write_whole(
    data: &mut dyn ZeroCopyReader,
    file: &mut dyn FileReadWriteVolatile,
    size: usize,
    offset: u64,
) -> io::Result<usize> {
    let mut written = 0;
    while written < size {
        let at = offset.saturating_add(written as u64);
        match data.read_to(file, size - written, at)? {
            // There is less than was said.
            0 => break,
            more => written += more,
        }
    }
    Ok(written)
}

fn dir_entry(entry: &FolderEntry) -> DirEntry<'_> {
    DirEntry {
        ino: entry.inode,
        offset: entry.next,
        type_: entry.kind,
        name: entry.name.to_bytes(),
    }
}

/// Room for an extended attribute, or for the names of all: what the guest has, and at most what Linux can have.
fn xattr_room(size: u32) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX).min(MAX_XATTR)
}

fn xattr_count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
