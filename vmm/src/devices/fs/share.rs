//! A folder as a FUSE file system: fuse-backend-rs's passthrough, between us and a guest that may send anything.
//!
//! The library trusts its client in a few places, which this type takes care of; all else goes straight through:
//! - sizes: GETXATTR and LISTXATTR allocate what the guest asks for. Here it is at most what Linux can have.
//! - flags: CREATE, OPEN, READ and WRITE hand flags on to openat(2) and fcntl(2). O_PATH would drop O_EXCL and with it the
//!   refusal to follow a symbolic link. Here only flags that a FUSE client has reason to send pass.
//! - "..": LOOKUP follows it anywhere but in the root. Here nowhere: no client of ours needs it (it serves NFS exports).
//! - folders: it reads more entries than an answer has room for, and seeks back.
//! - open files: as many as there are descriptors. Here there is a limit that leaves some for the rest of the process.
//! - abilities: without a further word it agrees to writes of 4 KiB, and to no ACLs. Here both are agreed to as well.
//! - ACLs: it applies a umask where a default ACL replaces it, and leaves a setgid bit that setting an ACL takes away.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ROOT_ID, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{self, Config, PassthroughFs};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::config::CachePolicy;

/// How long the guest may take names and attributes for valid without asking. The host may change the folder too; this
/// is how stale the guest's view of that can be. virtiofsd's default.
const TIMEOUT: Duration = Duration::from_secs(1);

/// As [`TIMEOUT`], where nobody else changes the folder: a day.
const LONG_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Most files and folders that the guest may have open, its looked-up ones (which FORGET ends) not counted.
const MAX_OPEN: usize = 64 * 1024;

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
const MAX_XATTR: u32 = 64 * 1024;

/// What getdents64 needs for a name of 255 bytes; it fails with less.
const LONGEST_ENTRY: u32 = 280;

/// What a client may want of an open file. O_CREAT, O_NOFOLLOW, O_PATH, O_TMPFILE, O_NOCTTY and O_ASYNC are not among it,
/// nor is O_DIRECT: the guest means its own cache, and its buffers need not be aligned as the host wants it.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_EXCL
    | libc::O_LARGEFILE
    | libc::O_NOATIME
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC;

/// Where Linux has the ACLs of files, and those that a folder's new files inherit.
const ACCESS_ACL: &CStr = c"system.posix_acl_access";
const DEFAULT_ACL: &CStr = c"system.posix_acl_default";

/// What is agreed to beside what the library asks for. Not ATOMIC_O_TRUNC: the guest's kernel asks for the open before it finds
/// that the file is a running program, which must not be emptied.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::DONT_MASK)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::POSIX_ACL)
    .union(FsOptions::ASYNC_DIO);

/// Bytes to read from a folder of the host for an answer of `size` bytes to READDIRPLUS, and to READDIR: what is read
/// has to fit the answer, even if every name is short. What did not fit would be read again after a seek backwards, and
/// where positions are counts (tmpfs before Linux 6.6) that skips entries if some were removed meanwhile: `rm -r` fails.
fn readdirplus_size(size: u32) -> u32 {
    // 24 bytes of getdents64 become 160.
    (size / 20 * 3).max(LONGEST_ENTRY)
}

/// See [`readdirplus_size`].
fn readdir_size(size: u32) -> u32 {
    // 24 bytes of getdents64 become 32.
    (size / 4 * 3).max(LONGEST_ENTRY)
}

/// A shared folder.
///
/// Uids and gids are the host's and the guest's alike. Files are made as the user who asks; all else is done with the
/// thread's own rights, since the guest's kernel has checked the user's (the mount has `default_permissions`).
pub struct Share {
    fs: PassthroughFs,
    /// Whether it was agreed that the guest keeps what is written.
    writeback: AtomicBool,
    open: AtomicUsize,
    /// The abilities that the guest claimed at the last INIT, zero before it.
    capable: AtomicU64,
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl Share {
    /// Shares `root`. The path is resolved when the guest mounts the file system, and so may be one inside a jail that
    /// the process has yet to enter. /proc must be there now; /proc/self/fd also later, for extended attributes.
    ///
    /// # Errors
    /// When /proc/self cannot be opened, or the path is not UTF-8.
    pub fn new(root: &Path, cache: CachePolicy, writeback: bool) -> io::Result<Self> {
        let root_dir = root.to_str().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let (cache_policy, timeout) = match cache {
            // Pages are dropped at an open after the file's time stamp has changed: close-to-open, like NFS.
            CachePolicy::Auto => (passthrough::CachePolicy::Auto, TIMEOUT),
            CachePolicy::None => (passthrough::CachePolicy::Never, Duration::ZERO),
            CachePolicy::Always => (passthrough::CachePolicy::Always, LONG_TIMEOUT),
        };
        let writeback = writeback && cache != CachePolicy::None;
        let fs = PassthroughFs::new(Config {
            root_dir,
            entry_timeout: timeout,
            attr_timeout: timeout,
            cache_policy,
            writeback,
            xattr: true,
            // Writes clear setuid bits on the host in the same breath, without a request of their own.
            killpriv_v2: true,
            ..Config::default()
        })?;
        Ok(Self {
            fs,
            writeback: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            capable: AtomicU64::new(0),
        })
    }

    /// The abilities that the guest claimed at the last INIT. `None` before it.
    pub(super) fn capable(&self) -> Option<u64> {
        Some(self.capable.load(Ordering::Relaxed)).filter(|capable| *capable != 0)
    }

    /// How many files and folders are open.
    pub(crate) fn open_files(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Runs `open` unless too many files are open.
    fn opening<T>(&self, open: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.open.fetch_add(1, Ordering::Relaxed) >= MAX_OPEN {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        open().inspect_err(|_| {
            self.open.fetch_sub(1, Ordering::Relaxed);
        })
    }

    /// What of `umask` counts for a file that is made in `parent`: nothing where a default ACL says who may what. The
    /// guest's kernel leaves that to us (DONT_MASK), since it does not know of default ACLs.
    fn umask(&self, ctx: &Context, parent: u64, umask: u32) -> u32 {
        match self.fs.getxattr(ctx, parent, DEFAULT_ACL, 0) {
            Ok(GetxattrReply::Count(1..)) => 0,
            _ => umask & 0o777,
        }
    }

    fn closed(&self, result: io::Result<()>) -> io::Result<()> {
        result.inspect(|()| {
            self.open.fetch_sub(1, Ordering::Relaxed);
        })
    }
}

/// The flags of `flags` that may pass.
fn open_flags(flags: u32) -> u32 {
    flags & OPEN_FLAGS.cast_unsigned()
}

/// Runs `work` as one who may not give a file the setgid bit of a group that is not theirs.
fn without_setgid_right<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mut sets = capabilities(None)?;
    let all = sets.effective;
    sets.effective.remove(CapabilitySet::FSETID);
    set_capabilities(None, sets)?;
    let result = work();
    sets.effective = all;
    set_capabilities(None, sets)?;
    result
}

/// Methods that the passthrough file system may have as they are.
macro_rules! pass_through {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)* $(,)?) $(-> $out:ty)?;)*) => {
        $(fn $name(&self $(, $arg: $type)*) $(-> $out)? {
            self.fs.$name($($arg),*)
        })*
    };
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = self.fs.init(capable)?;
        self.capable.store(capable.bits(), Ordering::Relaxed);
        let writeback = wanted.contains(FsOptions::WRITEBACK_CACHE);
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(wanted | OPTIONS)
    }

    fn destroy(&self) {
        self.fs.destroy();
        self.open.store(0, Ordering::Relaxed);
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if name == c".." {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut entry = self.fs.lookup(ctx, parent, name)?;
        if parent == ROOT_ID {
            // Containers come and go there. A guest that asks for one that is gone forgets all that was in it.
            entry.entry_timeout = Duration::ZERO;
        }
        Ok(entry)
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        self.opening(|| self.fs.open(ctx, inode, open_flags(flags), fuse_flags))
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.opening(|| self.fs.opendir(ctx, inode, open_flags(flags)))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let args = CreateIn {
            flags: open_flags(args.flags),
            umask: self.umask(ctx, parent, args.umask),
            ..args
        };
        self.opening(|| self.fs.create(ctx, parent, name, args))
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.closed(
            self.fs
                .release(ctx, inode, flags, handle, flush, flock_release, lock_owner),
        )
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.closed(self.fs.releasedir(ctx, inode, flags, handle))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let flags = open_flags(flags);
        self.fs
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let mut flags = open_flags(flags);
        if self.writeback.load(Ordering::Relaxed) {
            // The guest has worked out where the end is, and writes what it kept in any order.
            flags &= !libc::O_APPEND.cast_unsigned();
        }
        self.fs.write(
            ctx,
            inode,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
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
        let umask = self.umask(ctx, parent, umask);
        self.fs.mknod(ctx, parent, name, mode, rdev, umask)
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let umask = self.umask(ctx, parent, umask);
        self.fs.mkdir(ctx, parent, name, mode, umask)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let set = || self.fs.setxattr(ctx, inode, name, value, flags);
        // Of the user's groups FUSE tells one. Where another is the file's, the bit goes although it might stay.
        if name == ACCESS_ACL
            && ctx.uid != 0
            && self.fs.getattr(ctx, inode, None)?.0.st_gid != ctx.gid
        {
            return without_setgid_right(set);
        }
        set()
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.fs.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.fs.listxattr(ctx, inode, size.min(MAX_XATTR))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = readdir_size(size);
        self.fs.readdir(ctx, inode, handle, size, offset, add_entry)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = readdirplus_size(size);
        self.fs
            .readdirplus(ctx, inode, handle, size, offset, add_entry)
    }

    pass_through! {
        fn forget(&self, ctx: &Context, inode: u64, count: u64);
        fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>);
        fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)>;
        fn setattr(
            &self,
            ctx: &Context,
            inode: u64,
            attr: stat64,
            handle: Option<u64>,
            valid: SetattrValid,
        ) -> io::Result<(stat64, Duration)>;
        fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>>;
        fn symlink(&self, ctx: &Context, linkname: &CStr, parent: u64, name: &CStr) -> io::Result<Entry>;
        fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()>;
        fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()>;
        fn rename(
            &self,
            ctx: &Context,
            olddir: u64,
            oldname: &CStr,
            newdir: u64,
            newname: &CStr,
            flags: u32,
        ) -> io::Result<()>;
        fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry>;
        fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        fn fallocate(
            &self,
            ctx: &Context,
            inode: u64,
            handle: u64,
            mode: u32,
            offset: u64,
            length: u64,
        ) -> io::Result<()>;
        fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64>;
        fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()>;
        fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_keeps_what_is_written_only_if_it_said_so() {
        let folder = tempfile::tempdir().unwrap();
        let share = Share::new(folder.path(), CachePolicy::Auto, true).unwrap();
        for (capable, keeps) in [
            (FsOptions::WRITEBACK_CACHE, true),
            (FsOptions::empty(), false),
        ] {
            share.init(capable).unwrap();
            assert_eq!(share.writeback.load(Ordering::Relaxed), keeps);
            share.destroy();
        }
    }

    #[test]
    fn what_is_read_of_a_folder_fits_the_answer() {
        for size in [4096, 32 * 1024, 1 << 20] {
            for name in 1..=255 {
                let host = (19_u32 + name + 1).next_multiple_of(8);
                let plain = (24 + name).next_multiple_of(8);
                assert!(readdir_size(size) / host * plain <= size, "{name}");
                assert!(
                    readdirplus_size(size) / host * (128 + plain) <= size,
                    "{name}"
                );
            }
        }
    }
}
