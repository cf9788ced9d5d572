//! A folder of the host as a file system, for a guest that may send anything: the [`FileSystem`] that the library's FUSE
//! server calls, and the 9P server as well.
//!
//! It is not the library's own passthrough file system. That holds a descriptor for each file that the guest knows, and
//! grows by each that it ever knew; fails to list a folder in which one entry cannot be looked up; knows none of the
//! requests in [`newer`]; and trusts its client with sizes, flags and "..".
//!
//! Uids and gids are the host's and the guest's alike. Files are made as the user who asks; all else is done with the
//! thread's own rights, since the guest's kernel has checked the user's (the mount has `default_permissions`).

mod newer;
mod news;
mod node;
mod notices;
mod open;
mod requests;
mod rights;
mod window;

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Context, Entry, OpenOptions, ROOT_ID};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::process::Resource;

use crate::config::{CachePolicy, NoticeGids, WatchConfig};
pub(super) use news::{Fate, News};
pub(in crate::devices) use node::MAX_NODES;
use node::{Limits, MANY_NODES, Nodes, stat64_of};
use open::{OpenFile, OpenFiles};
use rights::{as_user, without_setgid_right};
use window::Window;

/// How long the guest may take names and attributes for valid without asking. The host may change the folder too; this
/// is how stale the guest's view of that can be. virtiofsd's default.
const TIMEOUT: Duration = Duration::from_secs(1);

/// As [`TIMEOUT`], where nobody else changes the folder: a day.
const LONG_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Most files and folders that the guest may have open.
const MAX_OPEN: usize = 64 * 1024;

/// By what stands below it, a descriptor can be opened again, and named where only a path is taken.
const DESCRIPTORS: &str = "/proc/self/fd";

/// What a client may want of an open file. O_CREAT, O_NOFOLLOW, O_PATH, O_TMPFILE, O_NOCTTY and O_ASYNC are not among it,
/// nor is O_DIRECT: the guest means its own cache, and its buffers need not be aligned as the host wants it.
const OPEN_FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::APPEND)
    .union(OFlags::DIRECTORY)
    .union(OFlags::DSYNC)
    .union(OFlags::EXCL)
    .union(OFlags::LARGEFILE)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK)
    .union(OFlags::SYNC)
    .union(OFlags::TRUNC);

/// FOPEN_NOFLUSH: the guest need not say when a file is closed (FUSE_FLUSH), only when the last of its users has closed it.
const NO_FLUSH: u32 = 1 << 5;

/// The file systems of the host (statfs(2)) whose files nobody changes but by this kernel. So close(2) never fails, while
/// others' errors, of a quota on a server for example, the guest is to be told; and their lengths can be followed.
const SILENT: [i64; 6] = [
    0x0102_1994, // tmpfs
    0x2fc1_2fc1, // ZFS
    0x5846_5342, // XFS
    OVERLAYFS,
    0x9123_683e, // Btrfs
    0xef53,      // ext4
];

const OVERLAYFS: i64 = 0x794c_7630;

/// Whether a file is on one of the [`SILENT`].
fn is_silent(file: impl AsFd) -> io::Result<bool> {
    Ok(SILENT.contains(&rustix::fs::fstatfs(file)?.f_type))
}

/// Where Linux has the ACLs that a folder's new files inherit.
const DEFAULT_ACL: &CStr = c"system.posix_acl_default";

/// A shared folder.
pub struct Share {
    nodes: Nodes,
    open: OpenFiles,
    /// [`DESCRIPTORS`].
    descriptors: OwnedFd,
    cache: CachePolicy,
    /// How long names and attributes are valid.
    timeout: Duration,
    /// Whether the guest may keep what is written, and whether that was agreed on.
    offers_writeback: bool,
    writeback: AtomicBool,
    /// The abilities that the guest claimed at the last INIT, zero before it.
    capable: AtomicU64,
    /// In which the guest has files mapped.
    window: Option<Window>,
    /// Where the guest is told what others change: whose requests are notices.
    notices: Option<NoticeGids>,
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share")
            .field("nodes", &self.nodes)
            .field("open", &self.open.len())
            .finish_non_exhaustive()
    }
}

/// What the guest is told of a file that it has opened.
struct Opened {
    handle: u64,
    options: OpenOptions,
}

/// That `name` is one, in a folder.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL.into()),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
        _ => Ok(()),
    }
}

/// The flags of `flags` that may pass.
fn open_flags(flags: u32) -> OFlags {
    (OFlags::from_bits_retain(flags) & OPEN_FLAGS) | OFlags::CLOEXEC
}

fn mode_of(mode: u32, umask: u32) -> Mode {
    Mode::from_raw_mode(mode & !umask & 0o7777)
}

/// A descriptor as a path, for calls that take nothing else.
fn path_of(descriptor: BorrowedFd<'_>) -> String {
    format!("{DESCRIPTORS}/{}", descriptor.as_raw_fd())
}

impl Share {
    /// Shares `root`.
    ///
    /// # Errors
    /// When the root, or /proc/self/fd, cannot be opened.
    pub fn new(root: &Path, cache: CachePolicy, writeback: bool) -> io::Result<Self> {
        let folder = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, path, flags, Mode::empty())
        };
        let descriptors = rustix::process::getrlimit(Resource::Nofile).current;
        let limits = Limits::of(descriptors.unwrap_or(u64::MAX), MAX_OPEN);
        // The guest says what rights a new file has.
        rustix::process::umask(Mode::empty());
        Ok(Self {
            nodes: Nodes::new(folder(root)?, limits)?,
            open: OpenFiles::new(limits.used),
            descriptors: folder(Path::new(DESCRIPTORS))?,
            cache,
            timeout: match cache {
                CachePolicy::Auto => TIMEOUT,
                CachePolicy::None => Duration::ZERO,
                CachePolicy::Always => LONG_TIMEOUT,
            },
            offers_writeback: writeback && cache != CachePolicy::None,
            writeback: AtomicBool::new(false),
            capable: AtomicU64::new(0),
            window: None,
            notices: None,
        })
    }

    /// Serves notices ([`notices`]), and tells the result what is known to the guest from now on.
    ///
    /// # Errors
    /// Of eventfd(2).
    pub(super) fn watch(&mut self, config: WatchConfig) -> io::Result<Arc<News>> {
        let news = Arc::new(News::new()?);
        self.nodes
            .watch(config.prefix.into_bytes(), Arc::clone(&news));
        self.notices = Some(config.gids);
        Ok(news)
    }

    /// Serves notices without anybody who watches: for who makes all changes himself.
    ///
    /// # Errors
    /// Of eventfd(2).
    #[cfg(feature = "fuzzing")]
    pub fn take_notices(&mut self, config: WatchConfig) -> io::Result<()> {
        self.watch(config).map(drop)
    }

    /// A descriptor that stands for a file that the guest knows, and whether that is a folder.
    ///
    /// # Errors
    /// ESTALE when it does not, or the file is no longer where it was.
    pub(super) fn known(&self, inode: u64) -> io::Result<(Arc<OwnedFd>, bool)> {
        let kind = self.nodes.kind(inode)?;
        Ok((self.nodes.descriptor(inode)?, kind == libc::S_IFDIR))
    }

    /// S_IFMT of what is `name` in a folder now.
    ///
    /// # Errors
    /// As statx(2).
    pub(super) fn kind_at(&self, folder: &OwnedFd, name: &CStr) -> io::Result<u32> {
        let mode = node::stat(folder, name)?.stx_mode;
        Ok(u32::from(mode) & libc::S_IFMT)
    }

    /// Opens what is at a path below the root now, without following a link.
    ///
    /// # Errors
    /// As openat2(2).
    pub(super) fn find_path(&self, path: &[u8]) -> io::Result<OwnedFd> {
        self.nodes.find_path(path)
    }

    /// Where a file is that the guest knows, below the root.
    pub(super) fn path(&self, inode: u64) -> Option<Vec<u8>> {
        self.nodes.path(inode)
    }

    /// Whether a file that the guest knows is in the root.
    pub(super) fn is_top(&self, inode: u64) -> bool {
        self.nodes.is_top(inode)
    }

    /// The folder of this process's descriptors.
    pub(super) fn descriptors(&self) -> BorrowedFd<'_> {
        self.descriptors.as_fd()
    }

    /// The abilities that the guest claimed at the last INIT. `None` before it.
    pub(in crate::devices) fn capable(&self) -> Option<u64> {
        Some(self.capable.load(Ordering::Relaxed)).filter(|capable| *capable != 0)
    }

    /// How far the guest relies on what it has read before.
    pub(in crate::devices) fn cache(&self) -> CachePolicy {
        self.cache
    }

    /// How many files and folders are open.
    pub(crate) fn open_files(&self) -> usize {
        self.open.len()
    }

    /// A number that no other file has, however often the guest forgets it: that of the file itself, or of the one in its
    /// folder, on the same mount, that has inode `inode`.
    ///
    /// # Errors
    /// ESTALE when the guest does not know the file.
    pub(in crate::devices) fn fingerprint(
        &self,
        inode: u64,
        other: Option<u64>,
    ) -> io::Result<u64> {
        self.nodes.fingerprint(inode, other)
    }

    /// What the guest is told of `name` in `parent`, with a reference to it.
    fn entry(&self, parent: u64, name: &CStr, stat: &Statx) -> io::Result<Entry> {
        let inode = self.nodes.refer(parent, name, stat)?;
        self.sized(inode, stat.stx_size);
        // Containers come and go below the root: a guest that asks for one that is gone forgets all that was in it.
        let lasts = parent != ROOT_ID && !self.knows_many();
        Ok(Entry {
            inode,
            generation: 0,
            attr: stat64_of(stat),
            attr_flags: self.attr_flags(inode, stat),
            attr_timeout: self.attr_timeout(stat),
            entry_timeout: if lasts { self.timeout } else { Duration::ZERO },
        })
    }

    fn knows_many(&self) -> bool {
        self.nodes.len() >= MANY_NODES
    }

    fn stat(&self, inode: u64, handle: Option<u64>) -> io::Result<Statx> {
        match handle {
            Some(handle) => node::stat(self.open.get(handle, inode)?.file(), c""),
            None => self.nodes.stat(inode),
        }
    }

    fn find(&self, parent: u64, dir: &OwnedFd, name: &CStr) -> io::Result<Entry> {
        self.entry(parent, name, &node::stat(dir, name)?)
    }

    /// Makes `name` in the folder `parent`, as the user who asks.
    fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let dir = self.nodes.descriptor(parent)?;
        as_user(ctx, || make(&dir))?;
        self.find(parent, &dir, name)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        check_name(name)?;
        let dir = self.nodes.descriptor(parent)?;
        self.nodes.keep(&dir, name);
        Ok(rustix::fs::unlinkat(&dir, name, flags)?)
    }

    /// Opens a file or folder that the guest knows. Nothing else: to open a FIFO could block, to open a device could do
    /// anything; the guest's kernel does not ask for either.
    fn reopen(&self, anchor: &OwnedFd, kind: u32, flags: OFlags) -> io::Result<File> {
        if kind != libc::S_IFREG && kind != libc::S_IFDIR {
            return Err(Errno::BADF.into());
        }
        let flags = self.host_flags(flags) - OFlags::EXCL;
        let descriptor = DecInt::from_fd(anchor);
        let opened = rustix::fs::openat(&self.descriptors, descriptor, flags, Mode::empty())?;
        Ok(opened.into())
    }

    /// With the guest's page cache in between, what is written may have to be read first, and goes where the guest has found
    /// the end.
    fn host_flags(&self, mut flags: OFlags) -> OFlags {
        if self.writeback.load(Ordering::Relaxed) {
            if flags.contains(OFlags::WRONLY) {
                flags.remove(OFlags::WRONLY);
                flags.insert(OFlags::RDWR);
            }
            flags.remove(OFlags::APPEND);
        }
        flags
    }

    /// Opens the node `inode`. With `kills`, setuid and setgid bits go if O_TRUNC empties it.
    fn open_node(&self, inode: u64, flags: OFlags, kills: bool) -> io::Result<Opened> {
        self.open.check_room()?;
        let anchor = self.nodes.descriptor(inode)?;
        let kind = self.nodes.kind(inode)?;
        let open = || self.reopen(&anchor, kind, flags);
        let file = if kills && flags.contains(OFlags::TRUNC) {
            without_setgid_right(open)?
        } else {
            open()?
        };
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            self.opened_to_write(inode);
            if flags.contains(OFlags::TRUNC) {
                self.sized(inode, 0);
            }
        }
        Ok(self.opened(inode, file, anchor, flags))
    }

    /// A descriptor that stands for the node of `file`, which is open.
    fn anchor(&self, inode: u64, file: &OwnedFd) -> io::Result<Arc<OwnedFd>> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let name = DecInt::from_fd(file);
        self.nodes.descriptor_by(inode, || {
            let located = rustix::fs::openat(&self.descriptors, name, flags, Mode::empty());
            Ok(located?)
        })
    }

    fn opened(&self, inode: u64, file: File, anchor: Arc<OwnedFd>, flags: OFlags) -> Opened {
        let handle = self.nodes.number();
        let options = if flags.contains(OFlags::DIRECTORY) {
            self.folder_options()
        } else {
            self.open_options(inode, &file)
        };
        let file = OpenFile::new(inode, file, anchor, self.host_flags(flags));
        self.open.add(handle, file);
        Opened { handle, options }
    }

    /// How the guest's kernel is to treat an open file.
    fn open_options(&self, inode: u64, file: &File) -> OpenOptions {
        let is_silent = is_silent(file).unwrap_or(false);
        let cached = match self.cache {
            // What was read before is good for as long as nobody has changed the file: close-to-open, like NFS.
            CachePolicy::Auto if is_silent && self.is_as_read(inode, file) => {
                OpenOptions::KEEP_CACHE
            }
            CachePolicy::Auto => OpenOptions::empty(),
            CachePolicy::None => OpenOptions::DIRECT_IO,
            CachePolicy::Always => OpenOptions::KEEP_CACHE,
        };
        if !is_silent {
            return cached;
        }
        // SAFETY: what the library does with options is to send their bits to the guest, which knows this one.
        unsafe { OpenOptions::from_bits_unchecked(cached.bits() | NO_FLUSH) }
    }

    /// Whether the node `inode`, which is open as `file`, is what the guest has read of it.
    fn is_as_read(&self, inode: u64, file: &File) -> bool {
        let changed = node::stat(file, c"")
            .ok()
            .and_then(|stat| node::changed(&stat));
        self.nodes.is_as_read(inode, changed)
    }

    /// How the guest's kernel is to treat an open folder.
    fn folder_options(&self) -> OpenOptions {
        match self.cache {
            CachePolicy::Auto | CachePolicy::None => OpenOptions::empty(),
            CachePolicy::Always => OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE,
        }
    }

    /// Finds `name` in a folder, with a reference to it.
    ///
    /// # Errors
    /// ENOENT and others of stat(2); EINVAL for what is no name; ENFILE when too many files are known.
    pub(in crate::devices) fn walk(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.find(parent, &*self.nodes.descriptor(parent)?, name)
    }

    /// What of `umask` counts for a file that is made in `parent`: nothing where a default ACL says who may what. The
    /// guest's kernel leaves that to us (DONT_MASK), since it does not know of default ACLs.
    fn umask(&self, parent: u64, umask: u32) -> io::Result<u32> {
        // Without one of its bits there is nothing to find out.
        if umask & 0o777 == 0 {
            return Ok(0);
        }
        let dir = self.nodes.descriptor(parent)?;
        match rustix::fs::getxattr_query(path_of(dir.as_fd()), DEFAULT_ACL) {
            Ok(1..) => Ok(0),
            _ => Ok(umask & 0o777),
        }
    }
}

#[cfg(test)]
mod tests;
