//! What the guest gets as a disk, to read and write its blocks itself: a root file system that is one file system on a block
//! device or in an image file, and the block devices that a specification names. Nothing of these is mounted on the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use containerd_shim::protos::api::Mount;
use husk_protocol::GUEST_FILE_SYSTEMS;
use husk_volumes::DirectVolume;
use log::info;
use nix::libc;
use nix::sys::stat::{major, minor};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::failed;
use crate::error::Error;
use crate::spec::BlockDevice;

/// Options of mount(8), and of fstab(5), that are not for a kernel, or that say what a disk is without them.
const TOOL_OPTIONS: [&str; 8] = [
    "loop", "bind", "rbind", "defaults", "auto", "noauto", "nofail", "_netdev",
];

/// How options begin that say of which part of the image or with which other device it is to be mounted, or whose the files
/// are to be: only the host's kernel can do that.
const HOST_OPTIONS: [&str; 5] = [
    "offset=",
    "sizelimit=",
    "journal_dev=",
    "uidmap=",
    "gidmap=",
];

/// A block device or an image file that is open.
#[derive(Debug)]
pub(crate) struct Disk {
    file: File,
    read_only: bool,
}

/// A root file system for the guest to mount.
#[derive(Debug)]
pub(crate) struct RootDisk {
    pub(crate) disk: Disk,
    pub(crate) fstype: String,
    pub(crate) options: Vec<String>,
}

/// A block device for a container.
#[derive(Debug)]
pub(crate) struct DeviceDisk {
    pub(crate) disk: Disk,
    /// In the container.
    pub(crate) path: PathBuf,
}

impl Disk {
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// An image that was opened by [`open_image`].
    pub(crate) fn of_image(file: File, read_only: bool) -> Self {
        Self { file, read_only }
    }

    /// Opens the disk of a volume, which nobody else has.
    pub(super) fn of_volume(device: &Path, read_only: bool) -> Result<Self, Error> {
        let open = || {
            let kind = device.metadata()?.file_type();
            if kind.is_block_device() {
                open_device(device, read_only)
            } else if kind.is_file() {
                open_image(device, read_only)
            } else {
                Err(io::Error::other("neither a block device nor a file"))
            }
        };
        let file = open()
            .map_err(|err| match err.kind() {
                io::ErrorKind::ResourceBusy => io::Error::other(
                    "the host has mounted it, or it is in use by a virtual machine",
                ),
                _ => err,
            })
            .map_err(failed("open the disk of a volume,", device))?;
        Ok(Self { file, read_only })
    }

    /// Opens the device that a specification names. As with other runtimes, nobody else is kept from using it.
    pub(super) fn of_device(device: &BlockDevice) -> Result<Self, Error> {
        let open = || {
            let path = device_path(device.major, device.minor)?;
            let file = open(&path, device.read_only, 0)?;
            let found = file.metadata()?;
            let number = found.rdev();
            if !found.file_type().is_block_device()
                || (major(number), minor(number)) != (device.major, device.minor)
            {
                return Err(io::ErrorKind::NotFound.into());
            }
            Ok(file)
        };
        open()
            .map(|file| Self {
                file,
                read_only: device.read_only,
            })
            .map_err(|source| Error::BlockDevice {
                path: device.path.clone(),
                major: device.major,
                minor: device.minor,
                source,
            })
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl RootDisk {
    /// The root file system that `mounts` are, if the guest can mount it: else it is for the host to mount and to share.
    ///
    /// # Errors
    /// `MountRootfs` if it cannot be opened, or another VM has it.
    pub(crate) fn of(mounts: &[Mount]) -> Result<Option<Self>, Error> {
        let [mount] = mounts else {
            return Ok(None);
        };
        if !is_whole_root(mount) {
            return Ok(None);
        }
        let Some(Manner { read_only, options }) = Manner::of(&mount.type_, &mount.options) else {
            return Ok(None);
        };
        let source = Path::new(&mount.source);
        let Ok(kind) = source.metadata().map(|metadata| metadata.file_type()) else {
            return Ok(None);
        };
        let opened = if kind.is_block_device() {
            match open_device(source, read_only) {
                // Mounted already, by somebody whose writes the guest would not see.
                Err(err) if err.kind() == io::ErrorKind::ResourceBusy => {
                    info!(
                        "{} is in use on the host, which mounts it for the guest",
                        mount.source
                    );
                    return Ok(None);
                }
                opened => opened,
            }
        } else if kind.is_file() {
            open_image(source, read_only)
        } else {
            return Ok(None);
        };
        let file = opened.map_err(|source| Error::MountRootfs {
            component: 0,
            kind: mount.type_.clone(),
            device: mount.source.clone(),
            source: source.into(),
        })?;
        Ok(Some(Self {
            disk: Disk { file, read_only },
            fstype: mount.type_.clone(),
            options,
        }))
    }
}

/// How the guest is to mount a file system.
#[derive(Debug, PartialEq)]
pub(super) struct Manner {
    pub(super) read_only: bool,
    pub(super) options: Vec<String>,
}

impl Manner {
    /// What `options` of mount(8) say; `None` if only the host can mount it.
    pub(super) fn of(fstype: &str, options: &[String]) -> Option<Self> {
        let &(_, can_write) = GUEST_FILE_SYSTEMS
            .iter()
            .find(|(name, _)| *name == fstype)?;
        if options.iter().any(|option| is_of_host(option)) {
            return None;
        }
        let options = options.iter().map(String::as_str);
        let is_right = |option: &&str| ["ro", "rw"].contains(option);
        let read_only = !can_write || options.clone().rfind(is_right) == Some("ro");
        // A disk that cannot be written to is not mounted without saying so.
        let right = if read_only { "ro" } else { "rw" };
        let others = options.filter(|option| !is_of_tool(option) && !is_right(option));
        Some(Self {
            read_only,
            options: others.chain([right]).map(str::to_owned).collect(),
        })
    }

    /// How a direct volume is mounted.
    pub(super) fn of_volume(volume: &DirectVolume) -> io::Result<Self> {
        Self::of(&volume.fstype, &volume.options).ok_or_else(|| {
            let known: Vec<_> = GUEST_FILE_SYSTEMS.iter().map(|(name, _)| *name).collect();
            io::Error::other(format!(
                "the disk {} is a volume that the guest cannot mount, as {} with the options {:?}: it knows {}, and nothing that \
                 only the host can do",
                volume.device.display(),
                volume.fstype,
                volume.options.join(","),
                known.join(", ")
            ))
        })
    }
}

/// Whether an option says nothing to a kernel that mounts a disk.
pub(super) fn is_of_tool(option: &str) -> bool {
    let starts = ["loop=", "x-", "X-", "comment="];
    TOOL_OPTIONS.contains(&option) || starts.iter().any(|start| option.starts_with(start))
}

/// Whether this is all of a root file system, and not a part of it.
pub(super) fn is_whole_root(mount: &Mount) -> bool {
    mount.target.trim_start_matches('/').is_empty()
}

/// Whether an option can only be met by the host's kernel; one that names a path is of that kind.
pub(super) fn is_of_host(option: &str) -> bool {
    !is_of_tool(option)
        && (option.contains("=/") || HOST_OPTIONS.iter().any(|start| option.starts_with(start)))
}

fn open(path: &Path, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(path)
}

/// Opens a device that nobody has mounted. If it is written to, it is for one VM alone: as long as it is open, nobody can
/// mount it or claim it in another way.
fn open_device(path: &Path, read_only: bool) -> io::Result<File> {
    let claimed = open(path, read_only, libc::O_EXCL)?;
    if read_only {
        // Several may read it.
        return open(path, read_only, 0);
    }
    Ok(claimed)
}

/// Opens an image for one VM alone, if it is written to: as long as it is open, no other VM gets it.
pub(super) fn open_image(path: &Path, read_only: bool) -> io::Result<File> {
    let file = open(path, read_only, 0)?;
    lock_image(&file, read_only)?;
    Ok(file)
}

/// Keeps an image for one VM alone, if it is written to.
pub(super) fn lock_image(file: &File, read_only: bool) -> io::Result<()> {
    // Kept by whoever has the open file, so by the worker as well.
    let lock = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, lock) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Errno::BUSY.into()),
        Err(err) => Err(err.into()),
    }
}

/// The host's node for the device with this number.
fn device_path(major: u64, minor: u64) -> io::Result<PathBuf> {
    let event = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = event
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .ok_or(io::ErrorKind::NotFound)?;
    Ok(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.display().to_string(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Mount::default()
        }
    }

    fn image() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().unwrap()
    }

    fn of(mount: &Mount) -> Option<RootDisk> {
        RootDisk::of(std::slice::from_ref(mount)).unwrap()
    }

    #[test]
    fn image_is_a_disk_without_the_loop() {
        let image = image();
        let root = of(&mount(
            "ext4",
            image.path(),
            &[
                "loop",
                "ro",
                "rw",
                "_netdev",
                "x-systemd.automount",
                "bind",
                "noatime",
            ],
        ))
        .unwrap();
        assert_eq!((root.fstype.as_str(), root.disk.read_only), ("ext4", false));
        assert_eq!(root.options, ["noatime", "rw"]);
    }

    #[test]
    fn what_is_not_written_to_is_opened_for_reading() {
        let image = image();
        for mount in [
            mount("ext4", image.path(), &["loop", "ro"]),
            mount("ext4", image.path(), &["rw", "ro"]),
            mount("erofs", image.path(), &[]),
        ] {
            let root = of(&mount).unwrap();
            assert!(root.disk.read_only, "{mount:?}");
            assert_eq!(root.options, ["ro"]);
        }
    }

    #[test]
    fn what_the_guest_cannot_mount_is_the_hosts() {
        let (image, folder) = (image(), tempfile::tempdir().unwrap());
        let layer = mount("ext4", image.path(), &[]);
        let part = Mount {
            target: "/usr".to_owned(),
            ..layer.clone()
        };
        for mounts in [
            vec![],
            vec![layer.clone(), layer],
            vec![part],
            vec![mount("btrfs", image.path(), &[])],
            vec![mount("overlay", Path::new("overlay"), &["lowerdir=/a"])],
            vec![mount("ext4", folder.path(), &[])],
            vec![mount("ext4", Path::new("/absent"), &[])],
            vec![mount("ext4", image.path(), &["loop", "offset=512"])],
            vec![mount("erofs", image.path(), &["device=/other"])],
            vec![mount(
                "ext4",
                image.path(),
                &["uidmap=0:1:1", "gidmap=0:1:1"],
            )],
        ] {
            assert!(RootDisk::of(&mounts).unwrap().is_none(), "{mounts:?}");
        }
    }

    #[test]
    fn image_that_is_written_to_is_one_vms() {
        let image = image();
        let (written, read) = (
            mount("ext4", image.path(), &[]),
            mount("ext4", image.path(), &["ro"]),
        );
        let busy = |mount: &Mount| {
            let err = RootDisk::of(std::slice::from_ref(mount)).unwrap_err();
            assert!(
                err.chain().contains("device or resource busy"),
                "{}",
                err.chain()
            );
        };
        let first = of(&written).unwrap();
        busy(&written);
        busy(&read);
        drop(first);
        let readers = [of(&read).unwrap(), of(&read).unwrap()];
        busy(&written);
        drop(readers);
        of(&written).unwrap();
    }

    #[test]
    fn device_that_is_not_there_is_named() {
        let device = BlockDevice {
            path: "/dev/data".into(),
            major: 4095,
            minor: 1,
            read_only: true,
        };
        let err = Disk::of_device(&device).unwrap_err();
        assert_eq!(
            err.chain(),
            "cannot open /dev/data, the block device 4095:1 of the host: no such file or directory"
        );
    }
}
