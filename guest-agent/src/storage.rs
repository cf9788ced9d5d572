//! The folder that the host shares: root file systems and volumes.

use std::fs;

use husk_protocol::{SHARE_MOUNT_POINT, SHARE_TAG};
use nix::mount::{MsFlags, mount};

use crate::error::{During, Result};

/// Mounts the folder. Once for all containers, and not before the first that needs it: the file server is then asked
/// while the agent is already known to be ready.
pub(crate) fn mount_share() -> Result<()> {
    const FAILED: &str = "mounting the folder that the host shares";
    fs::create_dir_all(SHARE_MOUNT_POINT).during(FAILED)?;
    mount(
        Some(SHARE_TAG),
        SHARE_MOUNT_POINT,
        Some("virtiofs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .during(FAILED)
}
