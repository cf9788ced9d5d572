//! Mounts that show the files of a host's folder with other owners: what a container with a user namespace is given, so
//! that it owns what belongs to the ids that it knows. The host's kernel does it (mount_setattr(2), `MOUNT_ATTR_IDMAP`),
//! before virtio-fs: the guest sees the owners that its own user namespace expects.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use oci_spec::runtime::LinuxIdMapping;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// The child that holds a user namespace calls two functions.
const STACK_BYTES: usize = 64 << 10;

/// A range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Range {
    /// The first one, as the container knows it.
    container: u32,
    /// The first one, as a process outside of the container's user namespace knows it.
    host: u32,
    size: u32,
}

/// Which ids the ids of a container are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct IdMaps {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl IdMaps {
    /// Those of an OCI configuration; `None` if one of the two is missing.
    pub(crate) fn of(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Option<Self> {
        let ranges = |mappings: &[LinuxIdMapping]| -> Vec<Range> {
            mappings
                .iter()
                .map(|mapping| Range {
                    container: mapping.container_id(),
                    host: mapping.host_id(),
                    size: mapping.size(),
                })
                .collect()
        };
        (!uids.is_empty() && !gids.is_empty()).then(|| Self {
            uids: ranges(uids),
            gids: ranges(gids),
        })
    }

    /// Those of the options `uidmap` and `gidmap` of a mount that containerd hands over: ranges, separated by commas,
    /// as `container:host:size`.
    pub(super) fn parse(uids: &str, gids: &str) -> Option<Self> {
        let ranges = |text: &str| -> Option<Vec<Range>> {
            text.split(',')
                .map(|range| {
                    let mut numbers = range.split(':').map(|number| number.parse().ok());
                    let range = Range {
                        container: numbers.next()??,
                        host: numbers.next()??,
                        size: numbers.next()??,
                    };
                    numbers.next().is_none().then_some(range)
                })
                .collect()
        };
        Some(Self {
            uids: ranges(uids)?,
            gids: ranges(gids)?,
        })
    }

    /// What user `uid` of the container is outside.
    pub(crate) fn uid(&self, uid: u32) -> Option<u32> {
        outside(&self.uids, uid)
    }

    /// What group `gid` of the container is outside.
    pub(crate) fn gid(&self, gid: u32) -> Option<u32> {
        outside(&self.gids, gid)
    }

    /// A new user namespace with these. It has no process: it lives as long as the descriptor, and what is mounted with it.
    fn user_namespace(&self) -> io::Result<File> {
        let mut stack = vec![0; STACK_BYTES];
        // SAFETY: the child has a copy of this process's memory and one thread; it makes two system calls, which take
        // no lock and allocate nothing, and never returns.
        let child = unsafe {
            clone(
                Box::new(hold),
                &mut stack,
                CloneFlags::CLONE_NEWUSER,
                Some(libc::SIGCHLD),
            )
        }?;
        let namespace = self.describe(child);
        let ended = kill(child, Signal::SIGKILL).and_then(|()| waitpid(child, None));
        let namespace = namespace?;
        ended?;
        Ok(namespace)
    }

    fn describe(&self, holder: Pid) -> io::Result<File> {
        fs::write(format!("/proc/{holder}/uid_map"), text(&self.uids))?;
        fs::write(format!("/proc/{holder}/gid_map"), text(&self.gids))?;
        File::open(format!("/proc/{holder}/ns/user"))
    }
}

/// The child that a user namespace is made with: waits to be killed.
fn hold() -> isize {
    // SAFETY: PR_SET_PDEATHSIG takes a signal.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        // SAFETY: pause(2) takes nothing.
        unsafe { libc::pause() };
    }
}

fn outside(ranges: &[Range], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.container)?;
        (offset < range.size).then(|| range.host.checked_add(offset))?
    })
}

/// As user_namespaces(7) has it.
fn text(ranges: &[Range]) -> String {
    ranges
        .iter()
        .map(|range| format!("{} {} {}\n", range.container, range.host, range.size))
        .collect()
}

/// Mounts the file or folder `source` at `target` with the owners that `ids` say, and what is mounted below it with their
/// own or, if `recursive`, with those as well. Without `with_mounts`, what is mounted below is left out.
pub(super) fn mount(
    source: &Path,
    target: &Path,
    ids: &IdMaps,
    with_mounts: bool,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, with_mounts);
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    let namespace = ids.user_namespace()?;
    set_owners(tree.as_fd(), namespace.as_fd(), recursive)?;
    move_mount(
        &tree,
        c"",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    Ok(())
}

fn set_owners(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: mount_setattr(2) reads a path that ends in NUL and a `mount_attr` of the size that is given, and keeps
    // neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match Errno::result(result) {
        // The mount is new and the namespace is not that of the file system, so that is what is left.
        Err(Errno::EINVAL) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the file system has no mounts that show other owners (idmapped mounts)",
        )),
        result => Ok(result.map(drop)?),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::mount::{MntFlags, umount2};
    use nix::sched::unshare;

    use super::*;

    #[test]
    fn ids_outside_are_found_in_their_range() {
        let ids = IdMaps::parse("0:100000:10,10:5000:1", "0:7:1").unwrap();
        assert_eq!((ids.uid(0), ids.uid(9)), (Some(100_000), Some(100_009)));
        assert_eq!((ids.uid(10), ids.uid(11)), (Some(5000), None));
        assert_eq!((ids.gid(0), ids.gid(1)), (Some(7), None));
    }

    #[test]
    fn nonsense_is_no_mapping() {
        for text in ["", "0:1", "0:1:2:3", "0:1:x", "0:1:2,", "-1:0:1"] {
            assert!(IdMaps::parse(text, "0:0:1").is_none(), "{text:?}");
        }
    }

    #[test]
    fn namespace_has_the_ids_and_no_process() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mapping other ids takes root");
            return;
        }
        let ids = IdMaps::parse("0:300000:1000", "0:300000:1000").unwrap();
        let namespace = ids.user_namespace().unwrap();
        let own = File::open("/proc/self/ns/user").unwrap();
        assert_ne!(
            namespace.metadata().unwrap().ino(),
            own.metadata().unwrap().ino()
        );
        assert!(!has_holder());
    }

    fn has_holder() -> bool {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read_to_string(entry.path().join("uid_map"))
                .is_ok_and(|map| map.split_whitespace().eq(["0", "300000", "1000"]))
        })
    }

    #[test]
    fn files_are_shown_with_the_owners_of_the_container() {
        // A thread of its own, whose mount namespace nobody else has.
        let tested = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNS).is_err() {
                eprintln!("skipped: mounting takes root");
                return;
            }
            let folder = tempfile::tempdir().unwrap();
            let (source, target) = (folder.path().join("source"), folder.path().join("target"));
            for folder in [&source, &target] {
                fs::create_dir(folder).unwrap();
            }
            fs::write(source.join("file"), "").unwrap();
            let ids = IdMaps::parse("0:100000:65536", "0:200000:65536").unwrap();
            match mount(&source, &target, &ids, false, false) {
                Err(err) if err.kind() == io::ErrorKind::Unsupported => {
                    eprintln!(
                        "skipped: the file system of {} has no such mounts",
                        source.display()
                    );
                }
                result => {
                    result.unwrap();
                    let seen = fs::metadata(target.join("file")).unwrap();
                    assert_eq!((seen.uid(), seen.gid()), (100_000, 200_000));
                    umount2(&target, MntFlags::MNT_DETACH).unwrap();
                }
            }
        });
        tested.join().unwrap();
    }
}
