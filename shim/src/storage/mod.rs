//! What a container sees of the host's file systems: one folder that the VM's virtio-fs device exports, with a folder
//! for each container in it.
//!
//! ```text
//! /run/husk            tmpfs, in the shim's mount namespace only: the host's /run/husk stays empty
//! ├── pod/<id>         mount points
//! ├── share/           `pod` again, read-only and shared: what the worker exports; its mount namespace is a slave
//! │   └── <id>/        moved here when complete: rootfs/ and mounts/<n>
//! └── staging/<id>/    where it is put together
//! ```
//!
//! Put together aside and then moved, because a mount that appears below `share` is copied to the worker's namespace as
//! it is at that moment: a change of its flags (read-only) afterwards would not follow.

mod bind;
mod rootfs;

use std::io;
use std::path::{Path, PathBuf};

use containerd_shim::protos::api::Mount;
use log::warn;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::Error;
use crate::spec::{Bind, MOUNTS, ROOTFS};

/// The tmpfs holds mount points, nothing else: this bounds what a guest that can write below `share` could fill.
const TMPFS_OPTIONS: &str = "mode=0700,size=1m,nr_inodes=64k";

/// The shim's tree of shared folders. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    root: PathBuf,
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
        let share = Self {
            root: root.to_owned(),
        };
        for folder in [share.points(), share.staging(), share.exported()] {
            std::fs::create_dir(folder)?;
        }
        bind_mount(&share.points(), &share.exported(), false)?;
        read_only(&share.exported(), flags)?;
        change(&share.exported(), MsFlags::MS_SHARED)?;
        Ok(share)
    }

    /// A share that is not set up, for tests that mount nothing.
    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
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

    /// Puts together what container `id` sees, for [`ContainerStorage::publish`]: its root file system is `rootfs`, or
    /// the folder `root` if that is empty. On failure nothing is left.
    pub(crate) async fn prepare(
        &self,
        id: &str,
        rootfs: Vec<Mount>,
        root: PathBuf,
        binds: Vec<Bind>,
    ) -> Result<ContainerStorage, Error> {
        let storage = ContainerStorage {
            staging: self.staging().join(id),
            point: self.points().join(id),
            published: self.exported().join(id),
        };
        let work = move || {
            // Dropped on failure, which undoes what was done.
            storage.build(&rootfs, &root, &binds)?;
            Ok(storage)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

/// The mounts of one container. Dropping it takes them down.
#[derive(Debug)]
pub(crate) struct ContainerStorage {
    staging: PathBuf,
    point: PathBuf,
    published: PathBuf,
}

impl ContainerStorage {
    /// Moves the container's folder into the exported one. Not while the VM is being booted: a mount that appears while
    /// the worker is on its way into its jail may miss it.
    pub(crate) fn publish(&self) -> Result<(), Error> {
        mount(
            Some(&self.staging),
            &self.published,
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .map_err(|errno| failed("publish", &self.published)(errno.into()))
    }

    /// Of a container that has nothing mounted, for tests.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        let absent = Path::new("/absent/storage");
        Self {
            staging: absent.to_owned(),
            point: absent.to_owned(),
            published: absent.to_owned(),
        }
    }

    fn build(&self, rootfs: &[Mount], root: &Path, binds: &[Bind]) -> Result<(), Error> {
        for folder in [&self.staging, &self.point] {
            std::fs::create_dir(folder).map_err(failed("create folder", folder))?;
        }
        // A mount of its own, so that the whole can be moved.
        bind_mount(&self.staging, &self.staging, false)
            .map_err(failed("bind folder", &self.staging))?;

        let target = self.staging.join(ROOTFS);
        std::fs::create_dir(&target).map_err(failed("create folder", &target))?;
        rootfs::mount(rootfs, root, &target)?;

        let mounts = self.staging.join(MOUNTS);
        std::fs::create_dir(&mounts).map_err(failed("create folder", &mounts))?;
        for (number, bind) in binds.iter().enumerate() {
            bind::mount(bind, &mounts.join(number.to_string())).map_err(|source| Error::Bind {
                source_path: bind.source.clone(),
                destination: bind.destination.display().to_string(),
                source,
            })?;
        }

        // Nothing but the mounts in it is for the guest to write to.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        read_only(&self.staging, flags).map_err(failed("make read-only", &self.staging))
    }
}

impl Drop for ContainerStorage {
    fn drop(&mut self) {
        for mounted in [&self.published, &self.staging] {
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
        for folder in [&self.staging, &self.point] {
            match std::fs::remove_dir_all(folder) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => {
                    warn!("cannot remove {}: {err}", folder.display());
                }
                _ => {}
            }
        }
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
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
