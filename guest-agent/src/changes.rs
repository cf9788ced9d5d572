//! Raises the events (inotify) of what the host has changed in the folder that it shares, of which the guest's kernel knows
//! nothing: the same is done here once more, as a *notice* ([`husk_protocol::notice`]). The host answers as if it had been
//! done and does nothing, and the kernel tells its watchers. What it has kept of the file is dropped before they hear of
//! it, so that they find what the host has.
//!
//! On a thread of its own: groups of the file system belong to threads, and a file server can be slow.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};

use husk_protocol::agent::Change;
use husk_protocol::agent::change::Kind;
use husk_protocol::{SHARE_MOUNT_POINT, notice};
use nix::unistd::{Gid, setfsgid};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, Timespec, Timestamps,
    UTIME_OMIT,
};
use rustix::io::Errno;
use tokio::sync::oneshot;

use crate::error::{During, Result};

/// In the folder's root, where nobody watches: where what comes from elsewhere is moved from, and what goes elsewhere to. There
/// is nothing by these names.
const ELSEWHERE: [&[u8]; 2] = [b".from-elsewhere", b".to-elsewhere"];

/// Rights to execute a file, of anybody.
const EXECUTABLE: u16 = 0o111;

struct Order {
    changes: Vec<Change>,
    done: oneshot::Sender<()>,
}

/// Who raises events. The thread is made when there is first need of it.
#[derive(Debug, Default)]
pub(crate) struct Changes(Mutex<Option<mpsc::Sender<Order>>>);

impl Changes {
    /// Raises the events of `changes`, one after the other. What is no longer so is passed over.
    pub(crate) async fn raise(&self, changes: Vec<Change>) -> Result<()> {
        const FAILED: &str = "starting the thread that raises the events of files";
        let (done, is_done) = oneshot::channel();
        let order = Order { changes, done };
        {
            let mut thread = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let orders = match &*thread {
                Some(orders) => orders,
                None => thread.insert(start(Path::new(SHARE_MOUNT_POINT)).during(FAILED)?),
            };
            orders
                .send(order)
                .map_err(io::Error::other)
                .during(FAILED)?;
        }
        is_done.await.map_err(io::Error::other).during(FAILED)
    }
}

fn start(root: &Path) -> io::Result<mpsc::Sender<Order>> {
    let root = root.to_owned();
    let (orders, received) = mpsc::channel();
    let thread = std::thread::Builder::new().name("changes".to_owned());
    thread.spawn(move || serve(&root, &received))?;
    Ok(orders)
}

fn serve(root: &Path, orders: &mpsc::Receiver<Order>) {
    for Order { changes, done } in orders {
        match Folder::open(root) {
            Ok(folder) => {
                for change in &changes {
                    if let Err(error) = folder.raise(change) {
                        tracing::debug!(%error, %change, "a change of the host's is not told");
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the host's changes are not told"),
        }
        // Nobody may wait for it any more.
        let _ = done.send(());
    }
}

/// The shared folder.
#[derive(Debug)]
struct Folder(OwnedFd);

impl Folder {
    fn open(root: &Path) -> rustix::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, root, flags, Mode::empty()).map(Self)
    }

    /// Raises the events of one change.
    ///
    /// # Errors
    /// When there is no such file any more, or already one.
    fn raise(&self, change: &Change) -> rustix::io::Result<()> {
        let file_type = FileType::from_raw_mode(change.file_type);
        let path = change.path.as_slice();
        match change.kind.enum_value().unwrap_or_default() {
            Kind::UNKNOWN => Err(Errno::OPNOTSUPP),
            Kind::MODIFIED => self.touch(path, false),
            Kind::ATTRIBUTES => self.touch(path, true),
            Kind::WRITTEN => self.close(path),
            Kind::CREATED => self.make(path, file_type),
            Kind::GONE => self.remove(path, file_type.is_dir()),
            Kind::MOVED => self.rename(path, &change.to, file_type.is_dir()),
        }
    }

    /// Sets times to what they are: that of the content, which the kernel takes for a write, or both, for a change of attributes.
    fn touch(&self, path: &[u8], attributes: bool) -> rustix::io::Result<()> {
        let file = self.find(path)?;
        // Makes the kernel ask, and drop the pages that it has if they are old. It would not once it has the new times.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
        let stat = rustix::fs::statx(&file, c"", flags, StatxFlags::BASIC_STATS)?;
        let time = |time: rustix::fs::StatxTimestamp| Timespec {
            tv_sec: time.tv_sec,
            tv_nsec: time.tv_nsec.into(),
        };
        let omitted = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        };
        let times = Timestamps {
            last_access: if attributes {
                time(stat.stx_atime)
            } else {
                omitted
            },
            last_modification: time(stat.stx_mtime),
        };
        notify(notice::CHANGED, || {
            rustix::fs::utimensat(&file, c"", &times, AtFlags::EMPTY_PATH)
        })
    }

    /// Opens a file for writing, and closes it. Not a program, which nobody could start meanwhile.
    fn close(&self, path: &[u8]) -> rustix::io::Result<()> {
        let file = self.find(path)?;
        let stat = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if !kind.is_file() || stat.stx_mode & EXECUTABLE != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        notify(notice::CHANGED, || self.open_at(path, flags)).map(drop)
    }

    fn make(&self, path: &[u8], kind: FileType) -> rustix::io::Result<()> {
        let (folder, name) = self.place(path)?;
        let mode = Mode::empty();
        notify(notice::CREATED, || match kind {
            FileType::Directory => rustix::fs::mkdirat(&folder, name, mode),
            FileType::Symlink => rustix::fs::symlinkat(c"anything", &folder, name),
            kind => rustix::fs::mknodat(&folder, name, kind, mode, 0),
        })
    }

    fn remove(&self, path: &[u8], is_folder: bool) -> rustix::io::Result<()> {
        let (folder, name) = self.place(path)?;
        let (group, flags) = if is_folder {
            (notice::GONE_FOLDER, AtFlags::REMOVEDIR)
        } else {
            (notice::GONE_FILE, AtFlags::empty())
        };
        notify(group, || rustix::fs::unlinkat(&folder, name, flags))
    }

    fn rename(&self, from: &[u8], to: &[u8], is_folder: bool) -> rustix::io::Result<()> {
        let group = if is_folder {
            notice::MOVED_FOLDER
        } else {
            notice::MOVED_FILE
        };
        let rename = |from: &[u8], to: &[u8]| {
            let ((old, from), (new, to)) = (self.place(from)?, self.place(to)?);
            notify(group, || rustix::fs::renameat(&old, from, &new, to))
        };
        let [source, target] = ELSEWHERE;
        match (from, to) {
            (b"", to) => rename(source, to),
            (from, b"") => rename(from, target),
            (from, to) => match rename(from, to) {
                // Something else has the old name by now.
                Err(Errno::NOENT) => rename(source, to),
                result => result,
            },
        }
    }

    /// What is at a path now, without opening it.
    fn find(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)
    }

    /// The folder that a path leads to, and the name in it.
    fn place<'p>(&self, path: &'p [u8]) -> rustix::io::Result<(OwnedFd, &'p [u8])> {
        let (folder, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => path.split_at(slash),
            None => (b".".as_slice(), path),
        };
        let name = name.strip_prefix(b"/").unwrap_or(name);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // As a notice, it is found although it may be gone with what was in it.
        let folder = notify(notice::CHANGED, || self.open_at(folder, flags))?;
        Ok((folder, name))
    }

    fn open_at(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.0, path, flags, Mode::empty(), resolve)
    }
}

/// Does something as a notice of the group `group`. The thread's capabilities stay, since its user does.
fn notify<T>(group: u32, act: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    setfsgid(Gid::from_raw(group));
    let result = act();
    setfsgid(Gid::from_raw(0));
    result
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::mem::MaybeUninit;

    use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

    use super::*;

    /// A folder of which the events are read. What is raised is really done here: nobody answers that it has been.
    struct Watched {
        folder: tempfile::TempDir,
        events: OwnedFd,
    }

    impl Watched {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            fs::create_dir(folder.path().join("volume")).expect("it is empty");
            let events =
                inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).expect("inotify");
            let watched = Self { folder, events };
            watched.watch("volume");
            watched
        }

        fn watch(&self, path: &str) {
            let path = self.folder.path().join(path);
            let all = WatchFlags::ALL_EVENTS;
            inotify::add_watch(&self.events, path, all).expect("it can be watched");
        }

        fn write(&self, path: &str) {
            fs::write(self.folder.path().join(path), "content").expect("written");
            self.events();
        }

        fn events(&self) -> Vec<(ReadFlags, String)> {
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(&self.events, &mut buffer);
            std::iter::from_fn(|| {
                let event = reader.next().ok()?;
                let name = event
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned());
                Some((event.events(), name.unwrap_or_default()))
            })
            .collect()
        }

        fn raise(
            &self,
            kind: Kind,
            path: &str,
            to: &str,
            kind_of_file: u32,
        ) -> Vec<(ReadFlags, String)> {
            let change = Change {
                kind: kind.into(),
                path: path.into(),
                to: to.into(),
                file_type: kind_of_file,
                ..Change::default()
            };
            let folder = Folder::open(self.folder.path()).expect("it is there");
            folder.raise(&change).expect("raised");
            self.events()
        }
    }

    fn one(events: ReadFlags, name: &str) -> Vec<(ReadFlags, String)> {
        vec![(events, name.to_owned())]
    }

    #[test]
    fn change_of_a_file_is_the_event_that_it_would_be() {
        let watched = Watched::new();
        watched.write("volume/a");
        assert_eq!(
            watched.raise(Kind::MODIFIED, "volume/a", "", libc::S_IFREG),
            one(ReadFlags::MODIFY, "a")
        );
        assert_eq!(
            watched.raise(Kind::ATTRIBUTES, "volume/a", "", libc::S_IFREG),
            one(ReadFlags::ATTRIB, "a")
        );
        assert_eq!(
            watched.raise(Kind::WRITTEN, "volume/a", "", libc::S_IFREG),
            [one(ReadFlags::OPEN, "a"), one(ReadFlags::CLOSE_WRITE, "a")].concat()
        );
        let content = fs::read_to_string(watched.folder.path().join("volume/a"));
        assert_eq!(content.expect("it is there"), "content");
    }

    #[test]
    fn names_that_come_and_go_are_the_events_that_they_would_be() {
        let watched = Watched::new();
        for (kind, name) in [
            (libc::S_IFREG, "file"),
            (libc::S_IFLNK, "link"),
            (libc::S_IFIFO, "pipe"),
        ] {
            let path = format!("volume/{name}");
            assert_eq!(
                watched.raise(Kind::CREATED, &path, "", kind),
                one(ReadFlags::CREATE, name)
            );
            assert_eq!(
                watched.raise(Kind::GONE, &path, "", libc::S_IFREG),
                one(ReadFlags::DELETE, name)
            );
        }
        assert_eq!(
            watched.raise(Kind::CREATED, "volume/folder", "", libc::S_IFDIR),
            one(ReadFlags::CREATE | ReadFlags::ISDIR, "folder")
        );
        assert_eq!(
            watched.raise(Kind::GONE, "volume/folder", "", libc::S_IFDIR),
            one(ReadFlags::DELETE | ReadFlags::ISDIR, "folder")
        );
    }

    #[test]
    fn moves_are_one_event_or_two_by_where_they_lead() {
        let watched = Watched::new();
        watched.write("volume/a");
        assert_eq!(
            watched.raise(Kind::MOVED, "volume/a", "volume/b", libc::S_IFREG),
            [
                one(ReadFlags::MOVED_FROM, "a"),
                one(ReadFlags::MOVED_TO, "b")
            ]
            .concat()
        );
        assert_eq!(
            watched.raise(Kind::MOVED, "volume/b", "", libc::S_IFREG),
            one(ReadFlags::MOVED_FROM, "b")
        );
        let [source, target] = ELSEWHERE.map(|name| std::str::from_utf8(name).expect("ASCII"));
        let root = watched.folder.path();
        fs::rename(root.join(target), root.join(source)).expect("it is where it was moved to");
        assert_eq!(
            watched.raise(Kind::MOVED, "", "volume/c", libc::S_IFREG),
            one(ReadFlags::MOVED_TO, "c")
        );
    }

    #[test]
    fn what_is_not_so_any_more_is_an_error_and_no_event() {
        let watched = Watched::new();
        std::os::unix::fs::symlink("volume", watched.folder.path().join("link")).expect("a link");
        let folder = Folder::open(watched.folder.path()).expect("it is there");
        for (kind, path) in [
            (Kind::MODIFIED, "volume/a"),
            (Kind::GONE, "volume/a"),
            (Kind::CREATED, "gone/a"),
            (Kind::CREATED, "link/a"),
            (Kind::CREATED, "../a"),
            (Kind::UNKNOWN, "volume"),
        ] {
            let change = Change {
                kind: kind.into(),
                path: path.into(),
                ..Change::default()
            };
            assert!(folder.raise(&change).is_err(), "{kind:?} {path}");
        }
        assert_eq!(watched.events(), []);
    }
}
