//! The root file system: the mounts that containerd hands over, or the bundle's own folder.

use std::path::{Component, Path};

use containerd_shim::mount::mount_rootfs;
use containerd_shim::protos::api::Mount;

use super::{bind_mount, failed};
use crate::error::Error;

/// Mounts the root file system at `target`, an empty folder: `mounts` on top of each other, or else `folder`, which the
/// OCI configuration names.
pub(super) fn mount(mounts: &[Mount], folder: &Path, target: &Path) -> Result<(), Error> {
    if mounts.is_empty() {
        return bind_mount(folder, target, true).map_err(failed("bind rootfs", folder));
    }
    for (component, mount) in mounts.iter().enumerate() {
        let not_empty = |text: &'_ str| (!text.is_empty()).then(|| text.to_owned());
        let target = below(target, &mount.target).ok_or_else(|| {
            Error::UnsupportedSpec(format!(
                "has a rootfs mount outside of it: {}",
                mount.target
            ))
        })?;
        mount_rootfs(
            not_empty(&mount.type_).as_deref(),
            not_empty(&mount.source).as_deref(),
            &mount.options,
            &target,
        )
        .map_err(|source| Error::MountRootfs {
            component,
            source: Box::new(source),
        })?;
    }
    Ok(())
}

/// `target` relative to `root`, if it cannot lead out of it.
fn below(root: &Path, target: &str) -> Option<std::path::PathBuf> {
    let relative = Path::new(target.trim_start_matches('/'));
    relative
        .components()
        .all(|component| matches!(component, Component::Normal(_)))
        .then(|| root.join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_below_the_root() {
        let root = Path::new("/r");
        assert_eq!(below(root, "").unwrap(), Path::new("/r/"));
        assert_eq!(below(root, "/a/b").unwrap(), Path::new("/r/a/b"));
        assert!(below(root, "a/../../b").is_none());
    }
}
