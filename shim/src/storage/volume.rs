//! The bind mounts of a pod. One that several containers have is mounted once, and they all get that mount: a file has then
//! the same inode in the guest whichever container opens it, so that its pages, its locks and, if it is a unix socket, its
//! peers are the same.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::mount::{MsFlags, mount};

use super::{bind, failed, take_down};
use crate::error::Error;
use crate::spec::Bind;

/// Before the number of a volume: no container's id begins with a dot.
pub(crate) const PREFIX: &str = ".volume-";

/// The volumes that containers have.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    next: u64,
    mounted: HashMap<Key, Weak<Volume>>,
}

/// What has to be alike for a mount to be the same: its source, which may be another under the same name after a while,
/// and how it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    inode: (u64, u64),
    bind: Bind,
}

/// A mount, taken down when this is dropped.
#[derive(Debug)]
pub(super) struct Volume {
    name: String,
    staging: PathBuf,
    point: PathBuf,
    published: PathBuf,
    is_published: Mutex<bool>,
}

/// The folders of a [`super::Share`] in which volumes are made.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) staging: PathBuf,
    pub(super) points: PathBuf,
    pub(super) exported: PathBuf,
}

impl Volumes {
    /// The volume for `bind`, whose source is `metadata`: the one that is there, or a new one.
    pub(super) fn get(
        &mut self,
        bind: &Bind,
        metadata: &Metadata,
        places: &Places,
    ) -> Result<Arc<Volume>, Error> {
        let failed = bind_failed(bind);
        let key = Key {
            inode: (metadata.dev(), metadata.ino()),
            bind: Bind {
                destination: PathBuf::new(),
                ..bind.clone()
            },
        };
        self.mounted.retain(|_, volume| volume.strong_count() > 0);
        if let Some(volume) = self.mounted.get(&key).and_then(Weak::upgrade) {
            return Ok(volume);
        }
        let name = format!("{PREFIX}{}", self.next);
        self.next += 1;
        // Dropped on failure, which undoes what was done.
        let volume = Volume {
            staging: places.staging.join(&name),
            point: places.points.join(&name),
            published: places.exported.join(&name),
            name,
            is_published: Mutex::new(false),
        };
        if metadata.is_dir() {
            std::fs::create_dir(&volume.point).map_err(&failed)?;
        } else {
            File::create_new(&volume.point).map_err(&failed)?;
        }
        bind::mount(bind, &volume.staging).map_err(&failed)?;
        let volume = Arc::new(volume);
        self.mounted.insert(key, Arc::downgrade(&volume));
        Ok(volume)
    }
}

/// What there is to know of the source of `bind`. May take as long as a server does that is not there.
pub(super) fn source_of(bind: &Bind) -> Result<Metadata, Error> {
    bind.source.metadata().map_err(bind_failed(bind))
}

fn bind_failed(bind: &Bind) -> impl Fn(io::Error) -> Error {
    |source| Error::Bind {
        source_path: bind.source.clone(),
        destination: bind.destination.display().to_string(),
        source,
    }
}

impl Volume {
    /// Where it is in the exported folder.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Moves it into the exported folder, if it is not there; see [`super::ContainerStorage::publish`].
    pub(super) fn publish(&self) -> Result<(), Error> {
        let mut is_published = self
            .is_published
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !*is_published {
            move_mount(&self.staging, &self.published)?;
            *is_published = true;
        }
        Ok(())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        take_down(
            [&self.published, &self.staging],
            [&self.staging, &self.point],
        );
    }
}

/// Moves the mount at `from` to `to`.
pub(super) fn move_mount(from: &Path, to: &Path) -> Result<(), Error> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| failed("publish", to)(errno.into()))
}
