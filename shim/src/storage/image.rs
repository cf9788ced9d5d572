//! Image files for what a guest writes: an ext4 each, which the host makes, and which nobody but the guest reads from then on.
//! Such a file is in the folder that the files would be in without it, so that who counts what that takes counts the same; and it
//! is sparse, so that it takes as much of the host's disk as the guest has put into it.

use std::ffi::OsStr;
use std::fs::{File, remove_file, rename};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::statvfs::statvfs;

use super::disk::{Disk, open_image};
use super::failed;
use crate::error::Error;

/// Largest image. Tables for more would cost the guest memory.
const SIZE_LIMIT: u64 = 1 << 40;

/// Smallest image that mkfs.ext4 makes with a journal.
const LEAST_SIZE: u64 = 4 << 20;

/// The name of the image in its folder.
const NAME: &str = ".husk.ext4";

/// Its name as long as it is being made.
const NEW: &str = ".husk.ext4.new";

/// Whether a file of this name is an image, or was to be one.
pub(super) fn is_image(name: &OsStr) -> bool {
    name == NAME || name == NEW
}

/// Opens the image in `folder` for one VM alone.
pub(super) fn open(folder: &Path) -> Result<Disk, Error> {
    let path = folder.join(NAME);
    let open = || {
        // What a guest had put there while it saw the folder could be a link.
        if !path.symlink_metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        open_image(&path, false)
    };
    let file = open().map_err(failed("open", &path))?;
    Ok(Disk::of_image(file, false))
}

/// Makes the image in `folder` if it is missing, as large as `size` says, or as the file system that it is in. Not in two
/// threads at the same time.
pub(super) fn make(folder: &Path, size: Option<u64>) -> Result<(), Error> {
    let path = folder.join(NAME);
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    // One that was not finished is begun anew.
    let new = folder.join(NEW);
    let made = make_at(&new, size).and_then(|()| rename(&new, &path));
    if made.is_err() {
        let _ = remove_file(&new);
    }
    made.map_err(failed("make a file system in", &path))
}

fn make_at(path: &Path, size: Option<u64>) -> io::Result<()> {
    match remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let file = File::create_new(path)?;
    let size = match size {
        Some(size) => size,
        None => {
            let around = statvfs(path)?;
            around.blocks().saturating_mul(around.fragment_size())
        }
    };
    file.set_len(size.clamp(LEAST_SIZE, SIZE_LIMIT))?;
    // Nothing is reserved for root, who is the guest's; and nothing is written that is zero anyhow.
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-E"])
        .arg("nodiscard,lazy_itable_init=1,lazy_journal_init=1")
        .arg(path)
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!(
            "mkfs.ext4: {}: {}",
            output.status,
            said.trim()
        )));
    }
    // The guest relies on it from its first write on.
    file.sync_all()
}

/// Whether this host can make images.
pub(super) fn can_be_made() -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| folder.join("mkfs.ext4").is_file())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn image_is_made_once_and_is_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let look = || folder.path().join(NAME).metadata().unwrap();
        make(folder.path(), Some(64 << 20)).unwrap();
        let made = look();
        assert_eq!(made.len(), 64 << 20);
        assert!(made.blocks() * 512 < 8 << 20, "{} blocks", made.blocks());
        let image = std::fs::read(folder.path().join(NAME)).unwrap();
        assert_eq!(image[1024 + 56..][..2], [0x53, 0xef], "an ext4");
        make(folder.path(), None).unwrap();
        assert_eq!((look().ino(), look().len()), (made.ino(), made.len()));
    }

    #[test]
    fn image_is_one_vms() {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path(), Some(0)).unwrap();
        let first = open(folder.path()).unwrap();
        let err = open(folder.path()).unwrap_err().chain();
        assert!(err.contains("resource busy"), "{err}");
        drop(first);
        open(folder.path()).unwrap();
    }

    #[test]
    fn image_that_was_not_finished_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        std::fs::write(&outside, "mine").unwrap();
        std::os::unix::fs::symlink(&outside, folder.path().join(NEW)).unwrap();
        make(folder.path(), Some(0)).unwrap();
        assert_eq!(
            folder.path().join(NAME).metadata().unwrap().len(),
            LEAST_SIZE
        );
        assert_eq!(std::fs::read(outside).unwrap(), b"mine");
        assert!(!folder.path().join(NEW).exists());
    }

    #[test]
    fn link_is_no_image() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        std::fs::write(&outside, "mine").unwrap();
        std::os::unix::fs::symlink(&outside, folder.path().join(NAME)).unwrap();
        make(folder.path(), None).unwrap();
        let err = open(folder.path()).unwrap_err().chain();
        assert!(err.contains("invalid input"), "{err}");
    }

    #[test]
    fn image_that_finds_no_folder_is_named() {
        let err = make(Path::new("/absent"), None).unwrap_err().chain();
        assert!(
            err.contains("make a file system in /absent/.husk.ext4"),
            "{err}"
        );
    }
}
