//! What the source of a bind mount is, and how the guest is to get it.
//!
//! Most sources are shared by virtio-fs. A volume in memory is not: in the guest it is a tmpfs of the same size, so that its
//! pages are the pod's, are counted where the pod's are, and cost no request. On the host ConfigMaps, Secrets and other
//! volumes whose files kubelet writes are tmpfs as well; these stay shared. What tells them apart is the name of the volume
//! plug-in in kubelet's path.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use husk_protocol::agent::Volume;
use nix::sys::statvfs::{FsFlags, statvfs};

/// The mounts of this process's namespace, see proc(5).
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// The folder in which kubelet keeps the emptyDir volumes of a pod.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// A source, looked at.
#[derive(Debug, PartialEq)]
pub(crate) enum Source {
    /// A folder or file for virtio-fs.
    Shared {
        /// Whether something else is mounted below it.
        has_mounts: bool,
    },
    /// A folder of a volume in memory.
    Memory { volume: Volume, folder: PathBuf },
    /// A device: the guest has its own.
    Device,
    /// A unix socket, whose other end is a process of the host.
    Socket,
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

/// Looks at `path` on the host. `is_shm` says that it is a pod's /dev/shm.
pub(crate) fn look(path: &Path, is_shm: bool) -> io::Result<Source> {
    let path = match path.canonicalize() {
        Err(err) if is_shm && err.kind() == io::ErrorKind::NotFound => {
            return Ok(Source::Memory {
                volume: default_shm(),
                folder: PathBuf::new(),
            });
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
    {
        return Ok(Source::Memory {
            volume: volume(root)?,
            folder,
        });
    }
    let has_mounts = mounts
        .iter()
        .any(|mount| mount.at != path && mount.at.starts_with(&path));
    Ok(Source::Shared { has_mounts })
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
        let found = look(Path::new("/absent/p/shm"), true).unwrap();
        assert!(matches!(found, Source::Memory { volume, .. } if volume.size == 64 << 20));
    }

    #[test]
    fn kinds_of_files_are_told() {
        assert_eq!(look(Path::new("/dev/null"), false).unwrap(), Source::Device);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(look(&socket, false).unwrap(), Source::Socket);
        assert_eq!(
            look(folder.path(), false).unwrap(),
            Source::Shared { has_mounts: false }
        );
        assert_eq!(
            look(Path::new("/"), false).unwrap(),
            Source::Shared { has_mounts: true }
        );
        assert!(look(Path::new("/absent"), false).is_err());
    }

    #[test]
    fn lines_that_are_no_mounts_are_passed_over() {
        assert_eq!(parse("\nnonsense\n1 2 3 - \n"), []);
        assert_eq!(unescape("a\\040b\\"), Path::new("a b\\"));
        assert_eq!(unescape("\\99"), Path::new("\\99"));
    }
}
