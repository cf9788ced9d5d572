//! Direct-assigned volumes: a CSI driver that is asked to mount a disk leaves a record instead, and whoever runs the pod gives
//! its virtual machine the disk.
//!
//! Place and form of a record are those of Kata Containers (its `src/runtime/pkg/direct-volume`), which drivers know:
//!
//! ```text
//! /run/kata-containers/shared/direct-volumes/<path of the volume, base64url>/mountInfo.json
//! ```
//!
//! The folder is root's alone. A record in the volume itself could be written by a guest, and name any disk of the host.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use serde::{Deserialize, Serialize};

/// Where drivers leave records.
const ROOT: &str = "/run/kata-containers/shared/direct-volumes";

/// The record in a volume's folder.
const FILE: &str = "mountInfo.json";

/// What the kinds of volume are called that are a disk with a file system: by Kata's manual, and by its CSI driver and others.
const DISKS: [&str; 2] = ["block", "directvol"];

const FS_GROUP: &str = "fsGroup";
const FS_GROUP_CHANGE_POLICY: &str = "fsGroupChangePolicy";

/// What a driver may ask for that would change what is on the disk, or how it is read.
const NOT_DONE: [&str; 2] = ["encryptionKey", "createFilesystem"];

/// The longest path of which base64 is a file name (NAME_MAX), in bytes.
const PATH_MAX: usize = 255 / 4 * 3;

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It could have several names, or none.
    #[error("{} cannot be the path of a volume: it is not absolute, or longer than {PATH_MAX} bytes", .0.display())]
    Path(PathBuf),
    /// The system refused.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What could not be done.
        operation: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no record.
    #[error("the record {} cannot be understood", path.display())]
    Malformed {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It asks for more than there is.
    #[error("the record {} has {what}", path.display())]
    Unsupported {
        /// Its file.
        path: PathBuf,
        /// What is asked for.
        what: String,
    },
}

/// A disk with a file system that is to be a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectVolume {
    /// A block device of the host, or a file that is the image of one.
    pub device: PathBuf,
    /// As mount(8) names it.
    pub fstype: String,
    /// Of mount(8).
    pub options: Vec<String>,
    /// Who is to have access to the files, if it is not to stay as it is.
    pub fs_group: Option<FsGroup>,
}

/// Kubernetes' `fsGroup`: the group that the files of a volume are to belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsGroup {
    /// The group's number.
    pub gid: u32,
    /// Which files are looked at.
    pub policy: ChangePolicy,
}

/// Kubernetes' `fsGroupChangePolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ChangePolicy {
    /// All, each time.
    #[default]
    Always,
    /// All, if the root of the volume is not as it should be; otherwise none.
    OnRootMismatch,
}

impl ChangePolicy {
    /// Its name in Kubernetes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::OnRootMismatch => "OnRootMismatch",
        }
    }
}

impl FromStr for ChangePolicy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::Always, Self::OnRootMismatch]
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| format!("{name:?} is neither Always nor OnRootMismatch"))
    }
}

/// The form of a record.
#[derive(Debug, Serialize, Deserialize)]
struct MountInfo {
    #[serde(rename = "volume-type")]
    volume_type: String,
    device: PathBuf,
    fstype: String,
    // Go writes null for what is empty, or leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    options: Option<Vec<String>>,
}

impl From<&DirectVolume> for MountInfo {
    fn from(volume: &DirectVolume) -> Self {
        let metadata = volume.fs_group.map(|FsGroup { gid, policy }| {
            BTreeMap::from([
                (FS_GROUP.to_owned(), gid.to_string()),
                (FS_GROUP_CHANGE_POLICY.to_owned(), policy.name().to_owned()),
            ])
        });
        Self {
            volume_type: DISKS[0].to_owned(),
            device: volume.device.clone(),
            fstype: volume.fstype.clone(),
            metadata,
            options: Some(volume.options.clone()),
        }
    }
}

impl MountInfo {
    fn checked(self) -> Result<DirectVolume, String> {
        if !DISKS.contains(&self.volume_type.as_str()) {
            let (kind, known) = (self.volume_type, DISKS.join(" and "));
            return Err(format!("the volume-type {kind:?}; {known} are known"));
        }
        let metadata = self.metadata.unwrap_or_default();
        if let Some(key) = NOT_DONE.iter().find(|key| metadata.contains_key(**key)) {
            return Err(format!("{key}, which is not done"));
        }
        let fs_group = match metadata.get(FS_GROUP) {
            None => None,
            Some(gid) => Some(FsGroup {
                gid: gid.parse().map_err(|_| {
                    format!("the {FS_GROUP} {gid:?}, which is no number of a group")
                })?,
                // What nobody knows is no reason to leave files alone, and so Kata sees it.
                policy: metadata
                    .get(FS_GROUP_CHANGE_POLICY)
                    .and_then(|policy| policy.parse().ok())
                    .unwrap_or_default(),
            }),
        };
        Ok(DirectVolume {
            device: self.device,
            fstype: self.fstype,
            options: self.options.unwrap_or_default(),
            fs_group,
        })
    }
}

/// The records of a node.
#[derive(Debug, Clone)]
pub struct Records {
    root: PathBuf,
}

impl Default for Records {
    fn default() -> Self {
        Self::at(Path::new(ROOT))
    }
}

impl Records {
    /// Those in another folder, for tests.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Records that the volume with the path `place` is `volume`, whatever was recorded before.
    ///
    /// # Errors
    /// If the path cannot be a record's, or the record cannot be written; what was there before is then there still.
    pub fn add(&self, place: &Path, volume: &DirectVolume) -> Result<(), RecordError> {
        let folder = self.folder(place)?;
        let failed = |source| RecordError::Io {
            operation: "write a record in",
            path: folder.clone(),
            source,
        };
        let write = || {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700).create(&folder)?;
            // Whoever reads it meanwhile has the one or the other.
            let mut file = tempfile::NamedTempFile::new_in(&self.root)?;
            serde_json::to_writer(&mut file, &MountInfo::from(volume))?;
            file.flush()?;
            fs::set_permissions(file.path(), Permissions::from_mode(0o600))?;
            file.persist(folder.join(FILE))?;
            Ok(())
        };
        write().map_err(failed)
    }

    /// Removes the record of the volume with the path `place`, if there is one.
    ///
    /// # Errors
    /// If the path cannot be a record's, or it cannot be removed.
    pub fn remove(&self, place: &Path) -> Result<(), RecordError> {
        let folder = self.folder(place)?;
        match fs::remove_dir_all(&folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RecordError::Io {
                operation: "remove",
                path: folder,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// What is recorded of the volume with the path `place`. A path that cannot be a record's has none.
    ///
    /// # Errors
    /// If there is a record, but it cannot be read, or asks for more than a file system on a disk.
    pub fn find(&self, place: &Path) -> Result<Option<DirectVolume>, RecordError> {
        let Ok(folder) = self.folder(place) else {
            return Ok(None);
        };
        let path = folder.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RecordError::Io {
                    operation: "read",
                    path,
                    source,
                });
            }
        };
        let info: MountInfo = match serde_json::from_slice(&text) {
            Ok(info) => info,
            Err(source) => return Err(RecordError::Malformed { path, source }),
        };
        match info.checked() {
            Ok(volume) => Ok(Some(volume)),
            Err(what) => Err(RecordError::Unsupported { path, what }),
        }
    }

    /// The paths of the volumes that have a record.
    ///
    /// # Errors
    /// If the folder of the records cannot be read.
    pub fn places(&self) -> Result<Vec<PathBuf>, RecordError> {
        let failed = |source| RecordError::Io {
            operation: "read",
            path: self.root.clone(),
            source,
        };
        let entries = match self.root.read_dir() {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut places = Vec::new();
        for entry in entries {
            // What has another name is not one.
            let name = entry.map_err(failed)?.file_name();
            if let Ok(place) = URL_SAFE.decode(name.as_bytes()) {
                places.push(PathBuf::from(OsString::from_vec(place)));
            }
        }
        Ok(places)
    }

    fn folder(&self, place: &Path) -> Result<PathBuf, RecordError> {
        let bytes = place.as_os_str().as_bytes();
        if !place.is_absolute() || bytes.len() > PATH_MAX {
            return Err(RecordError::Path(place.to_owned()));
        }
        Ok(self.root.join(URL_SAFE.encode(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: &str = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pv/mount";

    fn volume() -> DirectVolume {
        DirectVolume {
            device: "/dev/sdf".into(),
            fstype: "ext4".to_owned(),
            options: vec!["noatime".to_owned()],
            fs_group: Some(FsGroup {
                gid: 2000,
                policy: ChangePolicy::OnRootMismatch,
            }),
        }
    }

    #[test]
    fn record_is_found_as_it_was_left_until_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::at(&root.path().join("records"));
        let place = Path::new(PLACE);
        assert_eq!(records.find(place).unwrap(), None);
        for volume in [
            volume(),
            DirectVolume {
                fs_group: None,
                options: Vec::new(),
                ..volume()
            },
        ] {
            records.add(place, &volume).unwrap();
            assert_eq!(records.find(place).unwrap(), Some(volume));
        }
        assert_eq!(records.find(Path::new("/var")).unwrap(), None);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let folder = records.folder(place).unwrap();
        assert_eq!((mode(&folder), mode(&folder.join(FILE))), (0o700, 0o600));
        // Nothing but the folder.
        assert_eq!(fs::read_dir(&records.root).unwrap().count(), 1);
        assert_eq!(records.places().unwrap(), [place]);
        for _ in 0..2 {
            records.remove(place).unwrap();
        }
        assert_eq!(records.find(place).unwrap(), None);
    }

    /// What is found where a driver has left `text`.
    fn left(text: &str) -> Result<Option<DirectVolume>, RecordError> {
        let root = tempfile::tempdir().unwrap();
        // As Python's base64.urlsafe_b64encode has it.
        let folder = root.path().join("L3Y_Pg==");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(FILE), text).unwrap();
        let (records, place) = (Records::at(root.path()), Path::new("/v?>"));
        assert_eq!(records.places().unwrap(), [place]);
        records.find(place)
    }

    #[test]
    fn record_of_a_driver_is_understood() {
        let found = left(
            r#"{"volume-type":"block","device":"/dev/sdf","fstype":"ext4","metadata":{"fsGroup":"2000",
            "fsGroupChangePolicy":"OnRootMismatch","other":"x"},"options":["noatime"],"more":1}"#,
        );
        assert_eq!(found.unwrap(), Some(volume()));
        for (rest, gid) in [
            ("", None),
            (r#","options":null,"metadata":null"#, None),
            (
                r#","metadata":{"fsGroup":"7","fsGroupChangePolicy":""}"#,
                Some(7),
            ),
        ] {
            let text =
                format!(r#"{{"volume-type":"directvol","device":"/disk","fstype":"xfs"{rest}}}"#);
            let expected = DirectVolume {
                device: "/disk".into(),
                fstype: "xfs".to_owned(),
                options: Vec::new(),
                fs_group: gid.map(|gid| FsGroup {
                    gid,
                    policy: ChangePolicy::Always,
                }),
            };
            assert_eq!(left(&text).unwrap(), Some(expected));
        }
    }

    #[test]
    fn record_that_asks_for_more_is_refused() {
        let block = |metadata: &str| {
            format!(
                r#"{{"volume-type":"block","device":"/d","fstype":"ext4","metadata":{metadata}}}"#
            )
        };
        for (text, why) in [
            ("{".to_owned(), "cannot be understood"),
            (r#"{"device":"/d"}"#.to_owned(), "cannot be understood"),
            (block("{}").replace("block", "spdkvol"), "spdkvol"),
            (block(r#"{"fsGroup":"-1"}"#), "fsGroup \"-1\""),
            (block(r#"{"encryptionKey":"k"}"#), "encryptionKey"),
            (block(r#"{"createFilesystem":"true"}"#), "createFilesystem"),
        ] {
            let err = left(&text).unwrap_err().to_string();
            assert!(err.contains(why), "{text}: {err}");
        }
    }

    #[test]
    fn path_that_has_no_record_is_told() {
        let records = Records::default();
        let long = format!("/{}", "x".repeat(PATH_MAX));
        for path in ["relative", &long] {
            let err = records.add(Path::new(path), &volume()).unwrap_err();
            assert!(matches!(err, RecordError::Path(_)), "{err}");
            assert_eq!(records.find(Path::new(path)).unwrap(), None);
        }
        let longest = &long[..PATH_MAX];
        let folder = records.folder(Path::new(longest)).unwrap();
        assert!(folder.file_name().unwrap().len() <= 255);
    }
}
