//! Bind mounts of folders and files of the host.

use std::fs::File;
use std::io;
use std::path::Path;

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::libc;
use nix::mount::MsFlags;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::{bind_mount, change, idmap, read_only};
use crate::spec::{Access, Bind};

/// Mounts `bind` at `target`, which does not exist yet.
pub(super) fn mount(bind: &Bind, target: &Path) -> io::Result<()> {
    if std::fs::metadata(&bind.source)?.is_dir() {
        std::fs::create_dir(target)?;
    } else {
        File::create_new(target)?;
    }
    match &bind.owners {
        None => bind_mount(&bind.source, target, bind.recursive)?,
        Some(owners) => idmap::mount(
            &bind.source,
            target,
            &owners.ids,
            bind.recursive,
            owners.recursive,
        )?,
    }
    if !bind.follows_host {
        change(target, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    }
    match bind.access {
        Access::Write => Ok(()),
        Access::Read => read_only(target, flags_of(target)?),
        Access::ReadAll => read_only_recursive(target),
    }
}

/// Makes the mount at `target` read-only, and all below it.
fn read_only_recursive(target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: mount_setattr(2) reads a path that ends in NUL and a `mount_attr` of the size that is given, and keeps
    // neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// The flags of a mount that a remount has to repeat in order not to clear them.
fn flags_of(target: &Path) -> io::Result<MsFlags> {
    let flags = statvfs(target)?.flags();
    Ok([
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ]
    .into_iter()
    .filter(|(has, _)| flags.contains(*has))
    .map(|(_, keep)| keep)
    .collect())
}
