//! What containers see of the host's file systems: one folder that the VM's virtio-fs device exports, with a folder
//! for each container in it, and the volumes of all.
//!
//! ```text
//! /run/husk            tmpfs, in the shim's mount namespace only: the host's /run/husk stays empty
//! ├── pod/…            mount points
//! ├── share/           `pod` again, read-only and shared: what the worker exports; its mount namespace is a slave
//! │   ├── <id>/        a container: rootfs/
//! │   └── .volume-<n>  a bind mount of one container or more
//! └── staging/…        where these are put together, to be moved when complete
//! ```
//!
//! Put together aside and then moved, because a mount that appears below `share` is copied to the worker's namespace as
//! it is at that moment: a change of its flags (read-only) afterwards would not follow.

mod bind;
mod disk;
mod idmap;
mod image;
mod layers;
mod rootfs;
mod source;
mod volume;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim::protos::api::Mount;
use husk_volumes::Records;
use log::warn;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tokio::sync::Semaphore;

use crate::error::Error;
use crate::spec::{Bind, BlockDevice, ROOTFS};
use source::Decisions;
use volume::{Places, Volume, Volumes};

pub(crate) use disk::{DeviceDisk, Disk, RootDisk};
pub(crate) use idmap::IdMaps;
pub(crate) use layers::RootLayers;
pub(crate) use source::{OwnVolume, Source, Sources, VolumeDisk};
pub(crate) use volume::PREFIX as VOLUME_PREFIX;

/// The tmpfs holds mount points, nothing else: this bounds what a guest that can write below `share` could fill.
const TMPFS_OPTIONS: &str = "mode=0700,size=1m,nr_inodes=64k";

/// The shim's tree of shared folders. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    root: PathBuf,
    volumes: Arc<Mutex<Volumes>>,
    /// Disks that layers may still take.
    slots: Arc<Semaphore>,
    /// Held by who makes images of volumes.
    making: Arc<Mutex<()>>,
    decisions: Decisions,
}

impl Share {
    /// Gives this process a mount namespace of its own and sets up the tree at `root`, an existing folder.
    ///
    /// The calling thread has to be the only one of the process.
    pub(crate) fn set_up(root: &Path) -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        change(Path::new("/"), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("husk"),
            root,
            Some("tmpfs"),
            flags,
            Some(TMPFS_OPTIONS),
        )?;
        let share = Self::at(root);
        for folder in [share.points(), share.staging(), share.exported()] {
            std::fs::create_dir(folder)?;
        }
        bind_mount(&share.points(), &share.exported(), false)?;
        read_only(&share.exported(), flags)?;
        change(&share.exported(), MsFlags::MS_SHARED)?;
        Ok(share)
    }

    /// A share that is not set up.
    pub(crate) fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            volumes: Arc::default(),
            slots: Arc::new(Semaphore::new(layers::SLOTS)),
            making: Arc::default(),
            decisions: Decisions::default(),
        }
    }

    /// The folder for the VM to export.
    pub(crate) fn exported(&self) -> PathBuf {
        self.root.join("share")
    }

    fn points(&self) -> PathBuf {
        self.root.join("pod")
    }

    fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// For looking at what a container of the pod with the uid `pod_uid` mounts; `has_disks` says whether its emptyDirs are
    /// to be disks.
    pub(crate) fn sources(&self, pod_uid: Option<&str>, has_disks: bool) -> Sources {
        Sources {
            pod_uid: pod_uid.map(str::to_owned),
            has_disks,
            decisions: self.decisions.clone(),
            records: Records::default(),
        }
    }

    /// Puts together what container `id` sees, for [`ContainerStorage::publish`], and opens its disks. On failure nothing is
    /// left.
    pub(crate) async fn prepare(
        &self,
        id: &str,
        wanted: Wanted,
    ) -> Result<ContainerStorage, Error> {
        let mut storage = self.storage(id);
        let share = self.clone();
        let work = move || {
            // Dropped on failure, which undoes what was done.
            storage.disks.root = Root::of(&wanted.rootfs, &share.slots)?;
            if storage.disks.root.is_none() {
                storage.build(&wanted.rootfs, &wanted.root)?;
            }
            for device in wanted.devices {
                storage.disks.devices.push(DeviceDisk {
                    disk: Disk::of_device(&device)?,
                    path: device.path,
                });
            }
            storage.volumes = share.volumes(&wanted.binds)?;
            share.make_images(&wanted.images)?;
            Ok(storage)
        };
        blocking(work).await
    }

    fn storage(&self, id: &str) -> ContainerStorage {
        ContainerStorage {
            staging: self.staging().join(id),
            point: self.points().join(id),
            published: self.exported().join(id),
            is_built: false,
            disks: OpenDisks::default(),
            volumes: Vec::new(),
        }
    }

    fn make_images(&self, images: &Images) -> Result<(), Error> {
        // Two containers may have the same one.
        let _alone = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let size = u64::from(images.mib) << 20;
        images
            .places
            .iter()
            .try_for_each(|place| image::make(place, Some(size)))
    }

    fn volumes(&self, binds: &[Bind]) -> Result<Vec<Arc<Volume>>, Error> {
        let places = Places {
            staging: self.staging(),
            points: self.points(),
            exported: self.exported(),
        };
        // Before the lock is taken: who asks for a volume whose server is gone waits here, and the others do not.
        let sources = binds
            .iter()
            .map(volume::source_of)
            .collect::<Result<Vec<_>, _>>()?;
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        binds
            .iter()
            .zip(&sources)
            .map(|(bind, source)| volumes.get(bind, source, &places))
            .collect()
    }
}

/// What a container is to see.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The root file system.
    pub(crate) rootfs: Vec<Mount>,
    /// A folder instead, where that is empty.
    pub(crate) root: PathBuf,
    pub(crate) binds: Vec<Bind>,
    pub(crate) devices: Vec<BlockDevice>,
    pub(crate) images: Images,
}

/// The images of volumes that are disks.
#[derive(Debug)]
pub(crate) struct Images {
    /// The folder of each.
    pub(crate) places: Vec<PathBuf>,
    /// The size of those that are missing.
    pub(crate) mib: u32,
}

/// A root file system for the guest to mount.
#[derive(Debug)]
pub(crate) enum Root {
    Disk(RootDisk),
    Layers(RootLayers),
}

impl Root {
    /// The root file system that `mounts` are, if the guest can mount it from disks.
    fn of(mounts: &[Mount], slots: &Arc<Semaphore>) -> Result<Option<Self>, Error> {
        if let Some(disk) = RootDisk::of(mounts)? {
            return Ok(Some(Self::Disk(disk)));
        }
        Ok(RootLayers::of(mounts, slots)?.map(Self::Layers))
    }
}

/// The disks of one container, for its VM.
#[derive(Debug, Default)]
pub(crate) struct OpenDisks {
    pub(crate) root: Option<Root>,
    pub(crate) devices: Vec<DeviceDisk>,
}

/// The mounts of one container. Dropping it takes them down.
#[derive(Debug)]
pub(crate) struct ContainerStorage {
    staging: PathBuf,
    point: PathBuf,
    published: PathBuf,
    /// Whether it has a folder: its root file system may be on a disk.
    is_built: bool,
    disks: OpenDisks,
    /// In the order in which they were asked for.
    volumes: Vec<Arc<Volume>>,
}

impl ContainerStorage {
    /// Moves the container's folder, and its volumes, into the exported one. Not while the VM is being booted: a mount that
    /// appears while the worker is on its way into its jail may miss it.
    pub(crate) fn publish(&self) -> Result<(), Error> {
        for volume in &self.volumes {
            volume.publish()?;
        }
        if !self.is_built {
            return Ok(());
        }
        volume::move_mount(&self.staging, &self.published)
    }

    /// The volumes in the exported folder, one for each bind mount.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = &str> {
        self.volumes.iter().map(|volume| volume.name())
    }

    /// The disks, to be given to the VM.
    pub(crate) fn take_disks(&mut self) -> OpenDisks {
        std::mem::take(&mut self.disks)
    }

    fn build(&mut self, rootfs: &[Mount], root: &Path) -> Result<(), Error> {
        self.is_built = true;
        for folder in [&self.staging, &self.point] {
            std::fs::create_dir(folder).map_err(failed("create folder", folder))?;
        }
        // A mount of its own, so that the whole can be moved.
        bind_mount(&self.staging, &self.staging, false)
            .map_err(failed("bind folder", &self.staging))?;

        let target = self.staging.join(ROOTFS);
        std::fs::create_dir(&target).map_err(failed("create folder", &target))?;
        rootfs::mount(rootfs, root, &target)?;

        // Nothing but the mounts in it is for the guest to write to.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        read_only(&self.staging, flags).map_err(failed("make read-only", &self.staging))
    }
}

impl Drop for ContainerStorage {
    fn drop(&mut self) {
        take_down(
            [&self.published, &self.staging],
            [&self.staging, &self.point],
        );
    }
}

/// Unmounts what may be mounted at `mounted`, and removes the mount points.
fn take_down(mounted: [&PathBuf; 2], points: [&PathBuf; 2]) {
    for mounted in mounted {
        // Detached: the guest may hold files open, which the worker does on its behalf.
        match umount2(mounted, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there: the build did not come so far.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => {
                // Nothing may be removed below what may still be mounted.
                warn!("cannot unmount {}: {errno}", mounted.display());
                return;
            }
        }
    }
    for point in points {
        let removed = if point.is_dir() {
            std::fs::remove_dir_all(point)
        } else {
            std::fs::remove_file(point)
        };
        match removed {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                warn!("cannot remove {}: {err}", point.display());
            }
            _ => {}
        }
    }
}

/// Does what may wait for a disk or a server where nobody else waits for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// For `map_err`: what could not be done with which file or folder.
pub(crate) fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Storage {
        operation,
        path,
        source,
    }
}

fn change(target: &Path, flags: MsFlags) -> io::Result<()> {
    Ok(mount(
        None::<&str>,
        target,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

fn bind_mount(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let mut flags = MsFlags::MS_BIND;
    flags.set(MsFlags::MS_REC, recursive);
    Ok(mount(
        Some(source),
        target,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

/// Makes the mount at `target` read-only. A remount sets all flags anew, so those to be kept are given in `keep`.
fn read_only(target: &Path, keep: MsFlags) -> io::Result<()> {
    change(
        target,
        keep | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY,
    )
}

#[cfg(test)]
mod tests;
