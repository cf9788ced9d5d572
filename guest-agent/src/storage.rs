//! What the agent mounts when the first container needs it: the folder that the host shares, with root file systems and
//! volumes, and a sysfs for those with a user namespace.

use std::fs;

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
    .during(failed())
}

/// Mounts a sysfs at [`SYSFS`]. Once, before the first container that binds it.
pub(crate) fn mount_sysfs() -> Result<()> {
    const FAILED: &str = "mounting a sysfs for user namespaces";
    fs::create_dir_all(SYSFS).during(FAILED)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("sysfs"), SYSFS, Some("sysfs"), flags, None::<&str>).during(FAILED)
}
