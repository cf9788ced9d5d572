//! The root file system: the mounts that containerd hands over, or the bundle's own folder.

use std::io;
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
            kind: mount.type_.clone(),
            device: mount.source.clone(),
            source: cause(source),
        })?;
    }
    Ok(())
}

/// What the system said, if it was asked: the rest of that error's text is of the mounting process.
fn cause(err: containerd_shim::Error) -> Box<dyn std::error::Error + Send + Sync> {
    match err {
        containerd_shim::Error::MountError { err, .. } => {
            io::Error::from_raw_os_error(err as i32).into()
        }
        other => other.into(),
    }
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
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn mount_that_fails_is_named_with_its_cause() {
        let err = cause(containerd_shim::Error::MountError {
            context: "Mount Some(\"/dev/sdx\") to /run".to_owned(),
            err: Errno::EINVAL,
        });
        let err = Error::MountRootfs {
            component: 1,
            kind: "ext4".to_owned(),
            device: "/dev/sdx".to_owned(),
            source: err,
        };
        assert_eq!(
            err.chain(),
            "failed to mount rootfs component 1 (ext4 of /dev/sdx): invalid argument"
        );
    }

    #[test]
    fn targets_stay_below_the_root() {
        let root = Path::new("/r");
        assert_eq!(below(root, "").unwrap(), Path::new("/r/"));
        assert_eq!(below(root, "/a/b").unwrap(), Path::new("/r/a/b"));
        assert!(below(root, "a/../../b").is_none());
    }
}
