//! `husk volume`: what a CSI driver, or its author at the shell, says of a volume whose disk the guest is to mount.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use husk_protocol::GUEST_FILE_SYSTEMS;
use husk_volumes::{ChangePolicy, DirectVolume, FsGroup, Records};
use walkdir::WalkDir;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Says that the folder PATH is a volume whose disk the guest mounts itself: a pod, or container, that mounts the folder
    /// gets the file system on the disk.
    ///
    /// For a CSI driver's NodePublishVolume, instead of mounting, with the target path. The host must not mount the disk.
    Add(Add),
    /// Forgets what was said of PATH, and removes empty folders in it, which kubelet makes for subPaths and leaves there. For a CSI
    /// driver's NodeUnpublishVolume. A container that has the volume keeps it.
    Remove {
        /// The volume's folder.
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// The volume's folder.
    path: PathBuf,
    /// The disk: a block device, or a file that is the image of one.
    #[arg(long, value_name = "FILE")]
    device: PathBuf,
    /// The file system on it.
    #[arg(long, value_name = "TYPE", default_value = "ext4", value_parser = GUEST_FILE_SYSTEMS.map(|(name, _)| name))]
    fstype: String,
    /// How it is mounted, as for mount(8).
    #[arg(long, short, value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// The group to which all files are to be open, as the pod's fsGroup.
    #[arg(long, value_name = "GID")]
    fs_group: Option<u32>,
    /// Always, or OnRootMismatch: no file is touched if the volume's root is as it should be.
    #[arg(long, value_name = "POLICY", requires = "fs_group", default_value = "Always", value_parser = str::parse::<ChangePolicy>)]
    fs_group_change_policy: ChangePolicy,
}

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    let records = Records::default();
    match command {
        Command::Add(add) => {
            let place = absolute(&add.path)?;
            if !place.is_dir() {
                bail!("{} is no folder", place.display());
            }
            let volume = DirectVolume {
                device: device(&add.device)?,
                fstype: add.fstype,
                options: add.options,
                fs_group: add.fs_group.map(|gid| FsGroup {
                    gid,
                    policy: add.fs_group_change_policy,
                }),
            };
            Ok(records.add(&place, &volume)?)
        }
        Command::Remove { path } => {
            let place = absolute(&path)?;
            records.remove(&place)?;
            remove_folders(&place);
            Ok(())
        }
    }
}

/// By itself as it was given; what it leads to may be gone already.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    let path =
        std::path::absolute(path).with_context(|| format!("{} is no path", path.display()))?;
    // Without a slash at its end.
    Ok(path.components().collect())
}

/// kubelet makes folders for subPaths, which it takes for the volume's, and does not remove, but wants the volume's own folder to be
/// empty then. What is in use, or holds anything, stays.
fn remove_folders(place: &Path) {
    let entries = WalkDir::new(place)
        .min_depth(1)
        .same_file_system(true)
        .contents_first(true);
    for folder in entries.into_iter().flatten() {
        if folder.file_type().is_dir() {
            let _ = std::fs::remove_dir(folder.path());
        }
    }
}

fn device(path: &Path) -> anyhow::Result<PathBuf> {
    let kind = path
        .metadata()
        .with_context(|| format!("cannot look at the disk {}", path.display()))?
        .file_type();
    if !kind.is_block_device() && !kind.is_file() {
        bail!("{} is neither a block device nor a file", path.display());
    }
    absolute(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_sub_paths_are_removed_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        for folder in ["a/b", "c", "d/e"] {
            std::fs::create_dir_all(place.path().join(folder)).unwrap();
        }
        std::fs::write(place.path().join("d/file"), "").unwrap();
        remove_folders(place.path());
        let mut left: Vec<_> = WalkDir::new(place.path())
            .min_depth(1)
            .into_iter()
            .map(|entry| entry.unwrap().file_name().to_owned())
            .collect();
        left.sort();
        assert_eq!(left, ["d", "file"]);
    }

    #[test]
    fn path_is_one_however_it_is_spelled() {
        assert_eq!(
            absolute(Path::new("/a//b/./c/")).unwrap(),
            Path::new("/a/b/c")
        );
    }

    #[test]
    fn disk_has_to_be_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        let err = device(&file).unwrap_err().to_string();
        assert!(err.contains("cannot look at the disk"), "{err}");
        std::fs::write(&file, "").unwrap();
        assert_eq!(device(&file).unwrap(), file);
        let err = device(folder.path()).unwrap_err().to_string();
        assert!(err.contains("neither a block device nor a file"), "{err}");
    }
}
