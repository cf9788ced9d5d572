//! The files that the guest knows. A [`Nodes`] gives each a number, counts the guest's references to it (FUSE's lookup
//! count), and finds the file again.
//!
//! A file is found again by its folder and its name there, and recognized by its [`Identity`]: only those in use, and the
//! most recent others, have a descriptor. A descriptor for each would be as many as the guest has memory for, and by file
//! handles (open_by_handle_at(2)) whoever takes over this process could open every file of the host's file systems,
//! shared or not; overlayfs has none that could be opened anyway. So a file that the *host* moves or removes is lost to
//! the guest (ESTALE, upon which its kernel looks the name up again), unless it is open. One that the guest itself removes
//! keeps its descriptor until the guest forgets it.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Entry, ROOT_ID};
use lru::LruCache;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::news::News;

/// Most files that are known at once, each some 300 bytes of memory.
pub(in crate::devices) const MAX_NODES: usize = 256 * 1024;

/// Beyond so many, the guest is told to keep no names, and so forgets files as soon as it does not use them.
pub(super) const MANY_NODES: usize = MAX_NODES / 2;

/// Most descriptors for files that are not open.
const MAX_RECENT: usize = 8 * 1024;

/// Longest path that is told, as Linux has it.
const MAX_PATH: usize = 4095;

/// How many of the files that had the same name one after the other are looked at.
const MAX_OLDER: usize = 8;

/// Names are followed one at a time, and lead nowhere else: not up, not through symbolic links.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

/// Changes within less may have the same time: Linux takes that of the last tick, of which there are at least a hundred a second.
const TICK: Duration = Duration::from_millis(20);

/// What the guest may know of a file, and what tells it from others.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// Tells a file from all others. The mount is part of it since what may be done with a file depends on the mount that it
/// is reached by, and the type since the number of a file that is gone may become another's, which must not be opened for
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    mount: u64,
    device: (u32, u32),
    inode: u64,
    /// S_IFMT of its mode.
    kind: u32,
}

impl Identity {
    fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
        }
    }
}

/// One file.
#[derive(Debug)]
struct Node {
    identity: Identity,
    /// Where it was seen last. The root has no name.
    parent: u64,
    name: CString,
    /// References that the guest has.
    lookups: u64,
    /// Nodes whose folder this is.
    children: usize,
    descriptor: Weak<OwnedFd>,
    /// The guest has removed a name of it, maybe the last.
    kept: Option<Arc<OwnedFd>>,
    /// The node that had this name before it, if the guest knew one.
    older: Option<u64>,
    /// Whether the guest is told what others change here.
    watched: bool,
    /// When the file had been changed last (st_ctime) at the last open: what the guest has read since is of then. `None` if
    /// that does not tell, or it was never open.
    read: Option<(i64, u32)>,
}

impl Node {
    /// Whether the one who watches has to know of it: of folders, since theirs are the names in them, and of a file that
    /// is shared by itself.
    fn is_news(&self) -> bool {
        let alone = self.parent == ROOT_ID && self.identity.kind == libc::S_IFREG;
        self.watched && (alone || self.identity.kind == libc::S_IFDIR)
    }
}

/// How many descriptors there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Of files that are open, or were removed while the guest knew them.
    pub(super) used: usize,
    /// Of other files.
    pub(super) recent: NonZeroUsize,
}

impl Limits {
    /// Those of a process that may have so many descriptors: an open file takes two, a removed one one, and some remain for all else.
    pub(super) fn of(descriptors: u64, most_open: usize) -> Self {
        let all = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let recent = (all / 8).clamp(1, MAX_RECENT);
        Self {
            used: (all / 4).min(most_open),
            recent: NonZeroUsize::new(recent).expect("at least one"),
        }
    }
}

/// The table behind its lock.
struct Table {
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Identity, u64>,
    /// Never one that was given out before, by this process or another: a guest that is restored elsewhere must not
    /// take a new file for one that it knew.
    next: u64,
    recent: LruCache<u64, Arc<OwnedFd>>,
    /// How many nodes are `kept`.
    kept: usize,
    /// Of those that are watched, the node that was seen last by a name, under the hash of that and of its folder.
    names: HashMap<u64, u64>,
    hasher: RandomState,
    watch: Option<Watch>,
}

/// What others change below some names of the root is told to the guest.
struct Watch {
    /// These names begin so.
    prefix: Vec<u8>,
    news: Arc<News>,
}

/// The files that the guest knows.
pub(super) struct Nodes {
    root: Arc<OwnedFd>,
    limits: Limits,
    hasher: RandomState,
    table: Mutex<Table>,
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes")
            .field("known", &self.len())
            .finish_non_exhaustive()
    }
}

/// What there is to know of an open file, or of one by its name in a folder.
pub(super) fn stat(dir: impl AsFd, name: &CStr) -> io::Result<Statx> {
    let mut flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    if name.is_empty() {
        flags |= AtFlags::EMPTY_PATH;
    }
    Ok(rustix::fs::statx(dir, name, flags, WANTED)?)
}

/// A descriptor that stands for a file without opening it, if it is the one that was there.
///
/// # Errors
/// ESTALE when it is not.
fn find_again(dir: impl AsFd, name: &CStr, identity: Identity) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(dir, name, flags, Mode::empty(), RESOLVE)
        .map_err(|err| lost(err.into()))?;
    if Identity::of(&stat(&found, c"")?) == identity {
        Ok(found)
    } else {
        Err(Errno::STALE.into())
    }
}

/// When a file was changed last, if whatever changes it from now on gives it another time.
pub(super) fn changed(stat: &Statx) -> Option<(i64, u32)> {
    let at = stat.stx_ctime;
    let since = Duration::new(u64::try_from(at.tv_sec).ok()?, at.tv_nsec);
    let age = SystemTime::UNIX_EPOCH.elapsed().ok()?.checked_sub(since)?;
    (age > TICK).then_some((at.tv_sec, at.tv_nsec))
}

/// As stat(2) has it.
pub(super) fn stat64_of(stat: &Statx) -> stat64 {
    let mut attr = Entry::default().attr;
    attr.st_dev = libc::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    attr.st_ino = stat.stx_ino;
    attr.st_nlink = stat.stx_nlink.into();
    attr.st_mode = stat.stx_mode.into();
    attr.st_uid = stat.stx_uid;
    attr.st_gid = stat.stx_gid;
    attr.st_rdev = libc::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
    attr.st_size = stat.stx_size.cast_signed();
    attr.st_blksize = stat.stx_blksize.into();
    attr.st_blocks = stat.stx_blocks.cast_signed();
    (attr.st_atime, attr.st_atime_nsec) = (stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec.into());
    (attr.st_mtime, attr.st_mtime_nsec) = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec.into());
    (attr.st_ctime, attr.st_ctime_nsec) = (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec.into());
    attr
}

impl Nodes {
    /// Those below `root`.
    ///
    /// # Errors
    /// When there is no random number to begin with, or the root is gone.
    pub(super) fn new(root: OwnedFd, limits: Limits) -> io::Result<Self> {
        let mut start = [0; 7];
        rustix::rand::getrandom(&mut start, rustix::rand::GetRandomFlags::empty())?;
        let [a, b, c, d, e, f, g] = start;
        let root = Arc::new(root);
        let table = Table {
            nodes: HashMap::new(),
            numbers: HashMap::new(),
            next: u64::from_le_bytes([a, b, c, d, e, f, g, 0]).max(ROOT_ID + 1),
            recent: LruCache::new(limits.recent),
            kept: 0,
            names: HashMap::new(),
            hasher: RandomState::new(),
            watch: None,
        };
        let nodes = Self {
            root,
            limits,
            hasher: RandomState::new(),
            table: Mutex::new(table),
        };
        nodes.reset()?;
        Ok(nodes)
    }

    /// Forgets every file but the root.
    pub(super) fn reset(&self) -> io::Result<()> {
        let stat = stat(&self.root, c"")?;
        let identity = Identity::of(&stat);
        let mut table = self.lock();
        table.recent.clear();
        table.nodes.clear();
        table.numbers.clear();
        table.names.clear();
        table.kept = 0;
        if let Some(watch) = &table.watch {
            watch.news.reset();
        }
        let root = Node {
            identity,
            parent: 0,
            name: CString::default(),
            lookups: 1,
            children: 0,
            descriptor: Arc::downgrade(&self.root),
            kept: None,
            older: None,
            watched: false,
            read: None,
        };
        table.nodes.insert(ROOT_ID, root);
        table.numbers.insert(identity, ROOT_ID);
        Ok(())
    }

    /// From now on `news` is told what is known below names of the root that begin with `prefix`.
    pub(super) fn watch(&self, prefix: Vec<u8>, news: Arc<News>) {
        self.lock().watch = Some(Watch { prefix, news });
    }

    /// How many files are known.
    pub(super) fn len(&self) -> usize {
        self.lock().nodes.len()
    }

    /// How many names lead to files that are watched.
    #[cfg(test)]
    pub(super) fn names(&self) -> usize {
        self.lock().names.len()
    }

    /// A number that nothing else has, node or open file.
    pub(super) fn number(&self) -> u64 {
        self.lock().number()
    }

    /// The node of what is `name` in the folder `parent`, with one more reference to it.
    ///
    /// # Errors
    /// ENFILE when too many files are known; ESTALE when the folder is not.
    pub(super) fn refer(&self, parent: u64, name: &CStr, stat: &Statx) -> io::Result<u64> {
        let identity = Identity::of(stat);
        let mut table = self.lock();
        if let Some(&number) = table.numbers.get(&identity) {
            table.place(number, parent, name)?;
            let node = table.nodes.get_mut(&number).ok_or(Errno::STALE)?;
            node.lookups = node.lookups.saturating_add(1);
            return Ok(number);
        }
        if table.nodes.len() >= MAX_NODES {
            return Err(Errno::NFILE.into());
        }
        let folder = table.nodes.get_mut(&parent).ok_or(Errno::STALE)?;
        folder.children += 1;
        let mut watched = folder.watched;
        if parent == ROOT_ID
            && let Some(watch) = &table.watch
        {
            watched = name.to_bytes().starts_with(&watch.prefix);
        }
        let number = table.number();
        let node = Node {
            identity,
            parent,
            name: name.to_owned(),
            lookups: 1,
            children: 0,
            descriptor: Weak::new(),
            kept: None,
            older: None,
            watched,
            read: None,
        };
        if let Some(watch) = &table.watch
            && node.is_news()
        {
            watch.news.known(number);
        }
        table.nodes.insert(number, node);
        table.numbers.insert(identity, number);
        table.enter(number);
        Ok(number)
    }

    /// Takes references away. A file without any is forgotten.
    pub(super) fn forget(&self, number: u64, count: u64) {
        if number == ROOT_ID {
            return;
        }
        let mut table = self.lock();
        if let Some(node) = table.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(count);
            table.sweep(number);
        }
    }

    /// One more reference to what the guest knows as `name` in the folder `parent`, and the host no longer has there: `now`
    /// is what it has. `None` if the guest knows nothing of the kind.
    pub(super) fn refer_to_former(
        &self,
        parent: u64,
        name: &CStr,
        now: Option<&Statx>,
        is_folder: bool,
    ) -> Option<Former> {
        let now = now.map(Identity::of);
        let mut table = self.lock();
        let number = table.by_name(parent, name).into_iter().find(|number| {
            let is_it = |node: &Node| {
                Some(node.identity) != now && (node.identity.kind == libc::S_IFDIR) == is_folder
            };
            table.nodes.get(number).is_some_and(is_it)
        })?;
        let descriptor = table.present(number).ok().flatten();
        let node = table.nodes.get_mut(&number)?;
        node.lookups = node.lookups.saturating_add(1);
        Some(Former {
            number,
            kind: node.identity.kind,
            descriptor,
        })
    }

    /// Where a file is, below the root. `None` if it is not known, or its path is too long to be of use.
    pub(super) fn path(&self, number: u64) -> Option<Vec<u8>> {
        self.lock().path(number)
    }

    /// What is at a path below the root now.
    pub(super) fn find_path(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), RESOLVE)?;
        Ok(found)
    }

    /// Whether the file is in the root.
    pub(super) fn is_top(&self, number: u64) -> bool {
        self.lock()
            .get(number)
            .is_ok_and(|node| node.parent == ROOT_ID)
    }

    /// A number for the file with inode `inode` on the mount of the node `number`, or for that itself: no other file has it,
    /// and it stays the same while this process runs.
    pub(super) fn fingerprint(&self, number: u64, inode: Option<u64>) -> io::Result<u64> {
        let Identity {
            mount,
            device,
            inode: own,
            ..
        } = self.lock().get(number)?.identity;
        let inode = inode.unwrap_or(own);
        Ok(self.hasher.hash_one((mount, device, inode)))
    }

    /// S_IFMT of a file's mode.
    pub(super) fn kind(&self, number: u64) -> io::Result<u32> {
        Ok(self.lock().get(number)?.identity.kind)
    }

    /// The root, and what the guest knows of that is mounted below it.
    pub(super) fn tops(&self) -> Vec<u64> {
        let table = self.lock();
        let is_top = |node: &Node| {
            let parent = table.nodes.get(&node.parent);
            parent.is_none_or(|parent| parent.identity.mount != node.identity.mount)
        };
        let nodes = table.nodes.iter();
        nodes
            .filter(|(_, node)| is_top(node))
            .map(|(&number, _)| number)
            .collect()
    }

    /// Takes note that a file is opened that has been `changed` last at this time, if that tells. Returns whether it is still
    /// what the guest has read of it.
    pub(super) fn is_as_read(&self, number: u64, changed: Option<(i64, u32)>) -> bool {
        let mut table = self.lock();
        let Some(node) = table.nodes.get_mut(&number) else {
            return false;
        };
        let before = std::mem::replace(&mut node.read, changed);
        changed.is_some() && before == changed
    }

    /// A descriptor that stands for the file (O_PATH).
    ///
    /// # Errors
    /// ESTALE when the file is not known, or is no longer where it was.
    pub(super) fn descriptor(&self, number: u64) -> io::Result<Arc<OwnedFd>> {
        let (mut at, names) = self.lock().way(number)?;
        for (number, identity, name) in names.into_iter().rev() {
            at = Arc::new(find_again(&at, &name, identity)?);
            self.lock().located(number, &at);
        }
        Ok(at)
    }

    /// A descriptor that stands for the file, which `locate` finds if there is none.
    ///
    /// # Errors
    /// ESTALE when the file is not known, and those of `locate`.
    pub(super) fn descriptor_by(
        &self,
        number: u64,
        locate: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<Arc<OwnedFd>> {
        if let Some(present) = self.lock().present(number)? {
            return Ok(present);
        }
        let located = Arc::new(locate()?);
        self.lock().located(number, &located);
        Ok(located)
    }

    /// What there is to know of a file.
    ///
    /// # Errors
    /// As [`Self::descriptor`].
    pub(super) fn stat(&self, number: u64) -> io::Result<Statx> {
        let (parent, identity, name) = {
            let mut table = self.lock();
            if let Some(descriptor) = table.present(number)? {
                drop(table);
                return stat(descriptor, c"");
            }
            let node = table.get(number)?;
            (node.parent, node.identity, node.name.clone())
        };
        let found = stat(self.descriptor(parent)?, &name).map_err(lost)?;
        if Identity::of(&found) == identity {
            Ok(found)
        } else {
            Err(Errno::STALE.into())
        }
    }

    /// To be called before the guest removes a name, or puts another file in its place: if it knows the file, this keeps a
    /// descriptor.
    pub(super) fn keep(&self, dir: impl AsFd, name: &CStr) {
        let Ok(there) = stat(&dir, name) else {
            return;
        };
        let identity = Identity::of(&there);
        let number = {
            let table = self.lock();
            match table.numbers.get(&identity) {
                Some(&number) if table.kept < self.limits.used => number,
                _ => return,
            }
        };
        let Ok(descriptor) = self.descriptor_by(number, || find_again(dir, name, identity)) else {
            return;
        };
        let mut table = self.lock();
        // Another thread may have kept it meanwhile, by another name.
        if let Some(node) = table.nodes.get_mut(&number)
            && node.kept.is_none()
        {
            node.kept = Some(descriptor);
            table.kept += 1;
            // It needs no place among those that may go.
            table.recent.pop(&number);
        }
    }

    /// Whether the guest itself has removed a name of the file, for which that has been kept.
    pub(super) fn is_kept(&self, number: u64) -> bool {
        let table = self.lock();
        table
            .nodes
            .get(&number)
            .is_some_and(|node| node.kept.is_some())
    }

    /// What is `name` in the folder `parent` has just been moved there.
    pub(super) fn moved(&self, parent: u64, name: &CStr, stat: &Statx) {
        let mut table = self.lock();
        if let Some(&number) = table.numbers.get(&Identity::of(stat)) {
            // The folder was known a moment ago; if it is not now, nor is what is in it.
            let _ = table.place(number, parent, name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a name that led to a file once.
fn lost(err: io::Error) -> io::Error {
    match err.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EXDEV) => Errno::STALE.into(),
        _ => err,
    }
}

/// What the guest knows by a name that is another's now, or nobody's.
pub(super) struct Former {
    pub(super) number: u64,
    /// S_IFMT of its mode.
    pub(super) kind: u32,
    pub(super) descriptor: Option<Arc<OwnedFd>>,
}

/// Nodes on the way to a file, the last first.
type Way = Vec<(u64, Identity, CString)>;

impl Table {
    fn get(&self, number: u64) -> io::Result<&Node> {
        Ok(self.nodes.get(&number).ok_or(Errno::STALE)?)
    }

    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    fn key(&self, parent: u64, name: &CStr) -> u64 {
        self.hasher.hash_one((parent, name))
    }

    /// Notes that a node is the one by its name, if it is watched.
    fn enter(&mut self, number: u64) {
        let Some(node) = self.nodes.get(&number).filter(|node| node.watched) else {
            return;
        };
        let key = self.key(node.parent, &node.name);
        let older = self.names.insert(key, number);
        if let Some(node) = self.nodes.get_mut(&number) {
            node.older = older.filter(|&older| older != number);
        }
    }

    /// Notes that it no longer is, before its name changes.
    fn leave(&mut self, node: &Node, number: u64) {
        if !node.watched {
            return;
        }
        let key = self.key(node.parent, &node.name);
        if self.names.get(&key) != Some(&number) {
            return;
        }
        // That may have another name by now, under which it is to be found, and to be forgotten.
        let has_name = |older: &u64| {
            let older = self.nodes.get(older);
            older.is_some_and(|older| older.parent == node.parent && older.name == node.name)
        };
        match node.older.filter(has_name) {
            Some(older) => self.names.insert(key, older),
            None => self.names.remove(&key),
        };
    }

    /// The nodes that were seen by a name, the last first.
    fn by_name(&self, parent: u64, name: &CStr) -> Vec<u64> {
        let mut found = Vec::new();
        let mut next = self.names.get(&self.key(parent, name)).copied();
        // A few only: with nodes that went and came back, they may be a circle.
        while found.len() < MAX_OLDER
            && let Some(number) = next
            && let Some(node) = self.nodes.get(&number)
            && node.parent == parent
            && *node.name == *name
        {
            found.push(number);
            next = node.older;
        }
        found
    }

    fn path(&self, number: u64) -> Option<Vec<u8>> {
        let (mut names, mut at, mut len) = (Vec::new(), number, 0);
        while at != ROOT_ID {
            let node = self.nodes.get(&at)?;
            let name = node.name.to_bytes();
            len += name.len() + 1;
            // What has no name (O_TMPFILE) has no path.
            if name.is_empty() || len > MAX_PATH {
                return None;
            }
            names.push(name);
            at = node.parent;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// The descriptor that a file has now, if it has one.
    fn present(&mut self, number: u64) -> io::Result<Option<Arc<OwnedFd>>> {
        let descriptor = self.get(number)?.descriptor.upgrade();
        if descriptor.is_some() {
            self.recent.promote(&number);
        }
        Ok(descriptor)
    }

    /// The nearest folder above the file, or itself, that has a descriptor, and what leads from there to it.
    fn way(&mut self, number: u64) -> io::Result<(Arc<OwnedFd>, Way)> {
        let mut names = Way::new();
        let mut at = number;
        loop {
            if let Some(descriptor) = self.present(at)? {
                return Ok((descriptor, names));
            }
            let node = self.get(at)?;
            names.push((at, node.identity, node.name.clone()));
            at = node.parent;
        }
    }

    /// A descriptor for a file that had none.
    fn located(&mut self, number: u64, descriptor: &Arc<OwnedFd>) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.descriptor = Arc::downgrade(descriptor);
            self.recent.put(number, Arc::clone(descriptor));
        }
    }

    /// Notes where a file is. Nothing changes where that cannot be: a folder that the host has moved about may seem to be
    /// below itself.
    fn place(&mut self, number: u64, parent: u64, name: &CStr) -> io::Result<()> {
        let node = self.get(number)?;
        if number == ROOT_ID || (node.parent == parent && *node.name == *name) {
            return Ok(());
        }
        let old = node.parent;
        if node.children > 0 {
            let mut above = parent;
            while above != ROOT_ID {
                if above == number {
                    return Ok(());
                }
                above = self.get(above)?.parent;
            }
        }
        self.nodes.get_mut(&parent).ok_or(Errno::STALE)?.children += 1;
        if let Some(mut node) = self.nodes.remove(&number) {
            self.leave(&node, number);
            node.parent = parent;
            node.name = name.to_owned();
            self.nodes.insert(number, node);
            self.enter(number);
        }
        if let Some(folder) = self.nodes.get_mut(&old) {
            folder.children -= 1;
        }
        self.sweep(old);
        Ok(())
    }

    /// Removes a node that nobody refers to, and folders above it that were there for it alone.
    fn sweep(&mut self, mut number: u64) {
        while let Some(node) = self.nodes.get(&number)
            && node.lookups == 0
            && node.children == 0
        {
            if node.is_news()
                && let Some(watch) = &self.watch
            {
                watch.news.forgotten(number, self.path(number));
            }
            let Some(node) = self.nodes.remove(&number) else {
                return;
            };
            self.leave(&node, number);
            self.numbers.remove(&node.identity);
            self.recent.pop(&number);
            self.kept -= usize::from(node.kept.is_some());
            number = node.parent;
            if let Some(folder) = self.nodes.get_mut(&number) {
                folder.children -= 1;
            }
        }
    }
}
