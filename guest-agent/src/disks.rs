//! The disks that the host plugs in. Each is found by its serial as soon as the kernel says that one has appeared
//! ([`crate::hotplug`]), and is then the root file system of a container, or a device in it.
//!
//! ```text
//! /run/husk/disks/<container>          the file system on its root disk, as long as the container, or an overlay of
//! /run/husk/layers/<container>/<n>     layers, each a file system on a disk, the topmost first, and
//! /run/husk/layers/<container>/top     the one that keeps what is written: upper/ and work/
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protocol::{DISK_MOUNTS, agent};
use libcontainer::rootfs::utils::parse_mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::syncfs;
use oci_spec::runtime::Mount;
use tokio::sync::watch;

use crate::devices::{self, Node};
use crate::error::{During, Error, Result};

/// A folder for each disk that the kernel knows.
const DISKS: &str = "/sys/block";

/// A folder for each container whose root file system is an overlay.
const LAYERS: &str = "/run/husk/layers";

/// The two folders of an overlay in the file system that keeps what is written to it.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// How the file system in an image is mounted that the host has made for this guest: what is free is free on the host, too, and
/// tables that nothing is in yet are not written there.
pub(crate) const IMAGE_OPTIONS: &str = "discard,noinit_itable,errors=remount-ro";

/// How long a disk may take to appear, on a host that is busy or emulated, too.
const APPEARANCE_LIMIT: Duration = Duration::from_secs(60);

/// The guest's disks.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    appeared: watch::Sender<()>,
}

impl Disks {
    /// Says that a disk may have appeared.
    pub(crate) fn appeared(&self) {
        self.appeared.send_replace(());
    }

    /// The device of the disk with this serial, once it is there.
    pub(crate) async fn node(&self, serial: &str) -> Result<Node> {
        let device = self.find(serial).await?;
        devices::lookup(&device).ok_or_else(|| no_disk(serial))
    }

    /// The file of the disk with this serial, once it is there.
    pub(crate) async fn find(&self, serial: &str) -> Result<PathBuf> {
        // From before the first look on, so that no disk can appear unseen.
        let mut news = self.appeared.subscribe();
        let found = async {
            loop {
                // Each disk is asked, and may take its time.
                let wanted = serial.to_owned();
                if let Some(device) = blocking(move || ready(&wanted))
                    .await
                    .during("looking for the guest's disks")?
                {
                    return Ok(device);
                }
                // The sender is `self`.
                let _ = news.changed().await;
            }
        };
        tokio::time::timeout(APPEARANCE_LIMIT, found)
            .await
            .unwrap_or_else(|_| Err(no_disk(serial)))
    }

    /// Mounts the root file system of container `id`.
    pub(crate) async fn mount_root(&self, id: &str, disk: &agent::RootDisk) -> Result<()> {
        let device = self.find(&disk.serial).await?;
        let (flags, data) = divide(&disk.options)?;
        let (point, fstype) = (Path::new(DISK_MOUNTS).join(id), disk.fstype.clone());
        // What the disk holds may have to be recovered first.
        blocking(move || {
            mount_new(&device, &point, &fstype, flags, &data)
                .during(format!("mounting the root file system ({fstype})"))
        })
        .await
    }

    /// Mounts the layers of container `id`, and an overlay of them as its root file system.
    pub(crate) async fn mount_layers(&self, id: &str, root: &agent::RootLayers) -> Result<()> {
        let mut layers = Vec::new();
        for serial in &root.layers {
            layers.push(self.find(serial).await?);
        }
        let top = match root.top.as_str() {
            "" => None,
            serial => Some(self.find(serial).await?),
        };
        let (flags, others) = divide(&root.options)?;
        let (point, folder) = (Path::new(DISK_MOUNTS).join(id), Path::new(LAYERS).join(id));
        blocking(move || {
            let mut lower = Vec::new();
            for (number, device) in layers.iter().enumerate() {
                let layer = folder.join(number.to_string());
                mount_new(device, &layer, "erofs", MsFlags::MS_RDONLY, "")
                    .during(format!("mounting layer {number} of the root file system"))?;
                lower.push(layer);
            }
            let mut options = vec![format!("lowerdir={}", join(&lower))];
            if let Some(device) = top {
                let top = folder.join("top");
                mount_new(&device, &top, "ext4", MsFlags::empty(), IMAGE_OPTIONS)
                    .and_then(|()| prepare_top(&top, lower.first()))
                    .during("mounting what keeps the changes of the root file system")?;
                for (name, folder) in [("upperdir", UPPER), ("workdir", WORK)] {
                    options.push(format!("{name}={}", top.join(folder).display()));
                }
            }
            if !others.is_empty() {
                options.push(others);
            }
            mount_new(
                Path::new("overlay"),
                &point,
                "overlay",
                flags,
                &options.join(","),
            )
            .during("mounting the root file system (overlay)")
        })
        .await
    }
}

/// Makes the folders of an overlay in the file system at `top`, if they are missing. Its root belongs to whom that of the
/// topmost layer belongs to.
fn prepare_top(top: &Path, layer: Option<&PathBuf>) -> io::Result<()> {
    let upper = top.join(UPPER);
    if !upper.is_dir() {
        // Complete before it has its name.
        let new = top.join("new");
        fs::create_dir_all(&new)?;
        if let Some(layer) = layer {
            let like = layer.metadata()?;
            chown(&new, Some(like.uid()), Some(like.gid()))?;
            fs::set_permissions(&new, fs::Permissions::from_mode(like.mode() & 0o7777))?;
        }
        fs::rename(&new, &upper)?;
    }
    fs::create_dir_all(top.join(WORK))
}

fn join(folders: &[PathBuf]) -> String {
    let folders: Vec<_> = folders.iter().map(|path| path.to_string_lossy()).collect();
    folders.join(":")
}

/// Mounts `source` at a new folder.
pub(crate) fn mount_new(
    source: &Path,
    point: &Path,
    fstype: &str,
    flags: MsFlags,
    data: &str,
) -> io::Result<()> {
    fs::create_dir_all(point)?;
    Ok(mount(Some(source), point, Some(fstype), flags, Some(data))?)
}

/// Unmounts the root file system of container `id`, if it has one of its own, whose processes are gone. All that was written
/// is on the disk then.
pub(crate) async fn unmount_root(id: &str) {
    let (root, layers) = (Path::new(DISK_MOUNTS).join(id), Path::new(LAYERS).join(id));
    if !root.exists() && !layers.exists() {
        return;
    }
    blocking(move || {
        close(&root);
        let Ok(points) = fs::read_dir(&layers) else {
            return;
        };
        for layer in points.flatten() {
            close(&layer.path());
        }
        if let Err(error) = fs::remove_dir(&layers) {
            tracing::warn!(%error, layers = %layers.display(), "a layer stays mounted");
        }
    })
    .await;
}

/// Unmounts what is mounted at `point`, if that exists, and removes the folder.
pub(crate) fn close(point: &Path) {
    if !point.exists() {
        return;
    }
    // A container that is being created has all mounts in its namespace until it enters its root. So it may not be this
    // unmount that ends the file system, and it is brought to its end on the disk before.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    match mount(None::<&str>, point, None::<&str>, flags, None::<&str>) {
        // Not a mount point: it could not be mounted.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(error) => {
            tracing::warn!(%error, point = %point.display(), "a disk is not closed by its file system");
            // What was written is to be there nevertheless.
            sync(point);
        }
    }
    let unmounted = match umount2(point, MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL) => fs::remove_dir(point),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = unmounted {
        tracing::warn!(%error, point = %point.display(), "a disk stays mounted");
    }
}

/// Writes to its disk what the file system at `root` has been given. Waits for it.
pub(crate) fn sync(root: &Path) {
    let synced = fs::File::open(root).and_then(|root| Ok(syncfs(&root)?));
    if let Err(error) = synced {
        tracing::warn!(%error, point = %root.display(), "a disk may lack what was written last");
    }
}

/// Does what waits for a disk where nobody else waits for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// The device of the disk with this serial, if it can be used. The kernel tells of a disk, by a uevent, after it can be opened,
/// but shows its serial before that.
fn ready(serial: &str) -> io::Result<Option<PathBuf>> {
    let Some(name) = with_serial(Path::new(DISKS), serial)? else {
        return Ok(None);
    };
    let device = Path::new("/dev").join(name);
    match fs::File::open(&device).map_err(|error| error.raw_os_error()) {
        Err(Some(libc::ENXIO | libc::ENOENT)) => Ok(None),
        // What else is wrong with it is for whoever uses it to find.
        _ => Ok(Some(device)),
    }
}

/// The name of the disk in the folder `disks` that has this serial.
fn with_serial(disks: &Path, serial: &str) -> io::Result<Option<PathBuf>> {
    for disk in fs::read_dir(disks)? {
        let disk = disk?;
        // Not every disk has one, and it may be on its way out.
        if fs::read_to_string(disk.path().join("serial")).is_ok_and(|found| found.trim() == serial)
        {
            return Ok(Some(disk.file_name().into()));
        }
    }
    Ok(None)
}

/// Divides options of mount(8), of which the last counts where two contradict, into flags and those of the file system.
pub(crate) fn divide(options: &[String]) -> Result<(MsFlags, String)> {
    let mut mount = Mount::default();
    mount.set_options(Some(options.to_vec()));
    let parsed = parse_mount(&mount)
        .map_err(io::Error::other)
        .during("reading the options of a file system")?;
    // Of another version of nix.
    let flags = MsFlags::from_bits_retain(parsed.flags.bits());
    Ok((flags, parsed.data.join(",")))
}

fn no_disk(serial: &str) -> Error {
    Error::NoDisk {
        serial: serial.to_owned(),
        seconds: APPEARANCE_LIMIT.as_secs(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_found_by_its_serial() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial) in [
            ("vda", Some("disk-1\n")),
            ("vdb", Some("disk-10")),
            ("loop0", None),
        ] {
            let disk = disks.path().join(name);
            fs::create_dir(&disk).unwrap();
            if let Some(serial) = serial {
                fs::write(disk.join("serial"), serial).unwrap();
            }
        }
        let find = |serial| with_serial(disks.path(), serial).unwrap();
        assert_eq!(find("disk-1"), Some("vda".into()));
        assert_eq!(find("disk-10"), Some("vdb".into()));
        assert_eq!(find("disk"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn disk_that_does_not_come_is_named() {
        let error = Disks::default().node("none").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the guest has got no disk none within 60 s"
        );
    }

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let divided = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
            divide(&options).unwrap()
        };
        assert_eq!(
            divided(&["rw", "noatime", "errors=remount-ro", "nodev", "discard"]),
            (
                MsFlags::MS_NOATIME | MsFlags::MS_NODEV,
                "errors=remount-ro,discard".to_owned()
            )
        );
        assert_eq!(
            divided(&["nodiratime", "rw", "noexec", "exec", "ro"]),
            (MsFlags::MS_RDONLY | MsFlags::MS_NODIRATIME, String::new())
        );
    }

    #[tokio::test]
    async fn container_without_a_disk_has_nothing_to_unmount() {
        unmount_root("no-such-container").await;
    }
}
