//! The control group (v2) of a pod on the host. The shim moves there before it starts the worker, which is born into it: what
//! the pod costs the host, the machine that runs it included, is then counted and limited as the pod's.
//!
//! The group's limits are not those of the specification, which are for what runs in the guest: it has none of its own, but
//! those of the groups above it, which kubelet sets.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use log::warn;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The processes of a group; who is written there moves.
const PROCESSES: &str = "cgroup.procs";

/// How long a worker that is being killed may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Set for a server whose group containerd's option `ShimCgroup` has chosen: it stays there, and the worker with it.
pub(crate) const CHOSEN: &str = "HUSK_SHIM_CGROUP";

/// The group that the shim has moved to.
#[derive(Clone, Debug)]
pub(crate) struct PodCgroup {
    path: PathBuf,
    /// Where it came from, and goes to in the end: a group with processes cannot be removed.
    origin: PathBuf,
}

impl PodCgroup {
    /// Moves this process to the group `cgroups_path` of a specification, and makes that group. `None` if there is no
    /// place for one: the host has cgroup v1, or somebody has chosen another.
    pub(crate) fn enter(cgroups_path: &Path) -> io::Result<Option<Self>> {
        let is_unified = Path::new(ROOT).join("cgroup.controllers").exists();
        if !is_unified || std::env::var_os(CHOSEN).is_some() {
            return Ok(None);
        }
        let path = below(Path::new(ROOT), cgroups_path)?;
        let own = std::fs::read_to_string("/proc/self/cgroup")?;
        let group = Self {
            origin: below(Path::new(ROOT), Path::new(own_group(&own)))?,
            path,
        };
        if is_of_systemd(cgroups_path) {
            // Slices are systemd's to make.
            std::fs::create_dir(&group.path)?;
        } else {
            std::fs::create_dir_all(&group.path)?;
        }
        move_to(&group.path).inspect_err(|_| remove(&group.path))?;
        Ok(Some(group))
    }

    /// How much memory this group and those above it allow, in bytes; `None` is no limit.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        memory_limit(&self.path)
    }

    /// Whether the kernel has killed a process of the group for want of memory.
    pub(crate) fn has_oom_killed(&self) -> bool {
        std::fs::read_to_string(self.path.join("memory.events"))
            .is_ok_and(|events| oom_kills(&events) > 0)
    }

    /// Moves the shim back, and removes the group once the worker, which has been told to end, has left it, too. Waits.
    pub(crate) fn leave(&self) {
        // The group of a containerd that was stopped is gone.
        let left = move_to(&self.origin).or_else(|_| move_to(Path::new(ROOT)));
        match left {
            Ok(()) => remove_emptied(&self.path),
            Err(err) => warn!("cannot leave {}: {err}", self.path.display()),
        }
    }
}

/// Removes the group of a shim that was killed, if there is one, once the worker, which dies with the shim, has left it.
pub(crate) fn remove_left(cgroups_path: &Path) {
    if let Ok(path) = below(Path::new(ROOT), cgroups_path) {
        remove_emptied(&path);
    }
}

fn remove_emptied(path: &Path) {
    // Without the file there is no group.
    if let Ok(mut events) = File::open(path.join("cgroup.events"))
        && let Err(err) = wait_empty(&mut events, END_LIMIT)
    {
        warn!("cannot wait for the end of {}: {err}", path.display());
    }
    remove(path);
}

/// Returns when a group has no process, by its file `cgroup.events`, but after `limit` at the latest.
fn wait_empty(events: &mut File, limit: Duration) -> io::Result<()> {
    let end = Instant::now() + limit;
    let mut text = String::new();
    loop {
        text.clear();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        let left = end.saturating_duration_since(Instant::now());
        if text.lines().any(|line| line == "populated 0") || left.is_zero() {
            return Ok(());
        }
        // A change of the file is a priority event (cgroup-v2.rst, "[Un]populated Notification").
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(
            &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
            timeout,
        )?;
    }
}

fn remove(path: &Path) {
    match std::fs::remove_dir(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            warn!("cannot remove {}: {err}", path.display());
        }
        _ => {}
    }
}

fn move_to(group: &Path) -> io::Result<()> {
    std::fs::write(group.join(PROCESSES), std::process::id().to_string())
}

/// The folder of a group: a path in the hierarchy, or systemd's `slice:prefix:name`.
fn below(root: &Path, cgroups_path: &Path) -> io::Result<PathBuf> {
    let path = match systemd_parts(cgroups_path) {
        Some((slice, prefix, name)) => expand(slice)?.join(format!("{prefix}-{name}.scope")),
        None => cgroups_path.to_owned(),
    };
    let relative = path.strip_prefix("/").unwrap_or(&path);
    let is_plain = relative
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if !is_plain {
        return Err(invalid(cgroups_path));
    }
    Ok(root.join(relative))
}

fn is_of_systemd(cgroups_path: &Path) -> bool {
    systemd_parts(cgroups_path).is_some()
}

fn systemd_parts(cgroups_path: &Path) -> Option<(&str, &str, &str)> {
    let (slice, rest) = cgroups_path.to_str()?.split_once(':')?;
    let (prefix, name) = rest.split_once(':')?;
    Some((slice, prefix, name))
}

/// `a-b.slice` is in `a.slice`, see systemd.slice(5).
fn expand(slice: &str) -> io::Result<PathBuf> {
    let invalid = || invalid(Path::new(slice));
    let name = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Ok(path);
    }
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        if name[..end].is_empty() || name[..end].ends_with('-') {
            return Err(invalid());
        }
        path.push(format!("{}.slice", &name[..end]));
    }
    Ok(path)
}

fn invalid(path: &Path) -> io::Error {
    let message = format!("{} is no path of a cgroup", path.display());
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// The group of this process in proc(5)'s list.
fn own_group(list: &str) -> &str {
    list.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/")
}

fn memory_limit(group: &Path) -> Option<u64> {
    group
        .ancestors()
        .filter_map(|group| std::fs::read_to_string(group.join("memory.max")).ok())
        // "max" is none.
        .filter_map(|limit| limit.trim().parse().ok())
        .min()
}

fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_paths_are_understood() {
        let below = |path: &str| below(Path::new("/r"), Path::new(path));
        assert_eq!(below("/default/x").unwrap(), Path::new("/r/default/x"));
        assert_eq!(below("x").unwrap(), Path::new("/r/x"));
        assert_eq!(
            below("kubepods-burstable-podA_b.slice:cri-containerd:x").unwrap(),
            Path::new(
                "/r/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA_b.slice/cri-containerd-x.scope"
            )
        );
        assert_eq!(below("-.slice:a:x").unwrap(), Path::new("/r/a-x.scope"));
        for wrong in ["/a/../b", "a--b.slice:a:x", "a:b:c", "-a.slice:a:x"] {
            assert!(below(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn least_limit_of_all_groups_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let leaf = root.path().join("pod/sandbox");
        std::fs::create_dir_all(&leaf).unwrap();
        assert_eq!(memory_limit(&leaf), None);
        std::fs::write(leaf.join("memory.max"), "max\n").unwrap();
        std::fs::write(root.path().join("pod/memory.max"), "2048\n").unwrap();
        std::fs::write(root.path().join("memory.max"), "4096\n").unwrap();
        assert_eq!(memory_limit(&leaf), Some(2048));
    }

    #[test]
    fn kernels_lists_are_read() {
        assert_eq!(
            own_group("1:name=systemd:/x\n0::/system.slice/containerd.service\n"),
            "/system.slice/containerd.service"
        );
        assert_eq!(own_group(""), "/");
        assert_eq!(oom_kills("low 0\noom 1\noom_kill 2\noom_group_kill 0\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }
}
