//! What the worker can still reach of the host, once the guest runs: its descriptors, and the folders that it shares.
//!
//! The jail is entered while the process has one thread, before the VM is built, because capabilities, namespaces and
//! filters belong to threads and every later thread inherits them:
//!
//! 1. mount, network, IPC and UTS namespaces of its own;
//! 2. a root made of a small read-only tmpfs that holds the shared folders at their own paths, `/dev/kvm`, and
//!    `/proc/self/fd` for the file server. Mounts that the shim makes below a shared folder later propagate into
//!    it, so long as the shim's are `MS_SHARED`; none travels back;
//! 3. no capability but those of a file server, if it is one, no new privileges, no core dumps, no ptrace by others.
//!
//! The filters of system calls come last, thread by thread: see [`super::seccomp`].

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

/// What a server of files needs who acts for any user of the guest, as root does for a container of runc's: to own and
/// change files of others, to switch to the user who asks, to make device nodes and file capabilities.
pub(super) const FILE_SERVER_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// A folder that every Linux host has, and that the jail does not show. The new root is mounted over it for the
/// moment between its mount and the pivot.
const STAGE: &str = "/dev";

const KVM: &str = "/dev/kvm";

/// By its descriptors the file server opens what it has found.
const DESCRIPTORS: &str = "/proc/self/fd";

/// Room for the folders and empty files on which the jail's mounts stand.
const ROOT_OPTIONS: &CStr = c"size=64k,mode=0755";

/// Which step of the way into the jail failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum JailError {
    #[error("cannot set the limits of the worker")]
    Limits(#[source] io::Error),
    #[error("cannot enter namespaces of its own")]
    Namespaces(#[source] io::Error),
    #[error("a shared folder has to have an absolute path, not {}", path.display())]
    NotAbsolute { path: PathBuf },
    #[error("cannot make {} part of the jail", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("cannot make the root of the jail")]
    Root(#[source] io::Error),
    #[error("cannot give up privileges")]
    Privileges(#[source] io::Error),
}

/// Confines the calling thread, which has to be the only one, to the folders `shared`. Without any it serves no files, and has
/// no right that takes.
///
/// # Errors
/// When a step fails; the process is then neither free nor confined, and has to end.
pub(super) fn enter(shared: &[&Path]) -> Result<(), JailError> {
    set_limits().map_err(JailError::Limits)?;
    // SAFETY: asks for no descriptor table of its own (CLONE_FILES), which is what could be unsound.
    unsafe {
        rustix::thread::unshare_unsafe(
            UnshareFlags::NEWNS
                | UnshareFlags::NEWNET
                | UnshareFlags::NEWIPC
                | UnshareFlags::NEWUTS,
        )
    }
    .map_err(|err| JailError::Namespaces(err.into()))?;
    change_root(shared)?;
    let kept = if shared.is_empty() {
        CapabilitySet::empty()
    } else {
        FILE_SERVER_CAPABILITIES
    };
    give_up_privileges(kept).map_err(|err| JailError::Privileges(err.into()))
}

/// Descriptors: as many as the hard limit allows, for a guest may hold many files open. Core dumps would hold the
/// guest's memory: none.
fn set_limits() -> io::Result<()> {
    let files = rustix::process::getrlimit(Resource::Nofile).maximum;
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: files,
            maximum: files,
        },
    )?;
    rustix::process::setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    Ok(())
}

fn change_root(shared: &[&Path]) -> Result<(), JailError> {
    let root = |err: rustix::io::Errno| JailError::Root(err.into());
    // What is mounted here must not show outside; what is mounted outside shall still show here.
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(root)?;

    // Taken hold of first: the stage may hide them.
    let mut parts = Vec::new();
    let descriptors = (!shared.is_empty()).then_some(DESCRIPTORS);
    let own = [KVM].into_iter().chain(descriptors).map(Path::new);
    for path in own.chain(shared.iter().copied()) {
        parts.push(Part::open(path)?);
    }

    rustix::mount::mount(
        "husk-jail",
        STAGE,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        ROOT_OPTIONS,
    )
    .map_err(root)?;
    let stage = rustix::fs::open(
        STAGE,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(root)?;
    for part in &parts {
        part.place(&stage)?;
    }
    rustix::mount::mount_remount(
        STAGE,
        MountFlags::BIND
            | MountFlags::RDONLY
            | MountFlags::NOSUID
            | MountFlags::NODEV
            | MountFlags::NOEXEC,
        c"",
    )
    .map_err(root)?;

    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and is taken off.
    rustix::process::fchdir(&stage).map_err(root)?;
    rustix::process::pivot_root(".", ".").map_err(root)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(root)?;
    rustix::process::chdir("/").map_err(root)
}

/// A piece of the host's file tree that the jail shows, at the same path: detached from where it was, with all that is
/// mounted below it, and a slave of it.
struct Part<'a> {
    path: &'a Path,
    tree: OwnedFd,
    is_dir: bool,
}

impl<'a> Part<'a> {
    fn open(path: &'a Path) -> Result<Self, JailError> {
        let open = || -> rustix::io::Result<Self> {
            let tree = rustix::mount::open_tree(
                CWD,
                path,
                OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_RECURSIVE,
            )?;
            let mode = rustix::fs::fstat(&tree)?.st_mode;
            Ok(Self {
                path,
                tree,
                is_dir: rustix::fs::FileType::from_raw_mode(mode).is_dir(),
            })
        };
        if !path.is_absolute() {
            return Err(JailError::NotAbsolute { path: path.into() });
        }
        open().map_err(|err| mount_error(path, err))
    }

    /// Mounts it below the folder `root`, at its path.
    fn place(&self, root: &OwnedFd) -> Result<(), JailError> {
        let place = || -> rustix::io::Result<()> {
            let mut components = self.path.components().skip(1).peekable();
            let mut folder = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
            while let Some(name) = components.next() {
                let name = name.as_os_str();
                if components.peek().is_none() {
                    self.make_mount_point(&folder, name)?;
                    return rustix::mount::move_mount(
                        &self.tree,
                        c"",
                        &folder,
                        name,
                        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
                    );
                }
                make_folder(&folder, name)?;
                folder = rustix::fs::openat(
                    &folder,
                    name,
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
            }
            // The root itself: it would be no jail.
            Err(rustix::io::Errno::INVAL)
        };
        place().map_err(|err| mount_error(self.path, err))
    }

    fn make_mount_point(&self, folder: &OwnedFd, name: &std::ffi::OsStr) -> rustix::io::Result<()> {
        if self.is_dir {
            return make_folder(folder, name);
        }
        rustix::fs::openat(
            folder,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map(drop)
    }
}

fn make_folder(parent: impl AsFd, name: &std::ffi::OsStr) -> rustix::io::Result<()> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        result => result,
    }
}

fn mount_error(path: &Path, source: rustix::io::Errno) -> JailError {
    JailError::Mount {
        path: path.into(),
        source: source.into(),
    }
}

fn give_up_privileges(kept: CapabilitySet) -> rustix::io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(err) => return Err(err),
        }
    }
    // The file server keeps its capabilities while it acts as a user of the guest, whose rights the guest has checked.
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED,
    )?;
    rustix::thread::clear_ambient_capability_set()?;
    set_capabilities(kept)?;
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Leaves the calling thread without any capability: for those that serve no files.
pub(super) fn drop_capabilities() -> io::Result<()> {
    Ok(set_capabilities(CapabilitySet::empty())?)
}

fn set_capabilities(set: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: set,
            permitted: set,
            inheritable: CapabilitySet::empty(),
        },
    )
}

#[cfg(test)]
mod tests;
