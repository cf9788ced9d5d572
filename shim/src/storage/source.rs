//! What the source of a bind mount is, and how the guest is to get it.
//!
//! Most sources are shared by virtio-fs. A volume in memory is not: in the guest it is a tmpfs of the same size, so that its
//! pages are the pod's, are counted where the pod's are, and cost no request. On the host ConfigMaps, Secrets and other
//! volumes whose files kubelet writes are tmpfs as well; these stay shared. What tells them apart is the name of the volume
//! plug-in in kubelet's path.
//!
//! By it an emptyDir on the host's disk is known as well, which can be a disk of the guest's. And a volume whose disk a CSI driver
//! has left to the guest is known by its record ([`husk_volumes`]).

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use husk_protocol::agent::{self, Volume};
use husk_volumes::{ChangePolicy, DirectVolume, Records};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::disk::{Disk, Manner};
use super::{blocking, image};
use crate::error::Error;

/// The mounts of this process's namespace, see proc(5).
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// The folder in which kubelet keeps the emptyDir volumes of a pod.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// The folder in which kubelet keeps the volumes of CSI drivers of a pod, and the one of each in it that is to be mounted.
const CSI: &str = "kubernetes.io~csi";
const CSI_MOUNT: &str = "mount";

/// Most folders that are looked into for files.
const FOLDER_LIMIT: usize = 1000;

/// A source, looked at.
#[derive(Debug, PartialEq)]
pub(crate) enum Source {
    /// A folder or file for virtio-fs.
    Shared {
        /// Whether something else is mounted below it.
        has_mounts: bool,
    },
    /// A folder of a volume of the guest's own.
    Own { volume: OwnVolume, folder: PathBuf },
    /// A device: the guest has its own.
    Device,
    /// A unix socket, whose other end is a process of the host.
    Socket,
}

/// A volume that is no folder of the host's.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OwnVolume {
    pub(crate) volume: Volume,
    /// `None` if it is in the guest's memory.
    pub(crate) disk: Option<VolumeDisk>,
}

/// The disk of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum VolumeDisk {
    /// The image in this folder of the host.
    Image(PathBuf),
    /// A device of the host, or a file that is one's image.
    Direct { device: PathBuf, read_only: bool },
}

impl VolumeDisk {
    /// Opens it for one VM alone, if it is written to.
    pub(crate) async fn open(&self) -> Result<Disk, Error> {
        let disk = self.clone();
        blocking(move || match disk {
            Self::Image(folder) => image::open(&folder),
            Self::Direct { device, read_only } => Disk::of_volume(&device, read_only),
        })
        .await
    }

    /// The folder for its image, if it is one.
    pub(crate) fn image(&self) -> Option<&Path> {
        match self {
            Self::Image(folder) => Some(folder),
            Self::Direct { .. } => None,
        }
    }
}

/// A line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MountPoint {
    /// Major and minor number of the file system.
    device: String,
    /// Which folder of the file system is mounted.
    root: PathBuf,
    at: PathBuf,
    fstype: String,
}

/// Which emptyDirs of a pod are disks, by the device and inode of their folders: what was said to the pod's first container
/// that has one holds for all of them, whatever is in the folder later.
pub(super) type Decisions = Arc<Mutex<HashMap<(u64, u64), bool>>>;

/// Looks at the sources of a container's bind mounts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    /// By which kubelet names the folder of the pod. If nobody says it, each is taken for the pod's.
    pub(super) pod_uid: Option<String>,
    /// Whether an emptyDir that is not known yet, and keeps no files, is a disk.
    pub(super) has_disks: bool,
    pub(super) decisions: Decisions,
    pub(super) records: Records,
}

impl Sources {
    /// Looks at `path` on the host. `is_shm` says that it is a pod's /dev/shm.
    pub(crate) fn look(&self, path: &Path, is_shm: bool) -> io::Result<Source> {
        let path = match path.canonicalize() {
            Err(err) if is_shm && err.kind() == io::ErrorKind::NotFound => {
                return Ok(in_memory_of_guest(default_shm(), PathBuf::new()));
            }
            path => path?,
        };
        let kind = path.metadata()?.file_type();
        if kind.is_socket() {
            return Ok(Source::Socket);
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Ok(Source::Device);
        }
        let mounts = parse(&std::fs::read_to_string(MOUNTINFO)?);
        if kind.is_dir()
            && let Some((root, folder)) = in_memory(&mounts, &path, is_shm)
            && (is_shm || self.is_of_pod(&root.at))
        {
            return Ok(in_memory_of_guest(volume(root)?, folder));
        }
        if kind.is_dir()
            && let Some((place, folder, direct)) = self.direct(&mounts, &path)?
        {
            let volume = direct_volume(&place, &direct)?;
            return Ok(Source::Own { volume, folder });
        }
        if kind.is_dir()
            && let Some((place, folder)) = volume_of(&mounts, &path, EMPTY_DIR)
            && self.is_of_pod(&place)
            && self.is_disk(&place)?
        {
            let volume = OwnVolume {
                volume: disk_volume(&place)?,
                disk: Some(VolumeDisk::Image(place)),
            };
            return Ok(Source::Own { volume, folder });
        }
        let has_mounts = mounts
            .iter()
            .any(|mount| mount.at != path && mount.at.starts_with(&path));
        Ok(Source::Shared { has_mounts })
    }

    /// Whether the volume at `place` is the pod's, as `<uid>/volumes/…`: another pod's, which a hostPath leads to, has its files
    /// elsewhere.
    fn is_of_pod(&self, place: &Path) -> bool {
        let Some(uid) = &self.pod_uid else {
            return true;
        };
        place.ancestors().any(|folder| {
            folder.file_name() == Some(OsStr::new("volumes"))
                && folder.parent().and_then(Path::file_name) == Some(OsStr::new(uid))
        })
    }

    /// The volume with a record that `path` is a folder of: where it is, which folder, and the record. A driver may have been
    /// given another path to the same place.
    fn direct(
        &self,
        mounts: &[MountPoint],
        path: &Path,
    ) -> io::Result<Option<(PathBuf, PathBuf, DirectVolume)>> {
        let places = self.records.places().map_err(io::Error::other)?;
        for named in places.iter().filter(|place| self.is_of_pod(place)) {
            // It may be gone, and the record be left.
            let Ok(place) = named.canonicalize() else {
                continue;
            };
            if let Some(folder) = folder_of_csi(mounts, path, &place)?
                && let Some(direct) = self.records.find(named).map_err(io::Error::other)?
            {
                return Ok(Some((place, folder, direct)));
            }
        }
        Ok(None)
    }

    fn is_disk(&self, place: &Path) -> io::Result<bool> {
        let found = place.metadata()?;
        let mut decisions = self
            .decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(&is_disk) = decisions.get(&(found.dev(), found.ino())) {
            return Ok(is_disk);
        }
        // One that is a disk already stays one, whatever is asked for now.
        let is_disk = image::exists(place) || self.has_disks && keeps_no_files(place)?;
        decisions.insert((found.dev(), found.ino()), is_disk);
        Ok(is_disk)
    }
}

fn in_memory_of_guest(volume: Volume, folder: PathBuf) -> Source {
    let volume = OwnVolume { volume, disk: None };
    Source::Own { volume, folder }
}

/// The mount of the volume in memory that `path` is a folder of, and which folder; `None` if it is of none.
fn in_memory<'a>(
    mounts: &'a [MountPoint],
    path: &Path,
    is_shm: bool,
) -> Option<(&'a MountPoint, PathBuf)> {
    // The last of those that are mounted on top of each other.
    let mount = mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.at))
        .max_by_key(|mount| mount.at.as_os_str().len())
        .filter(|mount| mount.fstype == "tmpfs")?;
    let is_empty_dir = |mount: &MountPoint| {
        mount.root == Path::new("/")
            && mount
                .at
                .parent()
                .and_then(Path::file_name)
                .is_some_and(|parent| parent == OsStr::new(EMPTY_DIR))
    };
    let root = if is_shm {
        mount
    } else {
        // A subPath is a mount of its own, of a folder of the same file system.
        mounts
            .iter()
            .find(|other| other.device == mount.device && is_empty_dir(other))?
    };
    let inside = mount.root.join(path.strip_prefix(&mount.at).ok()?);
    let folder = inside.strip_prefix(&root.root).ok()?;
    Some((root, folder.to_owned()))
}

/// The volume of kubelet's plug-in `plugin` that `path` is a folder of, and which folder; `None` if it is of none.
fn volume_of(mounts: &[MountPoint], path: &Path, plugin: &str) -> Option<(PathBuf, PathBuf)> {
    if let Some(found) = divide(path, plugin) {
        return Some(found);
    }
    // A subPath, which kubelet mounts at `volume-subpaths/<volume>/<container>/<n>` of the pod's folder.
    let mount = mounts.iter().rfind(|mount| mount.at == path)?;
    let (volume, folder) = divide(&mount.root, plugin)?;
    let pod = path.ancestors().nth(4)?;
    let place = pod.join("volumes").join(plugin).join(volume.file_name()?);
    let name = path.strip_prefix(pod.join("volume-subpaths")).ok()?;
    let is_its_own = name.components().next()?.as_os_str() == volume.file_name()?;
    (is_its_own && place.is_dir()).then_some((place, folder))
}

/// Which folder of the volume that a driver was to mount at `place` is `path`; `None` if it is none.
fn folder_of_csi(mounts: &[MountPoint], path: &Path, place: &Path) -> io::Result<Option<PathBuf>> {
    if let Ok(folder) = path.strip_prefix(place) {
        return Ok(Some(folder.to_owned()));
    }
    // A subPath, as above.
    let (Some(volume), Some(pod)) = (place.parent(), place.ancestors().nth(4)) else {
        return Ok(None);
    };
    let name = volume.file_name().unwrap_or_default();
    if !path.starts_with(pod.join("volume-subpaths").join(name)) {
        return Ok(None);
    }
    let mount = mounts.iter().rfind(|mount| mount.at == path);
    let folder = mount.and_then(|mount| {
        // The driver may have mounted something at the place nevertheless, or another folder of the same.
        let bound = mounts.iter().rfind(|bound| bound.at == place);
        if let Some(bound) = bound.filter(|bound| bound.device == mount.device) {
            return Some(mount.root.strip_prefix(&bound.root).ok()?.to_owned());
        }
        let (_, folder) = divide(&mount.root, CSI)?;
        Some(folder.strip_prefix(CSI_MOUNT).ok()?.to_owned())
    });
    // What it is on the host is nothing that anybody wants.
    let unknown = || io::Error::other(format!("it is no folder of the volume {}", place.display()));
    folder.map(Some).ok_or_else(unknown)
}

/// Divides a path after the name of a volume of `plugin`.
fn divide(path: &Path, plugin: &str) -> Option<(PathBuf, PathBuf)> {
    let place = path.ancestors().find(|folder| {
        let parent = folder.parent().and_then(Path::file_name);
        parent == Some(OsStr::new(plugin))
    })?;
    let folder = path.strip_prefix(place).ok()?;
    Some((place.to_owned(), folder.to_owned()))
}

/// Whether there is no file but the disk's image in the folder of an emptyDir, which the guest would not see. The folders that
/// kubelet makes for a subPath are there; one with very many is not looked through.
fn keeps_no_files(place: &Path) -> io::Result<bool> {
    let mut folders = vec![place.to_owned()];
    let mut looked_into = 0;
    while let Some(folder) = folders.pop() {
        looked_into += 1;
        if looked_into > FOLDER_LIMIT {
            return Ok(false);
        }
        let entries = match folder.read_dir() {
            // Somebody else's container may have the volume.
            Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if folder != place || !image::is_image(&entry.file_name()) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// A volume on a disk that is as open as the folder for it.
fn disk_volume(place: &Path) -> io::Result<Volume> {
    let owner = place.metadata()?;
    Ok(Volume {
        name: name_of_disk(&owner),
        mode: owner.mode() & 0o7777,
        uid: owner.uid(),
        gid: owner.gid(),
        ..Volume::default()
    })
}

/// What the guest calls the volume with the folder `place`: as long as that is there, no other folder of the host has these numbers.
fn name_of_disk(place: &Metadata) -> String {
    format!("disk~{}~{}", place.dev(), place.ino())
}

/// The volume at `place` that is the file system on a disk.
fn direct_volume(place: &Path, direct: &DirectVolume) -> io::Result<OwnVolume> {
    let Manner { read_only, options } = Manner::of_volume(direct)?;
    let fs_group = direct.fs_group.map(|group| agent::FsGroup {
        gid: group.gid,
        on_root_mismatch: group.policy == ChangePolicy::OnRootMismatch,
        ..Default::default()
    });
    let found = agent::DirectVolume {
        fstype: direct.fstype.clone(),
        options,
        device: direct.device.display().to_string(),
        fs_group: fs_group.into(),
        ..Default::default()
    };
    Ok(OwnVolume {
        volume: Volume {
            name: name_of_disk(&place.metadata()?),
            direct: Some(found).into(),
            ..Volume::default()
        },
        disk: Some(VolumeDisk::Direct {
            device: direct.device.clone(),
            read_only,
        }),
    })
}

/// A volume as large and as open as the file system that is mounted at `root`.
fn volume(root: &MountPoint) -> io::Result<Volume> {
    let (size, owner) = (statvfs(&root.at)?, root.at.metadata()?);
    let inert = FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
    Ok(Volume {
        // As long as it is mounted, no other file system of the host has this number.
        name: root.device.clone(),
        size: size.blocks().saturating_mul(size.fragment_size()),
        mode: owner.mode() & 0o7777,
        uid: owner.uid(),
        gid: owner.gid(),
        inert: size.flags().contains(inert),
        ..Volume::default()
    })
}

/// What containerd has for a pod that it makes itself.
fn default_shm() -> Volume {
    Volume {
        name: "shm".to_owned(),
        size: 64 << 20,
        mode: 0o1777,
        inert: true,
        ..Volume::default()
    }
}

fn parse(mountinfo: &str) -> Vec<MountPoint> {
    mountinfo.lines().filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /at rw,noatime master:1 - ext3 /dev/root rw`
fn parse_line(line: &str) -> Option<MountPoint> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    Some(MountPoint {
        device: fields.next()?.to_owned(),
        root: unescape(fields.next()?),
        at: unescape(fields.next()?),
        fstype: file_system.split(' ').next()?.to_owned(),
    })
}

/// Space, tab, newline and backslash stand as `\` and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        let escaped = (first == b'\\')
            .then(|| std::str::from_utf8(others.get(..3)?).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &others[3..];
            }
            None => {
                bytes.push(first);
                rest = others;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/u/volumes";

    fn table() -> Vec<MountPoint> {
        parse(&format!(
            "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
             2 1 0:40 / {POD}/kubernetes.io~empty-dir/cache rw,relatime shared:2 - tmpfs tmpfs rw,size=1024k\n\
             3 1 0:40 /sub /var/lib/kubelet/pods/u/volume-subpaths/cache/c/0 rw shared:2 - tmpfs tmpfs rw\n\
             4 1 0:41 / {POD}/kubernetes.io~secret/token rw shared:3 - tmpfs tmpfs rw\n\
             5 1 0:42 / /run/cri/p/shm rw - tmpfs shm rw\n\
             6 1 0:43 / /srv/with\\040space rw - tmpfs tmpfs rw\n"
        ))
    }

    fn found(path: &str, is_shm: bool) -> Option<(String, PathBuf)> {
        let table = table();
        in_memory(&table, Path::new(path), is_shm)
            .map(|(root, folder)| (root.device.clone(), folder))
    }

    #[test]
    fn empty_dir_in_memory_is_the_guests() {
        let cache = format!("{POD}/kubernetes.io~empty-dir/cache");
        assert_eq!(found(&cache, false), Some(("0:40".into(), "".into())));
        let below = format!("{cache}/a/b");
        assert_eq!(found(&below, false), Some(("0:40".into(), "a/b".into())));
    }

    #[test]
    fn empty_dir_on_disk_is_told_by_its_path_or_its_mount() {
        let pod = tempfile::tempdir().unwrap();
        let place = pod.path().join("volumes").join(EMPTY_DIR).join("data");
        std::fs::create_dir_all(&place).unwrap();
        let sub_path = pod.path().join("volume-subpaths/data/c/0");
        let mounts = parse(&format!(
            "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
             2 1 8:1 {}/a/b {} rw - ext4 /dev/sda1 rw\n\
             3 1 8:1 {}/a /elsewhere rw - ext4 /dev/sda1 rw\n",
            place.display(),
            sub_path.display(),
            place.display(),
        ));
        let found = |path: &Path| volume_of(&mounts, path, EMPTY_DIR);
        let of = |folder: &str| Some((place.clone(), PathBuf::from(folder)));
        assert_eq!(found(&place), of(""));
        assert_eq!(found(&place.join("a")), of("a"));
        assert_eq!(found(&sub_path), of("a/b"));
        assert_eq!(found(Path::new("/elsewhere")), None);
        assert_eq!(found(&pod.path().join("volumes")), None);
    }

    /// What there is at `path` for the first container of a pod.
    fn look(path: &Path, is_shm: bool, has_disks: bool) -> io::Result<Source> {
        let sources = Sources {
            has_disks,
            ..Sources::default()
        };
        sources.look(path, is_shm)
    }

    #[test]
    fn empty_dir_is_a_disk_where_it_keeps_no_files() {
        let pod = tempfile::tempdir().unwrap();
        let place = pod.path().join(EMPTY_DIR).join("data");
        std::fs::create_dir_all(place.join("sub/path")).unwrap();
        std::fs::write(place.join(".husk.ext4"), "").unwrap();
        let Source::Own { volume, folder } = look(&place.join("sub"), false, true).unwrap() else {
            panic!("no disk");
        };
        assert_eq!(folder, Path::new("sub"));
        assert_eq!(volume.disk, Some(VolumeDisk::Image(place.clone())));
        assert!(volume.volume.name.starts_with("disk~"), "{volume:?}");
        assert_eq!(volume.volume.mode, 0o755);
        // It stays one, whatever is said later, and whatever else is there.
        std::fs::write(place.join("sub/path/file"), "").unwrap();
        let again = look(&place, false, false).unwrap();
        assert!(matches!(again, Source::Own { .. }), "{again:?}");
        std::fs::remove_file(place.join(".husk.ext4")).unwrap();
        let shared = Source::Shared { has_mounts: false };
        assert_eq!(look(&place, false, true).unwrap(), shared);
        std::fs::remove_file(place.join("sub/path/file")).unwrap();
        assert_eq!(look(&place, false, false).unwrap(), shared);
        assert!(matches!(
            look(&place, false, true).unwrap(),
            Source::Own { .. }
        ));
    }

    #[test]
    fn empty_dir_stays_what_it_is_to_the_first_container() {
        let pod = tempfile::tempdir().unwrap();
        let place = pod.path().join(EMPTY_DIR);
        let (shared, disk) = (place.join("shared"), place.join("disk"));
        std::fs::create_dir_all(&shared).unwrap();
        std::fs::create_dir(&disk).unwrap();
        std::fs::write(shared.join("file"), "").unwrap();
        let sources = Sources {
            has_disks: true,
            ..Sources::default()
        };
        let is_disk = |place| matches!(sources.look(place, false).unwrap(), Source::Own { .. });
        assert!(!is_disk(&shared) && is_disk(&disk));
        std::fs::remove_file(shared.join("file")).unwrap();
        std::fs::write(disk.join("file"), "").unwrap();
        assert!(!is_disk(&shared) && is_disk(&disk));
    }

    #[test]
    fn empty_dir_of_another_pod_is_shared() {
        let pods = tempfile::tempdir().unwrap();
        let place = pods.path().join("uid/volumes").join(EMPTY_DIR).join("data");
        std::fs::create_dir_all(&place).unwrap();
        for (uid, is_disk) in [(None, true), (Some("uid"), true), (Some("other"), false)] {
            let sources = Sources {
                pod_uid: uid.map(str::to_owned),
                has_disks: true,
                ..Sources::default()
            };
            let found = sources.look(&place, false).unwrap();
            assert_eq!(matches!(found, Source::Own { .. }), is_disk, "{uid:?}");
        }
    }

    #[test]
    fn volume_with_a_record_is_a_disk_of_its_pod() {
        let host = tempfile::tempdir().unwrap();
        let volume = host.path().join("uid/volumes").join(CSI).join("pv");
        let place = volume.join(CSI_MOUNT);
        std::fs::create_dir_all(place.join("a")).unwrap();
        let link = host.path().join("link");
        std::os::unix::fs::symlink(host.path().join("uid"), &link).unwrap();
        let records = Records::at(&host.path().join("records"));
        let direct = DirectVolume {
            device: "/dev/sdf".into(),
            fstype: "ext4".to_owned(),
            options: vec!["noatime".to_owned()],
            fs_group: None,
        };
        records.add(&place, &direct).unwrap();
        let sources = |uid: &str| Sources {
            pod_uid: Some(uid.to_owned()),
            records: records.clone(),
            ..Sources::default()
        };
        let through_link = link.join("volumes").join(CSI).join("pv").join(CSI_MOUNT);
        for (path, folder) in [(&place, ""), (&place.join("a"), "a"), (&through_link, "")] {
            let Source::Own {
                volume,
                folder: found,
            } = sources("uid").look(path, false).unwrap()
            else {
                panic!("no disk: {}", path.display());
            };
            assert_eq!(found, Path::new(folder));
            let device = VolumeDisk::Direct {
                device: "/dev/sdf".into(),
                read_only: false,
            };
            assert_eq!(volume.disk, Some(device));
            let direct = &volume.volume.direct;
            assert_eq!(
                (direct.fstype.as_str(), &direct.options[..]),
                ("ext4", &["noatime".to_owned(), "rw".to_owned()][..])
            );
        }
        // subPaths, of the folder that is there, and of one that the driver has bound to it.
        let sub_path = host.path().join("uid/volume-subpaths/pv/c/0");
        let line = |root: &Path, at: &Path| {
            format!(
                "1 0 8:1 {} {} rw - ext4 /dev/sda1 rw\n",
                root.display(),
                at.display()
            )
        };
        let of_place = line(&place.join("a/b"), &sub_path);
        let bound = line(Path::new("/staged"), &place) + &line(Path::new("/staged/c"), &sub_path);
        let elsewhere = line(Path::new("/elsewhere"), &sub_path);
        let folder = |lines: &str| folder_of_csi(&parse(lines), &sub_path, &place);
        assert_eq!(folder(&of_place).unwrap(), Some("a/b".into()));
        assert_eq!(folder(&bound).unwrap(), Some("c".into()));
        assert!(folder(&elsewhere).is_err() && folder("").is_err());
        let shared = Source::Shared { has_mounts: false };
        assert_eq!(sources("other").look(&place, false).unwrap(), shared);
        assert_eq!(sources("uid").look(&volume, false).unwrap(), shared);
        // One that the guest cannot mount is not shared instead: nobody has mounted it.
        let fstype = "btrfs".to_owned();
        records
            .add(&place, &DirectVolume { fstype, ..direct })
            .unwrap();
        let err = sources("uid").look(&place, false).unwrap_err().to_string();
        assert!(err.contains("as btrfs"), "{err}");
    }

    #[test]
    fn folder_of_very_many_folders_is_not_looked_through() {
        let place = tempfile::tempdir().unwrap();
        for folder in 0..FOLDER_LIMIT - 1 {
            std::fs::create_dir(place.path().join(folder.to_string())).unwrap();
        }
        assert!(keeps_no_files(place.path()).unwrap());
        std::fs::create_dir(place.path().join("more")).unwrap();
        assert!(!keeps_no_files(place.path()).unwrap());
    }

    #[test]
    fn sub_path_is_a_folder_of_its_volume() {
        let path = "/var/lib/kubelet/pods/u/volume-subpaths/cache/c/0";
        assert_eq!(found(path, false), Some(("0:40".into(), "sub".into())));
    }

    #[test]
    fn what_kubelet_writes_stays_shared() {
        for path in [
            &format!("{POD}/kubernetes.io~secret/token"),
            // On disk.
            &format!("{POD}/kubernetes.io~empty-dir/disk"),
            "/srv/with space",
        ] {
            assert_eq!(found(path, false), None, "{path}");
        }
    }

    #[test]
    fn shm_is_the_guests() {
        assert_eq!(
            found("/run/cri/p/shm", true),
            Some(("0:42".into(), "".into()))
        );
        // If the host's is used, it is no mount of a pod's; it is shared like any folder on disk.
        assert_eq!(found("/dev/shm", true), None);
    }

    #[test]
    fn shm_that_containerd_has_not_is_the_guests_too() {
        let found = look(Path::new("/absent/p/shm"), true, false).unwrap();
        assert!(matches!(found, Source::Own { volume, .. } if volume.volume.size == 64 << 20));
    }

    #[test]
    fn kinds_of_files_are_told() {
        assert_eq!(
            look(Path::new("/dev/null"), false, false).unwrap(),
            Source::Device
        );
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(look(&socket, false, false).unwrap(), Source::Socket);
        assert_eq!(
            look(folder.path(), false, false).unwrap(),
            Source::Shared { has_mounts: false }
        );
        assert_eq!(
            look(Path::new("/"), false, false).unwrap(),
            Source::Shared { has_mounts: true }
        );
        assert!(look(Path::new("/absent"), false, false).is_err());
    }

    #[test]
    fn lines_that_are_no_mounts_are_passed_over() {
        assert_eq!(parse("\nnonsense\n1 2 3 - \n"), []);
        assert_eq!(unescape("a\\040b\\"), Path::new("a b\\"));
        assert_eq!(unescape("\\99"), Path::new("\\99"));
    }
}
