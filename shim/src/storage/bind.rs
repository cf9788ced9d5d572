//! Bind mounts of folders and files of the host.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::mount::MsFlags;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::{bind_mount, change, read_only};
use crate::spec::Bind;

/// Mounts `bind` at `target`, which does not exist yet.
pub(super) fn mount(bind: &Bind, target: &Path) -> io::Result<()> {
    if std::fs::metadata(&bind.source)?.is_dir() {
        std::fs::create_dir(target)?;
    } else {
        File::create_new(target)?;
    }
    bind_mount(&bind.source, target, bind.recursive)?;
    if !bind.follows_host {
        change(target, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    }
    if bind.read_only {
        read_only(target, flags_of(target)?)?;
    }
    Ok(())
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
