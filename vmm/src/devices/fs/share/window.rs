//! The DAX window (virtio 1.3, 5.11.6.3): the device's shared memory region 0, in which the guest has files mapped that it
//! then reads and writes without a request. It holds pieces of [`CHUNK`] bytes; which file is where is the guest's to say
//! (FUSE_SETUPMAPPING, FUSE_REMOVEMAPPING).
//!
//! A piece that reaches past the end of its file goes on with empty memory. Where there is nothing at all, KVM would have the
//! guest wait for a page that never comes: a vCPU that touches what the host has cut off spins for good. So the length of
//! each file that is mapped is followed: by the requests that tell the guest of it or change it, before they are answered,
//! and by inotify, for what the host does. A program of the guest that touches what was cut off reads zeroes, and what it
//! writes there is lost.
//!
//! Not every file system tells of all changes, and not every file can be mapped: which ones the guest accesses in this way is
//! told file by file (FUSE_ATTR_DAX), and the others it accesses as without a window.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, SeekFrom, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;
use vm_memory::ByteValued;

use super::{OVERLAYFS, Share, is_silent, node, path_of};
use crate::devices::fs::FsError;
use crate::virtio::SharedMemory;
use crate::virtio::queue::Readable;

/// What Linux maps at once. Other pieces are refused, so that the guest makes no more than two mappings of each of the window's:
/// the file, and what is behind its end.
pub(super) const CHUNK: u64 = SharedMemory::UNIT;

/// FUSE_ATTR_DAX.
const ATTR_DAX: u32 = 1 << 1;

/// Flags of FUSE_SETUPMAPPING.
const WRITE: u64 = 1;
const READ: u64 = 1 << 1;

/// Most file systems whose kind is remembered.
const MAX_KINDS: usize = 4096;

const PAGE: u64 = 4096;

/// fuse_setupmapping_in. Linux gives no handle: what it maps belongs to the file and not to who has opened it, and it has
/// checked what they may.
#[derive(Debug, Default, Clone, Copy)]
#[repr(C)]
pub(super) struct SetupMappingIn {
    fh: u64,
    foffset: u64,
    len: u64,
    flags: u64,
    moffset: u64,
}

/// fuse_removemapping_one.
#[derive(Debug, Default, Clone, Copy)]
#[repr(C)]
struct RemoveMappingOne {
    moffset: u64,
    len: u64,
}

// SAFETY: integers without padding, for which every bit pattern is valid.
unsafe impl ByteValued for SetupMappingIn {}
// SAFETY: as above.
unsafe impl ByteValued for RemoveMappingOne {}

/// A file of which something is mapped.
#[derive(Debug)]
struct Mapped {
    anchor: Arc<OwnedFd>,
    /// Open to be written as well, if `writable`.
    file: File,
    writable: bool,
    /// On overlayfs: what is open to be read may be the file below, of which another takes the place when it is written to.
    moves: bool,
    size: u64,
    watch: i32,
    pieces: BTreeSet<usize>,
}

/// A piece of the window in use.
#[derive(Debug)]
struct Piece {
    node: u64,
    from: u64,
    writable: bool,
    /// How much of it is the file; the rest is empty memory. `None`, as long as it is neither.
    shown: Option<u64>,
}

#[derive(Debug)]
struct Table {
    files: HashMap<u64, Mapped>,
    pieces: Vec<Option<Piece>>,
    /// The nodes that a watch is about: more than one, where a file is reached by two mounts.
    watches: HashMap<i32, BTreeSet<u64>>,
    /// [`SharedMemory::filled`], at the last look.
    filled: usize,
}

impl Table {
    /// Sees to it that what is mapped of `file` to be written has its blocks from `from` to `to`, see [`reserve`].
    fn reserve(&self, file: &Mapped, from: u64, to: u64) -> io::Result<()> {
        for &index in &file.pieces {
            if let Some(Some(piece)) = self.pieces.get(index)
                && piece.writable
            {
                let to = to.min(piece.from + CHUNK);
                reserve(&file.file, from.max(piece.from), to)?;
            }
        }
        Ok(())
    }
}

/// The window, and what is mapped there.
pub(super) struct Window {
    memory: Arc<SharedMemory>,
    events: OwnedFd,
    table: Mutex<Table>,
    /// Whether the files of a mount can be mapped, by the mount and the device.
    kinds: Mutex<HashMap<(u64, u32, u32), bool>>,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

impl Window {
    /// Nothing is mapped.
    ///
    /// # Errors
    /// As inotify_init(2).
    pub(super) fn new(memory: Arc<SharedMemory>) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let pieces = usize::try_from(memory.len() / CHUNK).map_err(|_| Errno::INVAL)?;
        let table = Table {
            files: HashMap::new(),
            pieces: (0..pieces).map(|_| None).collect(),
            watches: HashMap::new(),
            filled: 0,
        };
        Ok(Self {
            memory,
            events,
            table: Mutex::new(table),
            kinds: Mutex::default(),
        })
    }

    pub(super) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// Lets go of all that is mapped.
    pub(super) fn reset(&self) {
        let mut table = self.lock();
        if let Err(err) = self.memory.hide_all() {
            log::warn!("files stay mapped for a guest that has let go of them: {err}");
        }
        for watch in table.watches.keys() {
            self.unwatch(*watch);
        }
        table.watches.clear();
        table.files.clear();
        table.pieces.fill_with(|| None);
        drop(table);
        self.kinds().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<(u64, u32, u32), bool>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unwatch(&self, watch: i32) {
        // The kernel has ended it by itself, if the file is gone.
        let _ = inotify::remove_watch(&self.events, watch);
    }

    /// Lets go of a piece, if it is in use.
    fn release(&self, table: &mut Table, index: usize) -> io::Result<()> {
        let Some(piece) = table.pieces.get_mut(index).and_then(Option::take) else {
            return Ok(());
        };
        self.forget(table, piece.node, index);
        self.memory.hide(at(index), CHUNK)
    }

    /// Takes a piece off its file, and forgets the file with the last.
    fn forget(&self, table: &mut Table, node: u64, index: usize) {
        let Some(file) = table.files.get_mut(&node) else {
            return;
        };
        file.pieces.remove(&index);
        if !file.pieces.is_empty() {
            return;
        }
        let watch = file.watch;
        table.files.remove(&node);
        if let Some(nodes) = table.watches.get_mut(&watch) {
            nodes.remove(&node);
            if nodes.is_empty() {
                table.watches.remove(&watch);
                self.unwatch(watch);
            }
        }
    }

    /// A file of which the length is followed from now on.
    fn watched(
        &self,
        table: &mut Table,
        node: u64,
        anchor: &Arc<OwnedFd>,
        file: File,
        writable: bool,
    ) -> io::Result<Mapped> {
        let moves = rustix::fs::fstatfs(&file)?.f_type == OVERLAYFS;
        let path = path_of(anchor.as_fd());
        let watch = inotify::add_watch(&self.events, path, WatchFlags::MODIFY)?;
        table.watches.entry(watch).or_default().insert(node);
        Ok(Mapped {
            anchor: Arc::clone(anchor),
            file,
            writable,
            moves,
            size: 0,
            watch,
            pieces: BTreeSet::new(),
        })
    }

    /// Puts a piece of a file that is open where it belongs.
    fn put(&self, table: &mut Table, index: usize, piece: Piece, all: bool) -> io::Result<()> {
        let Piece {
            node,
            from,
            writable,
            ..
        } = piece;
        let file = table.files.get(&node).ok_or(Errno::STALE)?;
        if writable {
            let size = node::stat(&file.file, c"")?.stx_size;
            reserve(&file.file, from, size.min(from + CHUNK))?;
        }
        *table.pieces.get_mut(index).ok_or(Errno::INVAL)? = Some(piece);
        self.show(table, node, all)
    }

    /// Shows all pieces of a file as long as it is now; with `all`, anew.
    fn show(&self, table: &mut Table, node: u64, all: bool) -> io::Result<()> {
        let Table { files, pieces, .. } = table;
        let Some(file) = files.get_mut(&node) else {
            return Ok(());
        };
        file.size = node::stat(&file.file, c"")?.stx_size;
        for &index in &file.pieces {
            let Some(piece) = pieces.get_mut(index).and_then(Option::as_mut) else {
                continue;
            };
            let end = file
                .size
                .checked_next_multiple_of(PAGE)
                .ok_or(Errno::FBIG)?;
            let shown = end.saturating_sub(piece.from).min(CHUNK);
            let before = piece.shown.filter(|_| !all);
            self.show_piece(index, piece, file.file.as_fd(), before, shown)?;
            piece.shown = Some(shown);
        }
        Ok(())
    }

    /// Shows `shown` bytes of a file in a piece; it shows `before` bytes, or is to be shown anew. The guest may use it
    /// meanwhile: what stays is replaced by the same in one call.
    fn show_piece(
        &self,
        index: usize,
        piece: &Piece,
        file: BorrowedFd<'_>,
        before: Option<u64>,
        shown: u64,
    ) -> io::Result<()> {
        let start = at(index);
        let (file_from, empty_to) = match before {
            Some(before) => (before, before),
            None => (0, CHUNK),
        };
        if file_from < shown {
            let from = piece.from + file_from;
            let len = shown - file_from;
            self.memory
                .show(start + file_from, len, file, from, piece.writable)?;
        }
        if shown < empty_to {
            self.memory
                .blank(start + shown, empty_to - shown, piece.writable)?;
        }
        Ok(())
    }
}

/// Where a piece is.
fn at(index: usize) -> u64 {
    index as u64 * CHUNK
}

/// Sees to it that a file has its blocks from `from` to `to`: to write to a hole of a full file system would be to wait for
/// ever. File systems that know nothing of it are left alone.
fn reserve(file: &File, from: u64, to: u64) -> io::Result<()> {
    if from >= to {
        return Ok(());
    }
    match rustix::fs::seek(file, SeekFrom::Hole(from)) {
        Ok(hole) if hole < to => {}
        // It ends before.
        Err(Errno::NXIO) => {}
        _ => return Ok(()),
    }
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, from, to - from) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        reserved => Ok(reserved?),
    }
}

impl Share {
    /// Lets the guest have files mapped in `memory`.
    ///
    /// # Errors
    /// When files cannot be watched: the host may allow no more inotify instances.
    pub fn set_window(&mut self, memory: Arc<SharedMemory>) -> Result<(), FsError> {
        self.window = Some(Window::new(memory).map_err(FsError::NoWatch)?);
        Ok(())
    }

    /// In which the guest has files mapped, if it may.
    pub(in crate::devices::fs) fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        Some(Arc::clone(self.window.as_ref()?.memory()))
    }

    /// What is readable when [`Self::follow_host`] has something to do.
    pub(in crate::devices::fs) fn host_events(&self) -> Option<&OwnedFd> {
        self.window.as_ref().map(|window| &window.events)
    }

    /// Follows what the host has done to the lengths of files that are mapped.
    pub(in crate::devices::fs) fn follow_host(&self) {
        let Some(window) = &self.window else {
            return;
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&window.events, &mut buffer);
        let mut changed = BTreeSet::new();
        let mut all = false;
        // When there are no more it fails.
        while let Ok(event) = reader.next() {
            changed.insert(event.wd());
            all |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
        }
        let table = window.lock();
        let nodes: Vec<u64> = if all {
            table.files.keys().copied().collect()
        } else {
            let of = |watch| table.watches.get(watch).into_iter().flatten();
            changed.iter().flat_map(of).copied().collect()
        };
        drop(table);
        for node in nodes {
            self.follow(node, true);
        }
    }

    /// FUSE_ATTR_DAX, if the guest is to map this file instead of asking for what it holds.
    pub(super) fn attr_flags(&self, inode: u64, stat: &Statx) -> u32 {
        let Some(window) = &self.window else {
            return 0;
        };
        // What somebody writes takes the bits away where it comes by a request.
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFREG || has_bits(stat) {
            return 0;
        }
        let key = (stat.stx_mnt_id, stat.stx_dev_major, stat.stx_dev_minor);
        let known = window.kinds().get(&key).copied();
        let suits = known.unwrap_or_else(|| {
            let descriptor = self.nodes.descriptor(inode);
            let suits = descriptor.and_then(is_silent).unwrap_or(false);
            let mut kinds = window.kinds();
            if kinds.len() >= MAX_KINDS {
                kinds.clear();
            }
            kinds.insert(key, suits);
            suits
        });
        if suits { ATTR_DAX } else { 0 }
    }

    /// How long what the guest is told of a file is valid.
    pub(super) fn attr_timeout(&self, stat: &Statx) -> Duration {
        // The bits may go at any open.
        if self.window.is_some() && has_bits(stat) {
            Duration::ZERO
        } else {
            self.timeout
        }
    }

    /// A user has opened a file to write to it, and may do so without a request that says so: setuid and setgid bits go now.
    /// The guest is told not to map such files, but may do so already.
    pub(super) fn take_bits(&self, ctx: &Context, inode: u64, flags: OFlags) -> io::Result<()> {
        let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        if self.window.is_none() || ctx.uid == 0 || !writes {
            return Ok(());
        }
        let file = self.nodes.descriptor(inode)?;
        let stat = node::stat(&*file, c"")?;
        let mode = u32::from(stat.stx_mode);
        let mut kept = mode & !libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            kept &= !libc::S_ISGID;
        }
        if kept == mode || mode & libc::S_IFMT != libc::S_IFREG {
            return Ok(());
        }
        let name = DecInt::from_fd(&*file);
        let mode = Mode::from_raw_mode(kept & 0o7777);
        Ok(rustix::fs::chmodat(
            &self.descriptors,
            name,
            mode,
            AtFlags::empty(),
        )?)
    }

    /// The guest is told that a file has `size` bytes, or has made it so long: it may touch them from now on.
    pub(super) fn sized(&self, inode: u64, size: u64) {
        let Some(window) = &self.window else {
            return;
        };
        let table = window.lock();
        let stale = table
            .files
            .get(&inode)
            .is_some_and(|file| file.size != size);
        drop(table);
        if stale {
            self.follow(inode, false);
        }
    }

    /// The guest has written up to `end`.
    pub(super) fn written(&self, inode: u64, end: u64) {
        let Some(window) = &self.window else {
            return;
        };
        let table = window.lock();
        let stale = table.files.get(&inode).is_some_and(|file| file.size < end);
        drop(table);
        if stale {
            self.follow(inode, false);
        }
    }

    /// The guest is about to make a file longer, so that it ends, or goes on, at `end`: what is mapped there to be written
    /// gets its blocks.
    pub(super) fn about_to_grow(&self, inode: u64, end: u64) -> io::Result<()> {
        let Some(window) = &self.window else {
            return Ok(());
        };
        let table = window.lock();
        let Some(file) = table.files.get(&inode).filter(|file| file.size < end) else {
            return Ok(());
        };
        table.reserve(file, file.size, end)
    }

    /// The guest has made a hole from `from` to `to`: what is mapped there to be written gets its blocks again.
    pub(super) fn emptied(&self, inode: u64, from: u64, to: u64) -> io::Result<()> {
        let Some(window) = &self.window else {
            return Ok(());
        };
        let table = window.lock();
        match table.files.get(&inode) {
            Some(file) => table.reserve(file, from, to.min(file.size)),
            None => Ok(()),
        }
    }

    /// The guest has opened a file to write to it.
    pub(super) fn opened_to_write(&self, inode: u64) {
        let Some(window) = &self.window else {
            return;
        };
        let table = window.lock();
        let moves = |file: &Mapped| file.moves && !file.writable;
        let moved = table.files.get(&inode).is_some_and(moves);
        drop(table);
        if moved {
            self.follow_moved(window, inode);
        }
    }

    /// Shows what is mapped of a file as long as that is now. `changed`: its content may be another, too.
    fn follow(&self, inode: u64, changed: bool) {
        let Some(window) = &self.window else {
            return;
        };
        let mut table = window.lock();
        let Some(file) = table.files.get(&inode) else {
            return;
        };
        let size = node::stat(&file.file, c"").map(|stat| stat.stx_size);
        let changed = changed || size.is_ok_and(|size| size != file.size);
        let moved = changed && file.moves && !file.writable;
        let filled = window.memory.filled();
        if filled != table.filled {
            // Somewhere in the window there is an empty page in the place of a file's.
            table.filled = filled;
            let nodes: Vec<u64> = table.files.keys().copied().collect();
            for node in nodes {
                complain(window.show(&mut table, node, true));
            }
        } else {
            complain(window.show(&mut table, inode, false));
        }
        drop(table);
        if moved {
            self.follow_moved(window, inode);
        }
    }

    /// Shows the file anew that is in the place of one that was written to.
    fn follow_moved(&self, window: &Window, inode: u64) {
        let mut table = window.lock();
        let Some(file) = table.files.get_mut(&inode) else {
            return;
        };
        match self.open_to_map(&file.anchor, file.writable) {
            Ok(opened) => {
                file.file = opened;
                complain(window.show(&mut table, inode, true));
            }
            Err(err) => complain(Err(err)),
        }
    }

    fn open_to_map(&self, anchor: &OwnedFd, writable: bool) -> io::Result<File> {
        let mode = if writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let flags = mode | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = self.reopen(anchor, libc::S_IFREG, flags)?;
        // What the guest is told of a file does not keep it from asking. Other file systems may map more than they are asked
        // for (hugetlbfs rounds lengths up), or take for ever to say how long a file is.
        if is_silent(&file)? {
            Ok(file)
        } else {
            Err(Errno::NODEV.into())
        }
    }

    /// FUSE_SETUPMAPPING.
    pub(super) fn set_up_mapping(&self, inode: u64, asked: &SetupMappingIn) -> io::Result<()> {
        let window = self.window.as_ref().ok_or(Errno::NOSYS)?;
        let SetupMappingIn {
            foffset,
            len,
            flags,
            moffset,
            ..
        } = *asked;
        let places = pieces_of(window, moffset, len)?;
        let end = foffset
            .checked_add(len)
            .and_then(|end| i64::try_from(end).ok());
        if !foffset.is_multiple_of(CHUNK) || end.is_none() {
            return Err(Errno::INVAL.into());
        }
        let writable = match flags {
            READ => false,
            WRITE => true,
            flags if flags == READ | WRITE => true,
            _ => return Err(Errno::INVAL.into()),
        };
        if self.nodes.kind(inode)? != libc::S_IFREG {
            return Err(Errno::INVAL.into());
        }
        let anchor = self.nodes.descriptor(inode)?;
        let starts = (0..).map(|count| foffset + count * CHUNK);
        for (index, from) in places.zip(starts) {
            let piece = Piece {
                node: inode,
                from,
                writable,
                shown: None,
            };
            self.map_piece(window, &anchor, index, piece)?;
        }
        Ok(())
    }

    fn map_piece(
        &self,
        window: &Window,
        anchor: &Arc<OwnedFd>,
        index: usize,
        asked: Piece,
    ) -> io::Result<()> {
        let Piece { node, writable, .. } = asked;
        let (mut table, opened) = loop {
            let has = |table: &Table| {
                let file = table.files.get(&node);
                file.is_some_and(|file| file.writable || !writable)
            };
            let table = window.lock();
            if has(&table) {
                break (table, None);
            }
            drop(table);
            // Without the lock: it may have the host copy the file.
            let opened = self.open_to_map(anchor, writable)?;
            let table = window.lock();
            if !has(&table) {
                break (table, Some(opened));
            }
        };
        let table = &mut *table;
        let mut all = false;
        if let Some(opened) = opened {
            if let Some(file) = table.files.get_mut(&node) {
                // The pieces that are there to be read go over to it.
                (file.file, file.writable, all) = (opened, true, true);
            } else {
                let file = window.watched(table, node, anchor, opened, writable)?;
                table.files.insert(node, file);
            }
        }
        let before = table.pieces.get_mut(index).and_then(Option::take);
        if let Some(file) = table.files.get_mut(&node) {
            file.pieces.insert(index);
        }
        if let Some(before) = before
            && before.node != node
        {
            window.forget(table, before.node, index);
        }
        window.put(table, index, asked, all).inspect_err(|_| {
            if let Some(piece) = table.pieces.get_mut(index) {
                *piece = None;
            }
            window.forget(table, node, index);
            complain(window.memory.hide(at(index), CHUNK));
        })
    }

    /// FUSE_REMOVEMAPPING: as many pieces as the body begins with.
    pub(super) fn remove_mappings(&self, body: &mut Readable<'_>) -> io::Result<()> {
        let window = self.window.as_ref().ok_or(Errno::NOSYS)?;
        let count: u32 = body.read_obj().ok_or(Errno::INVAL)?;
        // No piece has to be named twice.
        let mut left = window.memory.len() / CHUNK;
        for _ in 0..count {
            let one: RemoveMappingOne = body.read_obj().ok_or(Errno::INVAL)?;
            left = left.checked_sub(one.len / CHUNK).ok_or(Errno::INVAL)?;
            let mut table = window.lock();
            for index in pieces_of(window, one.moffset, one.len)? {
                window.release(&mut table, index)?;
            }
        }
        Ok(())
    }
}

/// The pieces from `start` on, if they lie in the window.
fn pieces_of(window: &Window, start: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
    let end = start.checked_add(len).ok_or(Errno::INVAL)?;
    let whole = start.is_multiple_of(CHUNK) && len.is_multiple_of(CHUNK);
    if len == 0 || !whole || end > window.memory.len() {
        return Err(Errno::INVAL.into());
    }
    let index = |at: u64| usize::try_from(at / CHUNK).map_err(|_| Errno::INVAL);
    Ok(index(start)?..index(end)?)
}

/// Whether it is setuid or setgid.
fn has_bits(stat: &Statx) -> bool {
    u32::from(stat.stx_mode) & (libc::S_ISUID | libc::S_ISGID) != 0
}

fn complain(done: io::Result<()>) {
    if let Err(err) = done {
        log::warn!("what the guest has mapped of a file cannot be shown: {err}");
    }
}
