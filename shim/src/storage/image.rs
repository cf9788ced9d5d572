//! Image files for what a guest writes: an ext4 each, which the host makes, and which nobody but the guest reads from then on.
//! Such a file is in the folder that the files would be in without it, so that who counts what that takes counts the same; and it
//! is sparse, so that it takes as much of the host's disk as the guest has put into it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, Mode, OFlags, fstatvfs, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::disk::{Disk, lock_image};
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

/// Whether there is an image in `folder`.
pub(super) fn exists(folder: &Path) -> bool {
    folder
        .join(NAME)
        .symlink_metadata()
        .is_ok_and(|found| found.is_file())
}

/// Opens the image in `folder` for one VM alone.
pub(super) fn open(folder: &Path) -> Result<Disk, Error> {
    let path = folder.join(NAME);
    let open = || -> io::Result<File> {
        // A guest may write to the folder at this moment: what it has put there could be a link, or a file with another name.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(folder_of(folder)?, NAME, flags, Mode::empty())?);
        let found = file.metadata()?;
        if !found.is_file() || found.nlink() != 1 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        lock_image(&file, false)?;
        Ok(file)
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
    make_in(folder, size).map_err(failed("make a file system in", &path))
}

fn folder_of(folder: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(folder, flags, Mode::empty())?.into())
}

/// By descriptors alone: a guest may write to the folder at this moment.
fn make_in(folder: &Path, size: Option<u64>) -> io::Result<()> {
    let folder = folder_of(folder)?;
    // One that was not finished is begun anew.
    match unlinkat(&folder, NEW, AtFlags::empty()) {
        Err(err) if err != Errno::NOENT => return Err(err.into()),
        _ => {}
    }
    // What is in it has owners of its own, and the folder may be open to others.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = File::from(openat(&folder, NEW, flags, Mode::RUSR | Mode::WUSR)?);
    let made = fill(&file, &folder, size)
        .and_then(|()| Ok(renameat(&folder, NEW, &folder, NAME)?))
        // The guest relies on it, and on its name, from its first write on.
        .and_then(|()| folder.sync_all());
    if made.is_err() {
        let _ = unlinkat(&folder, NEW, AtFlags::empty());
    }
    made
}

fn fill(file: &File, folder: &File, size: Option<u64>) -> io::Result<()> {
    let size = match size {
        Some(size) => size,
        None => {
            let around = fstatvfs(folder)?;
            around.f_blocks.saturating_mul(around.f_frsize)
        }
    };
    file.set_len(size.clamp(LEAST_SIZE, SIZE_LIMIT))?;
    // Nothing is reserved for root, who is the guest's; and nothing is written that is zero anyhow. The file is named by our
    // descriptor, which leads to no other.
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-E"])
        .arg("nodiscard,lazy_itable_init=1,lazy_journal_init=1")
        .arg(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            file.as_raw_fd()
        ))
        .stdin(Stdio::null())
        .output()
        .map_err(|err| io::Error::new(err.kind(), format!("mkfs.ext4: {err}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!(
            "mkfs.ext4: {}: {}",
            output.status,
            said.trim()
        )));
    }
    file.sync_all()
}

/// Whether this host can make images.
pub(super) fn can_be_made() -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| folder.join("mkfs.ext4").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_is_made_once_and_is_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let look = || folder.path().join(NAME).metadata().unwrap();
        make(folder.path(), Some(64 << 20)).unwrap();
        let made = look();
        assert_eq!((made.len(), made.mode() & 0o777), (64 << 20, 0o600));
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
        assert!(err.contains("symbolic links"), "{err}");
        // Nor is a file that somebody else knows.
        std::fs::remove_file(folder.path().join(NAME)).unwrap();
        std::fs::hard_link(folder.path().join("outside"), folder.path().join(NAME)).unwrap();
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
