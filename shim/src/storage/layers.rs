//! Root file systems of containerd's erofs snapshotter: an overlay whose layers are EROFS images. The guest gets the images as
//! disks, and an image more that keeps what is written, and puts the overlay together itself.
//!
//! ```text
//! <snapshot of a layer>/layer.erofs    the image
//! <snapshot of a layer>/fs             where the snapshotter mounts it on the host, and what the overlay names
//! <snapshot of a container>/fs         the folder for what is written, which holds the image that keeps it
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim::protos::api::Mount;
use log::info;
use nix::sys::statfs::{FsType, statfs};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::disk::{Disk, is_of_host, is_of_tool, is_whole_root, open_image};
use super::{failed, image};
use crate::error::Error;

/// Most disks that the layers of a pod take: there have to be slots for other devices, too.
pub(super) const SLOTS: usize = 16;

/// `EROFS_SUPER_MAGIC_V1` of linux/magic.h.
const EROFS: FsType = FsType(0xe0f5_e1e2);

/// The name of a layer's image beside the folder where it is mounted.
const LAYER: &str = "layer.erofs";

/// A root file system for the guest to put together.
#[derive(Debug)]
pub(crate) struct RootLayers {
    /// The topmost first.
    pub(crate) layers: Vec<Disk>,
    /// What keeps the container's changes, if it may make any.
    pub(crate) top: Option<Disk>,
    /// Further options of the overlay.
    pub(crate) options: Vec<String>,
    /// To be kept for as long as the VM has the disks.
    pub(crate) slots: OwnedSemaphorePermit,
}

/// What an overlay is made of, by its options.
#[derive(Debug, Default, PartialEq)]
struct Overlay {
    lower: Vec<PathBuf>,
    upper: Option<PathBuf>,
    others: Vec<String>,
}

impl RootLayers {
    /// The layers of the root file system that `mounts` are, if the guest can have them as disks: else it is for the host to
    /// mount and to share. `slots` are the pod's.
    ///
    /// # Errors
    /// When an image cannot be opened or made, or another VM writes to it.
    pub(crate) fn of(mounts: &[Mount], slots: &Arc<Semaphore>) -> Result<Option<Self>, Error> {
        let [mount] = mounts else {
            return Ok(None);
        };
        if mount.type_ != "overlay" || !is_whole_root(mount) {
            return Ok(None);
        }
        let Some(overlay) = Overlay::parse(&mount.options).filter(Overlay::has_images) else {
            return Ok(None);
        };
        // What a container has written to its image is not to be had in another way.
        let shared = |why: &str| match &overlay.upper {
            Some(upper) if image::exists(upper) => {
                let why = io::Error::other(why.to_owned());
                Err(failed("use the image in", upper)(why))
            }
            _ => {
                info!("the layers of a root file system are mounted on the host: {why}");
                Ok(None)
            }
        };
        let Some(images) = overlay.images() else {
            return shared("they are no EROFS images");
        };
        if let Some(upper) = &overlay.upper
            && !image::exists(upper)
        {
            if !image::can_be_made() {
                return shared("there is no mkfs.ext4");
            }
            if !keeps_nothing_else(upper) {
                return shared("the host has written to them");
            }
        }
        let disks = images.len() + usize::from(overlay.upper.is_some());
        let permits = u32::try_from(disks).unwrap_or(u32::MAX);
        let Ok(slots) = Arc::clone(slots).try_acquire_many_owned(permits) else {
            return shared("the pod has no slots for so many disks");
        };
        let layers = images.iter().map(|path| {
            let file = open_image(path, true).map_err(failed("open", path))?;
            Ok(Disk::of_image(file, true))
        });
        let layers = layers.collect::<Result<_, Error>>()?;
        let top = match &overlay.upper {
            None => None,
            Some(upper) => {
                image::make(upper, None)?;
                Some(image::open(upper)?)
            }
        };
        Ok(Some(Self {
            layers,
            top,
            options: overlay.others,
            slots,
        }))
    }
}

impl Overlay {
    /// `None` if there is something that only the host's kernel can meet.
    fn parse(options: &[String]) -> Option<Self> {
        let mut overlay = Self::default();
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", folders)) => {
                    overlay.lower = folders.split(':').map(PathBuf::from).collect();
                }
                Some(("upperdir", folder)) => overlay.upper = Some(folder.into()),
                Some(("workdir", _)) => {}
                _ if is_of_tool(option) => {}
                _ if is_of_host(option) => return None,
                _ => overlay.others.push(option.clone()),
            }
        }
        (!overlay.lower.is_empty()).then_some(overlay)
    }

    /// Whether there is an image beside any of the lower folders. Other snapshotters have none, whatever a container of theirs
    /// writes.
    fn has_images(&self) -> bool {
        let mut images = self.lower.iter().map(|folder| folder.with_file_name(LAYER));
        images.any(|image| image.exists())
    }

    /// The images that are mounted at the lower folders, if all are.
    fn images(&self) -> Option<Vec<PathBuf>> {
        let image = |folder: &PathBuf| {
            let image = folder.with_file_name(LAYER);
            let is_mounted = statfs(folder).is_ok_and(|found| found.filesystem_type() == EROFS);
            (is_mounted && image.is_file()).then_some(image)
        };
        self.lower.iter().map(image).collect()
    }
}

/// Whether nothing has been written to the folder `upper` by way of the host.
fn keeps_nothing_else(upper: &Path) -> bool {
    let Ok(mut entries) = upper.read_dir() else {
        return false;
    };
    entries.all(|entry| entry.is_ok_and(|entry| image::is_image(&entry.file_name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> Option<Overlay> {
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        Overlay::parse(&options)
    }

    #[test]
    fn overlay_is_divided() {
        let options = [
            "index=off",
            "workdir=/c/work",
            "upperdir=/c/fs",
            "lowerdir=/b/fs:/a/fs",
            "x-of-a-tool=/path",
        ];
        let expected = Overlay {
            lower: vec!["/b/fs".into(), "/a/fs".into()],
            upper: Some("/c/fs".into()),
            others: vec!["index=off".to_owned()],
        };
        assert_eq!(overlay(&options), Some(expected));
        assert_eq!(overlay(&["lowerdir=/a/fs"]).unwrap().upper, None);
    }

    #[test]
    fn overlay_that_only_the_host_can_mount_is_the_hosts() {
        assert_eq!(overlay(&["upperdir=/c/fs"]), None);
        assert_eq!(
            overlay(&["lowerdir=/a/fs", "uidmap=0:1:1", "gidmap=0:1:1"]),
            None
        );
        assert_eq!(overlay(&["lowerdir+=/a/fs"]), None);
    }

    #[test]
    fn folders_that_are_no_images_are_the_hosts() {
        let folder = tempfile::tempdir().unwrap();
        let (layer, upper) = (folder.path().join("1/fs"), folder.path().join("2/fs"));
        std::fs::create_dir_all(&layer).unwrap();
        std::fs::create_dir_all(&upper).unwrap();
        std::fs::write(layer.with_file_name(LAYER), "").unwrap();
        let mount = Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", layer.display()),
                format!("upperdir={}", upper.display()),
            ],
            ..Mount::default()
        };
        let slots = Arc::new(Semaphore::new(SLOTS));
        // Nothing is mounted there.
        assert!(
            RootLayers::of(std::slice::from_ref(&mount), &slots)
                .unwrap()
                .is_none()
        );
        assert_eq!(upper.read_dir().unwrap().count(), 0);
        assert_eq!(slots.available_permits(), SLOTS);
        // What a container has written before is not passed over.
        image::make(&upper, Some(0)).unwrap();
        let err = RootLayers::of(std::slice::from_ref(&mount), &slots).unwrap_err();
        let err = err.chain();
        assert!(err.contains("they are no EROFS images"), "{err}");
        // Of another snapshotter, a file of that name is a container's own.
        std::fs::remove_file(layer.with_file_name(LAYER)).unwrap();
        assert!(RootLayers::of(&[mount], &slots).unwrap().is_none());
    }

    #[test]
    fn what_was_written_by_way_of_the_host_is_seen() {
        let upper = tempfile::tempdir().unwrap();
        assert!(keeps_nothing_else(upper.path()));
        image::make(upper.path(), Some(0)).unwrap();
        assert!(keeps_nothing_else(upper.path()));
        std::fs::write(upper.path().join("etc"), "").unwrap();
        assert!(!keeps_nothing_else(upper.path()));
    }
}
