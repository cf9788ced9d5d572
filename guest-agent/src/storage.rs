//! Mounts that a container needs before it is created: the folder that the host shares, and what the request lists.

use std::fs;
use std::path::{Path, PathBuf};

use husk_protocol::{SHARE_MOUNT_POINT, SHARE_TAG, agent};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{During, Error, Result};

/// Mounts that belong to one container; unmounted, last first, when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    points: Vec<PathBuf>,
}

/// Mounts the folder that the host shares. Once for all containers, and not before the first: the file server is then
/// asked while the agent is already known to be ready.
pub(crate) fn mount_share() -> Result<()> {
    mount_at(SHARE_TAG, Path::new(SHARE_MOUNT_POINT), "virtiofs", &[])
}

impl Mounts {
    /// Mounts the storages of a request in their order.
    pub(crate) fn new(storages: &[agent::Storage]) -> Result<Self> {
        let mut mounts = Self::default();
        for storage in storages {
            let point = PathBuf::from(&storage.mount_point);
            if !point.is_absolute() {
                return Err(Error::Invalid(format!(
                    "the mount point {} of a storage is not absolute",
                    point.display()
                )));
            }
            match storage.driver.as_str() {
                // What mount(2) takes as its source.
                "virtiofs" | "tmpfs" => {
                    mount_at(&storage.source, &point, &storage.fstype, &storage.options)?;
                }
                driver => {
                    return Err(Error::Invalid(format!("no such storage driver: {driver}")));
                }
            }
            mounts.points.push(point);
        }
        Ok(mounts)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for point in self.points.iter().rev() {
            if let Err(error) = umount2(point, MntFlags::MNT_DETACH) {
                tracing::warn!(%error, point = %point.display(), "a storage stays mounted");
            }
        }
    }
}

fn mount_at(source: &str, point: &Path, fstype: &str, options: &[String]) -> Result<()> {
    let what = || format!("mounting {source} ({fstype}) at {}", point.display());
    fs::create_dir_all(point).during(what())?;
    let (flags, data) = parse_options(options);
    let data = (!data.is_empty()).then_some(data.as_str());
    mount(Some(source), point, Some(fstype), flags, data).during(what())
}

/// Splits options into mount(2)'s flags and those for the file system.
fn parse_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "defaults" | "rw" => {}
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_told_from_data() {
        let options = ["ro", "size=1m", "nodev", "mode=755"].map(str::to_owned);
        let (flags, data) = parse_options(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(data, "size=1m,mode=755");
    }

    #[test]
    fn unknown_driver_is_refused() {
        let storage = agent::Storage {
            driver: "floppy".to_owned(),
            mount_point: "/mnt".to_owned(),
            ..Default::default()
        };
        assert!(matches!(Mounts::new(&[storage]), Err(Error::Invalid(_))));
    }
}
