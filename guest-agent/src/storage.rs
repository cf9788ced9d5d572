//! What the agent mounts when the first container needs it: the folder that the host shares, with root file systems and
//! volumes, and a sysfs for those with a user namespace.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use husk_protocol::agent::Folder;
use husk_protocol::{SHARE_MOUNT_POINT, SHARE_TAG};
use nix::mount::{MsFlags, mount};

use crate::error::{During, Result};

/// A sysfs with nothing below it, to be bound by containers that may not mount one.
pub(crate) const SYSFS: &str = "/run/husk/sys";

/// Mounts the folder. Once for all containers, and not before the first that needs it: the file server is then asked
/// while the agent is already known to be ready.
pub(crate) fn mount_share(folder: &Folder) -> Result<()> {
    let failed = || {
        format!(
            "mounting the folder that the host shares ({})",
            folder.fstype
        )
    };
    fs::create_dir_all(SHARE_MOUNT_POINT).during(failed())?;
    mount(
        Some(SHARE_TAG),
        SHARE_MOUNT_POINT,
        Some(folder.fstype.as_str()),
        MsFlags::empty(),
        Some(folder.options.as_str()),
    )
    .during(failed())?;
    if folder.fstype == "virtiofs" {
        widen_cache().during(failed())?;
    }
    Ok(())
}

/// Lets the kernel keep pages of the folder as it does those of a disk.
///
/// Linux allows a FUSE file system one per cent of the dirty pages that it allows a disk, and holds up who writes to mapped
/// files, or with `writeback`, because the server could be a process of any user that never writes any. This one is the host.
/// And it reads ahead as far as on a disk of its own, 128 KiB, where each request is a way to the host and back.
fn widen_cache() -> io::Result<()> {
    const READ_AHEAD_KIB: &str = "512";
    let device = fs::metadata(SHARE_MOUNT_POINT)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let bdi = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}"));
    fs::write(bdi.join("read_ahead_kb"), READ_AHEAD_KIB)?;
    fs::write(bdi.join("max_ratio"), "100")?;
    match fs::write(bdi.join("strict_limit"), "0") {
        // Linux before 6.2.
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removed containers, by their ids, whose folders in the share the guest's kernel may still know.
///
/// The host takes such a folder away once the guest is done with the container. What the kernel knows of its files it would
/// keep until it needs the memory, and the host's file server would keep descriptors of folders, and so the file system.
#[derive(Debug, Default)]
pub(crate) struct Removed(Mutex<HashSet<String>>);

impl Removed {
    pub(crate) fn add(&self, id: &str) {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ids.insert(id.to_owned());
    }

    /// Looks for the folders: of one that is gone, the kernel then forgets all that was in it.
    pub(crate) fn look(&self) {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ids.retain(|id| fs::symlink_metadata(Path::new(SHARE_MOUNT_POINT).join(id)).is_ok());
    }
}

/// Mounts a sysfs at [`SYSFS`]. Once, before the first container that binds it.
pub(crate) fn mount_sysfs() -> Result<()> {
    const FAILED: &str = "mounting a sysfs for user namespaces";
    fs::create_dir_all(SYSFS).during(FAILED)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("sysfs"), SYSFS, Some("sysfs"), flags, None::<&str>).during(FAILED)
}
