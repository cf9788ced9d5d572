//! The root file system: the mounts that containerd hands over, or the bundle's own folder.

use std::fs;
use std::io;
use std::path::{Component, Path};

use containerd_shim::mount::mount_rootfs;
use containerd_shim::protos::api::Mount;
use nix::mount::{MntFlags, umount2};

use super::idmap::{self, IdMaps};
use super::{bind_mount, failed};
use crate::error::Error;

/// Beside the root file system while it is mounted: layers with other owners.
const LAYERS: &str = "layers";

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
        let (owners, options) = take_owners(&mount.options)?;
        let mount_with = |options: &[String]| {
            mount_rootfs(
                not_empty(&mount.type_).as_deref(),
                not_empty(&mount.source).as_deref(),
                options,
                &target,
            )
            .map_err(|source| Error::MountRootfs {
                component,
                kind: mount.type_.clone(),
                device: mount.source.clone(),
                source: cause(source),
            })
        };
        match owners {
            None => mount_with(&options)?,
            Some(ids) if mount.type_ == "overlay" => {
                with_layers(&options, &ids, &target.with_file_name(LAYERS), mount_with)?;
            }
            Some(ids) => {
                mount_with(&options)?;
                idmap::mount(&target, &target, &ids, false, false)
                    .map_err(failed("change the owners of", &target))?;
            }
        }
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

/// Takes the options out of `options` that say whose the files are to be: `uidmap` and `gidmap`, which are containerd's and
/// no file system's.
fn take_owners(options: &[String]) -> Result<(Option<IdMaps>, Vec<String>), Error> {
    let value_of = |name| options.iter().find_map(|option| option.strip_prefix(name));
    let owners = match (value_of("uidmap="), value_of("gidmap=")) {
        (Some(uids), Some(gids)) => Some(IdMaps::parse(uids, gids).ok_or_else(|| {
            Error::UnsupportedSpec(format!(
                "has a rootfs mount with owners that are no ranges of ids: uidmap={uids} gidmap={gids}"
            ))
        })?),
        _ => None,
    };
    let others = options
        .iter()
        .filter(|option| !option.starts_with("uidmap=") && !option.starts_with("gidmap="))
        .cloned()
        .collect();
    Ok((owners, others))
}

/// Lets `mount` mount an overlay whose lower layers have the owners that `ids` say: an overlay itself has no other owners
/// than its layers. It keeps them, so that their mounts in the new folder `scratch` are of no use afterwards.
fn with_layers(
    options: &[String],
    ids: &IdMaps,
    scratch: &Path,
    mount: impl FnOnce(&[String]) -> Result<(), Error>,
) -> Result<(), Error> {
    const LOWER: &str = "lowerdir=";
    let mut options = options.to_vec();
    let mut points = Vec::new();
    fs::create_dir(scratch).map_err(failed("create folder", scratch))?;
    if let Some(option) = options.iter_mut().find(|option| option.starts_with(LOWER)) {
        for layer in option[LOWER.len()..].split(':').map(Path::new) {
            let point = scratch.join(points.len().to_string());
            fs::create_dir(&point).map_err(failed("create folder", &point))?;
            idmap::mount(layer, &point, ids, false, false)
                .map_err(failed("change the owners of", layer))?;
            points.push(point);
        }
        let lower: Vec<_> = points.iter().map(|point| point.to_string_lossy()).collect();
        *option = format!("{LOWER}{}", lower.join(":"));
    }
    mount(&options)?;
    for point in &points {
        umount2(point, MntFlags::MNT_DETACH)
            .map_err(|errno| failed("unmount", point)(errno.into()))?;
        // Only if it is empty: what was mounted there is the host's.
        fs::remove_dir(point).map_err(failed("remove folder", point))?;
    }
    fs::remove_dir(scratch).map_err(failed("remove folder", scratch))
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
    fn owners_are_no_option_of_the_file_system() {
        let options = ["ro", "uidmap=0:100:1", "gidmap=0:200:1"].map(str::to_owned);
        let (owners, others) = take_owners(&options).unwrap();
        assert_eq!(owners, IdMaps::parse("0:100:1", "0:200:1"));
        assert_eq!(others, ["ro"]);
        assert_eq!(take_owners(&["ro".to_owned()]).unwrap().0, None);
        let nonsense = ["uidmap=x", "gidmap=0:200:1"].map(str::to_owned);
        let err = take_owners(&nonsense).unwrap_err().to_string();
        assert!(err.contains("uidmap=x"), "{err}");
    }

    #[test]
    fn targets_stay_below_the_root() {
        let root = Path::new("/r");
        assert_eq!(below(root, "").unwrap(), Path::new("/r/"));
        assert_eq!(below(root, "/a/b").unwrap(), Path::new("/r/a/b"));
        assert!(below(root, "a/../../b").is_none());
    }
}
