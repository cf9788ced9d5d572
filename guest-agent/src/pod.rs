//! What the containers of a pod share: the namespaces of its sandbox, and the volumes of the guest's own.
//!
//! ```text
//! /run/husk/pod/ns/{ipc,pid,user,uts}  the sandbox's namespaces, as long as the sandbox exists
//! /run/husk/pod/volumes/<name>         a tmpfs each, or the file system on a disk, as long as there are containers
//! /run/husk/pod/folders/<n>            a folder of a volume, as long as the container that mounts it
//! ```

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_protocol::{POD_NAMESPACES, POD_VOLUMES, agent};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use pathrs::Root;
use pathrs::flags::OpenFlags;

use crate::disks::{self, IMAGE_OPTIONS, mount_new};
use crate::error::{During, Error, Result};
use crate::fs_group;

/// The namespaces that containers of a pod may have in common. Network and cgroup root are the guest's.
const NAMESPACES: [&str; 4] = ["ipc", "pid", "user", "uts"];

/// Where folders of volumes are mounted, see [`Volumes::locate`].
const FOLDERS: &str = "/run/husk/pod/folders";

/// Mounts that are taken down when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    points: Vec<PathBuf>,
}

impl Mounts {
    /// Keeps the namespaces of process `pid`. By its number alone they could not be named: it is free for another
    /// process once this one has ended.
    pub(crate) fn of_namespaces(pid: Pid) -> Result<Self> {
        let mut mounts = Self::default();
        for name in NAMESPACES {
            let point = Path::new(POD_NAMESPACES).join(name);
            fs::create_dir_all(POD_NAMESPACES)
                .and_then(|()| File::create(&point))
                .during(format!("creating {}", point.display()))?;
            mounts.bind(Path::new(&format!("/proc/{pid}/ns/{name}")), point)?;
        }
        Ok(mounts)
    }

    fn bind(&mut self, source: &Path, point: PathBuf) -> Result<()> {
        mount(
            Some(source),
            &point,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .during(format!("mounting {}", point.display()))?;
        self.points.push(point);
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for point in &self.points {
            let removed = umount2(point, MntFlags::MNT_DETACH)
                .map_err(Into::into)
                .and_then(|()| {
                    if point.is_dir() {
                        fs::remove_dir(point)
                    } else {
                        fs::remove_file(point)
                    }
                });
            if let Err(error) = removed {
                tracing::warn!(%error, point = %point.display(), "a mount of the pod stays");
            }
        }
    }
}

/// The volumes in the guest's memory and on disks.
#[derive(Debug)]
pub(crate) struct Volumes {
    root: PathBuf,
    /// By their names. Each is locked while it is made or unmounted, which may take long: others of the same wait, and nobody
    /// else.
    slots: Mutex<HashMap<String, Arc<Mutex<Option<Made>>>>>,
    folders: AtomicU64,
}

/// A volume that is there.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Made {
    InMemory,
    OnDisk,
}

impl Default for Volumes {
    fn default() -> Self {
        Self::at(Path::new(POD_VOLUMES))
    }
}

impl Volumes {
    fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            slots: Mutex::default(),
            folders: AtomicU64::new(0),
        }
    }

    /// Makes those that are not there yet. `devices` are the disks that they name, by their serials. Waits for these.
    pub(crate) fn make(
        &self,
        volumes: &[agent::Volume],
        devices: &HashMap<String, PathBuf>,
    ) -> Result<()> {
        for volume in volumes {
            let point = self.root.join(component(&volume.name)?);
            let slot = self.slots().entry(volume.name.clone()).or_default().clone();
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if slot.is_some() {
                continue;
            }
            let what = || format!("making the volume {}", volume.name);
            let made = match (devices.get(&volume.serial), volume.direct.as_ref()) {
                (None, _) => {
                    let (flags, options) = (flags_of(volume), options_of(volume));
                    mount_new(Path::new("tmpfs"), &point, "tmpfs", flags, &options)
                        .during(what())?;
                    Made::InMemory
                }
                (Some(device), None) => {
                    mount_image(device, &point, volume).during(what())?;
                    Made::OnDisk
                }
                (Some(device), Some(direct)) => {
                    mount_direct(device, &point, direct)?;
                    Made::OnDisk
                }
            };
            *slot = Some(made);
        }
        Ok(())
    }

    /// Brings what was written to the volumes to their disks. Waits for these.
    pub(crate) fn sync(&self) {
        for (name, slot) in self.all() {
            // One that is locked has nothing yet, or is unmounted.
            let is_on_disk = slot
                .try_lock()
                .is_ok_and(|slot| *slot == Some(Made::OnDisk));
            if is_on_disk {
                disks::sync(&self.root.join(name));
            }
        }
    }

    /// Unmounts those on disks, which no container has any more: what mounts one next finds nothing to be recovered. Waits for
    /// the disks.
    pub(crate) fn close(&self) {
        for (name, slot) in self.all() {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if *slot == Some(Made::OnDisk) {
                disks::close(&self.root.join(name));
                *slot = None;
            }
        }
    }

    fn all(&self) -> Vec<(String, Arc<Mutex<Option<Made>>>)> {
        let slots = self.slots();
        let all = slots
            .iter()
            .map(|(name, slot)| (name.clone(), Arc::clone(slot)));
        all.collect()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Arc<Mutex<Option<Made>>>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the folders of volumes that the mounts of `spec` name, and makes those that are missing, as the host's
    /// kubelet does for a `subPath` on the host. What containers have put into the volume must not lead out of it, now or
    /// between this and the mount: a folder is resolved once, below the volume, and mounted where no container reaches. Waits
    /// for disks.
    pub(crate) fn locate(&self, spec: &mut Spec) -> Result<Mounts> {
        let mut mounts = Mounts::default();
        for mount in spec.mounts_mut().iter_mut().flatten() {
            let Some(path) = mount
                .source()
                .as_ref()
                .and_then(|source| source.strip_prefix(&self.root).ok())
            else {
                continue;
            };
            let mut components = path.components();
            let volume = match components.next() {
                Some(Component::Normal(name)) => self.root.join(name),
                _ => return Err(Error::Invalid("a mount names no volume".to_owned())),
            };
            let folder = components.as_path();
            if folder.as_os_str().is_empty() {
                continue;
            }
            let found = find_in(&volume, folder)?;
            let number = self.folders.fetch_add(1, Ordering::Relaxed);
            let point = Path::new(FOLDERS).join(number.to_string());
            make_point(&point, &found).during(format!("creating {}", point.display()))?;
            let source = format!("/proc/self/fd/{}", found.as_raw_fd());
            mounts.bind(Path::new(&source), point.clone())?;
            mount.set_source(Some(point));
        }
        Ok(mounts)
    }
}

/// Mounts the disk of a volume that the host has made, whose root is made as the volume says, unless it has been one before, in an
/// earlier guest of the pod. On failure it is not mounted.
fn mount_image(device: &Path, point: &Path, volume: &agent::Volume) -> io::Result<()> {
    mount_new(device, point, "ext4", flags_of(volume), IMAGE_OPTIONS)?;
    make_root(point, volume).inspect_err(|_| disks::close(point))
}

/// Mounts the disk of a volume that others have written. On failure it is not mounted.
fn mount_direct(device: &Path, point: &Path, direct: &agent::DirectVolume) -> Result<()> {
    let what = || {
        format!(
            "mounting {}, the disk of a volume, as {} ({})",
            direct.device,
            direct.fstype,
            direct.options.join(",")
        )
    };
    let (flags, data) = disks::divide(&direct.options)?;
    mount_new(device, point, &direct.fstype, flags, &data).during(what())?;
    match direct.fs_group.as_ref() {
        // Whoever may only read it has to take it as it is.
        Some(group) if !flags.contains(MsFlags::MS_RDONLY) => fs_group::apply(point, group)
            .inspect_err(|_| disks::close(point))
            .during(format!(
                "giving the files of {} to the group {}",
                direct.device, group.gid
            )),
        _ => Ok(()),
    }
}

fn flags_of(volume: &agent::Volume) -> MsFlags {
    if volume.inert {
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
    } else {
        MsFlags::empty()
    }
}

/// What a new file system has in it.
const NEW: &str = "lost+found";

fn make_root(root: &Path, volume: &agent::Volume) -> io::Result<()> {
    if is_new(root)? {
        chown(root, Some(volume.uid), Some(volume.gid))?;
        fs::set_permissions(root, Permissions::from_mode(volume.mode))?;
        // A new volume has nothing in it. From now on, what its containers do to its root stays.
        fs::remove_dir(root.join(NEW))?;
    }
    Ok(())
}

/// Whether nobody has used the file system yet: a container may have made a folder of that name, too, or a link.
fn is_new(root: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_name() != NEW || !entry.file_type()?.is_dir() {
            return Ok(false);
        }
    }
    let new = root.join(NEW);
    Ok(new.is_dir() && fs::read_dir(new)?.next().is_none())
}

/// Finds the folder or file `path` of a volume, as a container would resolve it. What is missing is made as a folder, open to the
/// same as the volume.
fn find_in(volume: &Path, path: &Path) -> Result<File> {
    let find = || -> std::result::Result<File, pathrs::error::Error> {
        let root = Root::open(volume)?;
        if let Ok(found) = root.resolve(path) {
            return Ok(OwnedFd::from(found).into());
        }
        let mode = fs::metadata(volume).map_or(0o755, |volume| volume.mode() & 0o7777);
        let folder = root
            .mkdir_all(path, &Permissions::from_mode(0o755))?
            .reopen(OpenFlags::O_DIRECTORY | OpenFlags::O_CLOEXEC)?;
        // Not by mkdir: the agent's mask would take from it.
        if let Err(error) = folder.set_permissions(Permissions::from_mode(mode)) {
            tracing::warn!(%error, "a folder of a volume is not open to all that the volume is");
        }
        Ok(folder)
    };
    find().map_err(|error| Error::Io {
        what: format!("finding {} in its volume", path.display()),
        source: io::Error::other(error.to_string()),
    })
}

/// Makes what `found` can be mounted on.
fn make_point(point: &Path, found: &File) -> io::Result<()> {
    if found.metadata()?.is_dir() {
        return fs::create_dir_all(point);
    }
    fs::create_dir_all(FOLDERS)?;
    File::create_new(point).map(drop)
}

/// What mount(2) takes for a volume.
fn options_of(volume: &agent::Volume) -> String {
    format!(
        "size={},mode={:o},uid={},gid={}",
        volume.size,
        volume.mode & 0o7777,
        volume.uid,
        volume.gid
    )
}

/// The name of a volume is a name, not a path.
fn component(name: &str) -> Result<&Path> {
    let path = Path::new(name);
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == name => Ok(path),
        _ => Err(Error::Invalid(format!(
            "{name:?} cannot be the name of a volume"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    fn spec(source: &Path) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "mounts": [{ "destination": "/v", "type": "bind", "source": source }],
        }))
        .expect("a fair specification")
    }

    #[test]
    fn volume_is_as_large_and_as_open_as_on_the_host() {
        let volume = agent::Volume {
            size: 1 << 20,
            mode: 0o2777,
            gid: 2000,
            ..Default::default()
        };
        assert_eq!(options_of(&volume), "size=1048576,mode=2777,uid=0,gid=2000");
    }

    #[test]
    fn name_of_a_volume_is_no_path() {
        for name in ["", ".", "..", "a/b", "/a", "a/"] {
            assert!(component(name).is_err(), "{name:?}");
        }
        assert!(component("0:45").is_ok());
    }

    #[test]
    fn whole_volumes_and_other_mounts_stay_as_they_are() {
        let root = tempfile::tempdir().expect("a folder");
        let volumes = Volumes::at(root.path());
        for source in [root.path().join("a"), PathBuf::from("/elsewhere/a/b")] {
            let mut spec = spec(&source);
            volumes.locate(&mut spec).expect("nothing to find");
            let mounts = spec.mounts().as_ref().expect("one");
            assert_eq!(mounts[0].source().as_ref(), Some(&source));
        }
    }

    #[test]
    fn folder_of_a_volume_is_made_as_open_as_the_volume() {
        let volume = tempfile::tempdir().expect("a folder");
        fs::set_permissions(volume.path(), Permissions::from_mode(0o777)).expect("ours");
        find_in(volume.path(), Path::new("a/b")).expect("it can be made");
        let made = fs::metadata(volume.path().join("a/b")).expect("it is made");
        assert_eq!(made.mode() & 0o7777, 0o777);
    }

    #[test]
    fn folder_of_a_volume_cannot_lead_out_of_it() {
        let volume = tempfile::tempdir().expect("a folder");
        fs::create_dir(volume.path().join("etc")).expect("a folder");
        symlink("/etc", volume.path().join("link")).expect("a link");
        let found = find_in(volume.path(), Path::new("link")).expect("resolved as in a root");
        let inside = fs::metadata(volume.path().join("etc")).expect("it is there");
        assert_eq!(found.metadata().expect("open").ino(), inside.ino());
    }
    #[test]
    fn file_system_that_somebody_has_used_is_not_new() {
        let root = tempfile::tempdir().expect("a folder");
        let volume = agent::Volume {
            mode: 0o2775,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            ..Default::default()
        };
        let look = || {
            make_root(root.path(), &volume).expect("it can be made");
            let mode = fs::metadata(root.path()).expect("it is there").mode() & 0o7777;
            let names = fs::read_dir(root.path()).expect("it is there").count();
            (mode, names)
        };
        let mode = |mode| {
            let mode = Permissions::from_mode(mode);
            fs::set_permissions(root.path(), mode).expect("ours");
        };
        mode(0o700);
        assert_eq!(look(), (0o700, 0), "without a folder of a new one");
        fs::create_dir(root.path().join(NEW)).expect("a folder");
        assert_eq!(look(), (0o2775, 0));
        // What containers have made.
        mode(0o700);
        fs::create_dir_all(root.path().join(NEW).join("found")).expect("a folder");
        assert_eq!(look(), (0o700, 1));
        fs::remove_dir(root.path().join(NEW).join("found")).expect("empty");
        fs::write(root.path().join("file"), "").expect("a file");
        assert_eq!(look(), (0o700, 2));
        fs::remove_file(root.path().join("file")).expect("a file");
        fs::remove_dir(root.path().join(NEW)).expect("empty");
        symlink("/", root.path().join(NEW)).expect("a link");
        assert_eq!(look(), (0o700, 1));
    }
}
