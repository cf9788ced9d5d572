//! The control group (v2) of a container, as the agent itself uses it: who is in it, killing, freezing, waiting until it
//! is empty, and hearing of OOM kills. Limits are libcgroups' business; counters are in `stats.rs`.
//!
//! Nothing here polls: the kernel notifies readers of `cgroup.events` and `memory.events` (cgroup-v2.rst, "[Un]populated
//! Notification"), as a priority event of the open file.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::signals::Signal;

/// Where cgroup v2 is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// The group below which every container has its own. The agent stays in the root group, outside every limit.
pub(crate) const CONTAINERS: &str = "containers";

/// What has happened for the lack of memory.
const MEMORY_EVENTS: &str = "memory.events";

/// Interface files are a few lines; `memory.events` has under 200 bytes.
const FILE_BYTES: usize = 4096;

/// A container's group.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group of a container; whether it exists is another matter.
    pub(crate) fn of(container_id: &str) -> Self {
        let path = Path::new(ROOT).join(Self::name(container_id).trim_start_matches('/'));
        Self { path }
    }

    /// The group's path in the hierarchy. The prefix keeps an id such as `memory.max` apart from the interface files.
    pub(crate) fn name(container_id: &str) -> String {
        format!("/{CONTAINERS}/container-{container_id}")
    }

    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The folder of the interface files.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Every process of the container, those in groups that it has made itself included.
    pub(crate) fn processes(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        collect_processes(&self.path, &mut pids).map_err(self.failed("listing its processes"))?;
        Ok(pids)
    }

    /// Sends a signal to every process.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        if signal == Signal::KILL {
            return self.kill();
        }
        for pid in self.processes()? {
            // One that has ended meanwhile needs no signal.
            let _ended = signal.send(pid);
        }
        Ok(())
    }

    /// Kills every process, atomically against forks, frozen ones too.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Orders the freezer; [`Self::frozen`] tells when it has happened.
    pub(crate) fn set_frozen(&self, frozen: bool) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Resolves once every process is stopped, or runs again.
    pub(crate) async fn frozen(&self, frozen: bool) -> Result<()> {
        self.wait_for("cgroup.events", |events| {
            key(events, "frozen") == Some(u64::from(frozen))
        })
        .await
    }

    /// Resolves once no process is left.
    pub(crate) async fn empty(&self) -> Result<()> {
        self.wait_for("cgroup.events", |events| {
            key(events, "populated") == Some(0)
        })
        .await
    }

    /// The count of OOM kills, as it changes. Ends with an error when the group is removed.
    pub(crate) async fn report_oom_kills(&self, count: watch::Sender<u64>) -> Result<()> {
        self.wait_for(MEMORY_EVENTS, |events| {
            report(events, &count);
            false
        })
        .await
    }

    /// The same, but now. Of several changes within 10 ms, the kernel announces all but the first at the end of that
    /// time, by when a container that an OOM kill has ended may be gone.
    pub(crate) fn report_oom_kills_now(&self, count: &watch::Sender<u64>) {
        // Without the file there is no memory controller, and there are no kills to count.
        if let Ok(events) = fs::read_to_string(self.path.join(MEMORY_EVENTS)) {
            report(&events, count);
        }
    }

    /// Removes the group and those below it; it must be empty. One that does not exist is no error.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_tree(&self.path).map_err(self.failed("removing it"))
    }

    /// Whether the container has handed controllers to groups of its own, so that no process may join its group.
    pub(crate) fn is_inner(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.subtree_control"))
            .is_ok_and(|controllers| !controllers.trim().is_empty())
    }

    async fn wait_for(
        &self,
        file: &'static str,
        mut holds: impl FnMut(&str) -> bool,
    ) -> Result<()> {
        let wait = async {
            let file = File::open(self.path.join(file))?;
            // SAFETY: a `File` names the same open descriptor until it is dropped, and `events` owns it.
            let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
            let mut buffer = [0; FILE_BYTES];
            loop {
                // Reading is also what arms the next notification.
                let count = events.get_ref().read_at(&mut buffer, 0)?;
                if holds(&String::from_utf8_lossy(&buffer[..count])) {
                    return Ok(());
                }
                events.ready(Interest::PRIORITY).await?.clear_ready();
            }
        };
        wait.await.map_err(self.failed("waiting for a change"))
    }

    fn write(&self, file: &'static str, text: &str) -> Result<()> {
        fs::write(self.path.join(file), text).map_err(self.failed(file))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error {
        let path = self.path.display().to_string();
        move |source| Error::Cgroup { path, what, source }
    }
}

/// Tells `count` of OOM kills that it does not know of.
fn report(events: &str, count: &watch::Sender<u64>) {
    let kills = key(events, "oom_kill").unwrap_or(0);
    count.send_if_modified(|known| {
        let more = kills > *known;
        *known = kills.max(*known);
        more
    });
}

/// The value of `name` in a flat keyed file.
fn key(text: &str, name: &str) -> Option<u64> {
    flat_keyed(text).find_map(|(key, value)| (key == name).then_some(value))
}

/// The pairs of a flat keyed file (cgroup-v2.rst, "Format").
pub(crate) fn flat_keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

fn collect_processes(folder: &Path, pids: &mut Vec<Pid>) -> io::Result<()> {
    match fs::read_to_string(folder.join("cgroup.procs")) {
        Ok(text) => pids.extend(
            text.lines()
                .filter_map(|line| Some(Pid::from_raw(line.parse().ok()?))),
        ),
        // A threaded group has none of its own: they are listed at its domain's root.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    for child in children(folder)? {
        match collect_processes(&child, pids) {
            // The container removes its groups when it likes.
            Err(error) if is_gone(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    let result = children(folder).and_then(|children| {
        for child in children {
            remove_tree(&child)?;
        }
        fs::remove_dir(folder)
    });
    match result {
        Err(error) if is_gone(&error) => Ok(()),
        result => result,
    }
}

fn children(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_among_others() {
        assert_eq!(key("populated 1\nfrozen 0\n", "frozen"), Some(0));
        assert_eq!(key("low 0\noom 3\noom_kill 2\n", "oom_kill"), Some(2));
        assert_eq!(key("", "frozen"), None);
    }

    #[test]
    fn processes_of_nested_groups_are_listed() {
        let folder = tempfile::tempdir().expect("a folder");
        let nested = folder.path().join("nested");
        fs::create_dir(&nested).expect("a folder");
        fs::write(folder.path().join("cgroup.procs"), "10\n").expect("a file");
        fs::write(nested.join("cgroup.procs"), "11\n12\n").expect("a file");
        let pids = Cgroup::at(folder.path()).processes().expect("readable");
        assert_eq!(pids, [10, 11, 12].map(Pid::from_raw));
    }

    #[test]
    fn kills_that_are_not_announced_yet_are_counted() {
        let folder = tempfile::tempdir().expect("a folder");
        let group = Cgroup::at(folder.path());
        let (count, mut kills) = watch::channel(0);
        group.report_oom_kills_now(&count);
        assert!(!kills.has_changed().expect("open"));
        fs::write(folder.path().join(MEMORY_EVENTS), "max 9\noom_kill 2\n").expect("a file");
        group.report_oom_kills_now(&count);
        assert_eq!(*kills.borrow_and_update(), 2);
        group.report_oom_kills_now(&count);
        assert!(!kills.has_changed().expect("open"));
    }

    #[test]
    fn removing_a_group_twice_succeeds() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("group");
        fs::create_dir_all(path.join("a/b")).expect("folders");
        let group = Cgroup::at(&path);
        group.remove().expect("it is empty");
        group.remove().expect("it is gone");
    }
}
