//! Watches on the host what the guest knows of a shared folder, so that the guest can be told what others change: the
//! guest's kernel sees what passes through it, and nothing else.
//!
//! A thread of its own marks each folder that becomes known to the guest, and each file that is shared by itself, and
//! takes the mark away when the guest forgets it; a program of the guest that watches a file keeps it known. What nobody in
//! the guest knows costs nothing. It does so behind the back of who serves the guest's requests, so what is changed in the
//! moment after a folder was first seen may be missed.
//!
//! What the guest has done itself, its kernel has told of. The kernel of the host knows that it was this process that did
//! it on the guest's behalf, and so it is passed over here, however often the guest writes.

mod fanotify;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;

use super::device::keep_capabilities_of_users;
use super::share::{Fate, News, Share};
use crate::changes::Changes;
use crate::control::{ChangeKind, FileChange};
use crate::vcpu::VcpuSetup;
use fanotify::{Event, FileKey, Group, Place};

/// How long events are left to the kernel after some were taken. It puts together those that say the same, so that who
/// writes all the time, the guest itself above all, wakes this thread no more often than that.
const GATHERING: Duration = Duration::from_millis(10);

/// Room for some hundred events.
const BUFFER: usize = 32 * 1024;

/// How often the buffer is filled in a row.
const MAX_READS: usize = 64;

/// Groups and marks are limited by user, to 128 groups by default. So that the VMs of a host do not take from root's, each
/// is a user of its own, from this one on, of a range that nobody gives to users.
const FIRST_USER: u32 = 0xf000_0000;

/// The thread that watches. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Watch {
    news: Arc<News>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches what `news` has of `share`. `setup` confines the thread.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub(super) fn spawn(
        share: Arc<Share>,
        news: Arc<News>,
        changes: Arc<Changes>,
        setup: VcpuSetup,
    ) -> io::Result<Self> {
        let seen = Arc::clone(&news);
        let thread = std::thread::Builder::new()
            .name("fs-watch".to_owned())
            .spawn(move || {
                keep_capabilities_of_users();
                let served = setup().and_then(|()| {
                    count_by_itself();
                    Watcher::new(share, seen, changes).run()
                });
                if let Err(err) = served {
                    log::error!("what others change in a shared folder is not seen: {err}");
                }
            })?;
        Ok(Self {
            news,
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.news.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that watches a shared folder panicked");
        }
    }
}

/// See [`FIRST_USER`].
fn count_by_itself() {
    let user = Uid::from_raw(FIRST_USER.wrapping_add(std::process::id()));
    if let Err(err) = set_thread_res_uid(None, Some(user), None) {
        log::debug!("what is watched counts as root's: {err}");
    }
}

/// What the thread has.
struct Watcher {
    share: Arc<Share>,
    news: Arc<News>,
    changes: Arc<Changes>,
    group: Option<Group>,
    /// What is marked, by its number.
    marked: HashMap<u64, FileKey>,
    /// The numbers of folders. One that is shared by several mounts has several.
    folders: HashMap<FileKey, Vec<u64>>,
    /// The same of files that are shared by themselves.
    files: HashMap<FileKey, Vec<u64>>,
    /// What has been said once.
    complained: HashSet<Option<i32>>,
}

impl Watcher {
    fn new(share: Arc<Share>, news: Arc<News>, changes: Arc<Changes>) -> Self {
        let mut watcher = Self {
            share,
            news,
            changes,
            group: None,
            marked: HashMap::new(),
            folders: HashMap::new(),
            files: HashMap::new(),
            complained: HashSet::new(),
        };
        watcher.begin();
        watcher
    }

    /// With no mark.
    fn begin(&mut self) {
        self.marked.clear();
        self.folders.clear();
        self.files.clear();
        self.group = match Group::new() {
            Ok(group) => Some(group),
            Err(err) => {
                log::warn!(
                    "the guest is not told what others change in its files: fanotify: {err}"
                );
                None
            }
        };
    }

    fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut rest_until: Option<Instant> = None;
        loop {
            let rest = rest_until.map(|until| until.saturating_duration_since(Instant::now()));
            self.wait(rest.filter(|rest| !rest.is_zero()))?;
            let batch = self.news.take();
            if batch.end {
                return Ok(());
            }
            if batch.reset {
                self.begin();
            }
            self.follow(batch.nodes);
            if rest_until.is_some_and(|until| Instant::now() < until) {
                continue;
            }
            rest_until = self
                .take_events(&mut buffer)?
                .then(|| Instant::now() + GATHERING);
        }
    }

    /// Waits for news and, unless it is to `rest` for a while, for events.
    fn wait(&self, rest: Option<Duration>) -> io::Result<()> {
        let mut sources = vec![PollFd::new(&*self.news, PollFlags::IN)];
        if rest.is_none()
            && let Some(group) = &self.group
        {
            sources.push(PollFd::new(group, PollFlags::IN));
        }
        let limit = rest.and_then(|rest| Timespec::try_from(rest).ok());
        match poll(&mut sources, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// Marks what is known, and then no longer what is not: what is the same by another number stays marked.
    fn follow(&mut self, nodes: HashMap<u64, Fate>) {
        let (known, forgotten): (Vec<_>, Vec<_>) = nodes
            .into_iter()
            .partition(|(_, fate)| *fate == Fate::Known);
        for (number, _) in known {
            if let Err(err) = self.mark(number) {
                self.complain(&err);
            }
        }
        for (number, fate) in forgotten {
            if let Fate::Forgotten(path) = fate {
                self.unmark(number, path.as_deref());
            }
        }
    }

    fn mark(&mut self, number: u64) -> io::Result<()> {
        let Some(group) = &self.group else {
            return Ok(());
        };
        // It may be gone or forgotten again.
        let Ok((file, is_folder)) = self.share.known(number) else {
            return Ok(());
        };
        let key = FileKey::of(file.as_fd())?;
        let same = if is_folder {
            &mut self.folders
        } else {
            &mut self.files
        };
        if !same.contains_key(&key) {
            group.mark(self.share.descriptors(), file.as_fd(), is_folder)?;
        }
        same.entry(key.clone()).or_default().push(number);
        self.marked.insert(number, key);
        Ok(())
    }

    fn unmark(&mut self, number: u64, path: Option<&[u8]>) {
        let Some(key) = self.marked.remove(&number) else {
            return;
        };
        let mut is_last = false;
        for same in [&mut self.folders, &mut self.files] {
            if let Some(numbers) = same.get_mut(&key) {
                numbers.retain(|other| *other != number);
                if numbers.is_empty() {
                    same.remove(&key);
                    is_last = true;
                }
            }
        }
        // What has been removed has lost its mark. What the host has moved keeps it, and what is told of it is passed over.
        if is_last
            && let Some(group) = &self.group
            && let Some(found) = path.and_then(|path| self.share.find_path(path).ok())
            && FileKey::of(found.as_fd()).is_ok_and(|found| found == key)
            && let Err(err) = group.unmark(self.share.descriptors(), found.as_fd())
        {
            log::debug!("a folder that the guest has forgotten stays watched: {err}");
        }
    }

    /// Says once of each kind of failure why the guest will not be told of something.
    fn complain(&mut self, err: &io::Error) {
        if self.complained.insert(err.raw_os_error()) {
            let why = match err.raw_os_error() {
                Some(libc::ENOSPC) => "fs.fanotify.max_user_marks are watched",
                Some(libc::EOPNOTSUPP | libc::ENODEV | libc::EXDEV) => {
                    "its file system cannot be watched"
                }
                _ => "it cannot be watched",
            };
            log::warn!(
                "the guest is not told what others change in some of its files: {why}: {err}"
            );
        }
    }

    /// Takes what has happened. Returns whether that was anything.
    fn take_events(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let Some(group) = &self.group else {
            return Ok(false);
        };
        let own = std::process::id().cast_signed();
        let (mut any, mut all) = (false, true);
        // Not for ever: what is known to the guest has to be followed, too.
        for _ in 0..MAX_READS {
            let mut more = false;
            for event in group.read(buffer)? {
                more = true;
                if event.mask & libc::FAN_Q_OVERFLOW != 0 {
                    all = false;
                } else if event.pid != own {
                    all &= self.tell(&event);
                }
            }
            if !more {
                break;
            }
            any = true;
        }
        if !all {
            self.tell_of_loss();
        }
        Ok(any)
    }

    /// Tells of an event. Returns whether there was room for all.
    fn tell(&self, event: &Event<'_>) -> bool {
        let mut changes = Vec::new();
        if event.mask & libc::FAN_RENAME != 0 {
            self.moves(event, &mut changes);
        } else {
            if let Some(place) = &event.place {
                for &folder in self.numbers(place) {
                    self.changes_at(event.mask, folder, place.name, &mut changes);
                }
            }
            for &file in event
                .file
                .iter()
                .filter_map(|key| self.files.get(key))
                .flatten()
            {
                if let Some(path) = self.share.path(file) {
                    append_changes_of_file(event.mask, &path, libc::S_IFREG, &mut changes);
                }
            }
        }
        changes.into_iter().all(|change| self.changes.add(change))
    }

    fn numbers(&self, place: &Place<'_>) -> &[u64] {
        self.folders.get(&place.folder).map_or(&[], Vec::as_slice)
    }

    /// What happened to a name in a folder, in an order in which it may have: the kernel's does not tell.
    fn changes_at(&self, mask: u64, folder: u64, name: &[u8], changes: &mut Vec<FileChange>) {
        let Some(path) = self.path_at(folder, name) else {
            return;
        };
        let now = self.kind_at(folder, name);
        let was = if mask & libc::FAN_ONDIR != 0 {
            libc::S_IFDIR
        } else {
            libc::S_IFREG
        };
        let change = |kind, file_type| FileChange {
            kind,
            path: path.clone(),
            to: Vec::new(),
            file_type,
        };
        let appeared = mask & (libc::FAN_CREATE | libc::FAN_MOVED_TO) != 0;
        let vanished = mask & (libc::FAN_DELETE | libc::FAN_MOVED_FROM) != 0;
        let gone = if mask & libc::FAN_MOVED_FROM != 0 {
            change(ChangeKind::Moved, was)
        } else {
            change(ChangeKind::Gone, was)
        };
        let come = || {
            if mask & libc::FAN_MOVED_TO != 0 {
                return FileChange {
                    path: Vec::new(),
                    to: path.clone(),
                    ..change(ChangeKind::Moved, now.unwrap_or(was))
                };
            }
            change(ChangeKind::Created, now.unwrap_or(was))
        };
        if vanished && now.is_some() {
            changes.push(gone.clone());
        }
        if appeared {
            changes.push(come());
        }
        if let Some(now) = now {
            append_changes_of_file(mask, &path, now, changes);
        } else if vanished {
            changes.push(gone);
        }
    }

    /// What was moved from one folder to another, of which one may be unknown.
    fn moves(&self, event: &Event<'_>, changes: &mut Vec<FileChange>) {
        let paths = |place: &Option<Place<'_>>| -> Vec<(u64, Vec<u8>)> {
            let Some(place) = place else {
                return Vec::new();
            };
            let path = |&number: &u64| Some((number, self.path_at(number, place.name)?));
            self.numbers(place).iter().filter_map(path).collect()
        };
        let (from, mut to) = (paths(&event.place), paths(&event.to));
        let file_type = if event.mask & libc::FAN_ONDIR != 0 {
            libc::S_IFDIR
        } else {
            libc::S_IFREG
        };
        let moved = |path, to| FileChange {
            kind: ChangeKind::Moved,
            path,
            to,
            file_type,
        };
        for (_, path) in from {
            // Where a folder is shared more than once, the two belong together that are of the same mount.
            let same = to.iter().position(|(_, to)| top_of(to) == top_of(&path));
            let to = same.map(|index| to.swap_remove(index).1);
            changes.push(moved(path, to.unwrap_or_default()));
        }
        for (_, to) in to {
            changes.push(moved(Vec::new(), to));
        }
    }

    fn path_at(&self, folder: u64, name: &[u8]) -> Option<Vec<u8>> {
        let mut path = self.share.path(folder)?;
        if name != b"." {
            path.push(b'/');
            path.extend(name);
        }
        Some(path)
    }

    /// S_IFMT of what is there now, if anything is.
    fn kind_at(&self, folder: u64, name: &[u8]) -> Option<u32> {
        let (folder, _) = self.share.known(folder).ok()?;
        self.share.kind_at(&folder, &CString::new(name).ok()?).ok()
    }

    /// There was more than could be told. The folders in which it may have been are said to be others.
    fn tell_of_loss(&self) {
        let mut is_news = false;
        for &number in self.folders.values().flatten() {
            if !self.share.is_top(number) {
                continue;
            }
            if let Some(path) = self.share.path(number) {
                is_news |= self.changes.add_at_last(FileChange {
                    kind: ChangeKind::Attributes,
                    path,
                    to: Vec::new(),
                    file_type: libc::S_IFDIR,
                });
            }
        }
        // Not each time that it happens before the guest has been told.
        if is_news {
            log::warn!("others have changed more in the guest's files than it can be told of");
        }
    }
}

/// What happened to a file that is there, and not to a name.
fn append_changes_of_file(mask: u64, path: &[u8], file_type: u32, changes: &mut Vec<FileChange>) {
    let all = [
        (libc::FAN_ATTRIB, ChangeKind::Attributes),
        (libc::FAN_MODIFY, ChangeKind::Modified),
        (libc::FAN_CLOSE_WRITE, ChangeKind::Written),
    ];
    for (bit, kind) in all {
        if mask & bit != 0 {
            changes.push(FileChange {
                kind,
                path: path.to_owned(),
                to: Vec::new(),
                file_type,
            });
        }
    }
}

/// The first of the names in a path.
fn top_of(path: &[u8]) -> Option<&[u8]> {
    path.split(|&byte| byte == b'/').next()
}
