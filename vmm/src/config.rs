//! What a VM is made of. It crosses the control socket as JSON; descriptors travel beside it.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::control::MAX_FDS;

/// The description of one virtual machine.
///
/// Files are descriptors that arrive with the message, in this order: kernel, initramfs, console (written to by the
/// worker, one line of the guest's console a line), one for each of `disks`, then for each of `nics` its taps and, if it
/// asks for them, its vhost-net devices (see [`NicConfig`]), then one for each of `file_servers`. At most [`MAX_FDS`] in all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual processors at the start, 1 to 255.
    pub vcpus: u8,
    /// The most that the VM may be given later ([`crate::control::Call::Resize`]), at least `vcpus`. Each costs the guest
    /// memory of its own kernel, whether it is there or not.
    pub max_vcpus: u8,
    /// Guest memory at the start, in MiB.
    pub memory_mib: u32,
    /// The most that the VM may be given later, at least `memory_mib`. What is not given costs addresses only.
    pub max_memory_mib: u32,
    /// Added at the end of the kernel's command line.
    pub kernel_params: String,
    /// The folders.
    pub shares: Vec<ShareConfig>,
    /// The virtio-blk devices; the n-th takes the n-th descriptor after the console's.
    pub disks: Vec<DiskConfig>,
    /// The virtio-net devices.
    pub nics: Vec<NicConfig>,
    /// The folders that other processes serve, which may use all of the guest's memory.
    pub file_servers: Vec<FileServerConfig>,
    /// Context identifier of the guest on its vsock device, 3 or more.
    pub guest_cid: u32,
    /// Port on the host to which the guest may connect, once, to say that it is ready.
    pub ready_port: u32,
}

/// A folder that the guest has by a device of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The tag by which the guest mounts it, at most 36 bytes of UTF-8 (virtio 1.3, 5.11.4).
    pub tag: String,
    /// The folder, an absolute path in the worker's mount namespace before it is jailed.
    pub path: std::path::PathBuf,
    /// How far the guest relies on what it has read before.
    pub cache: CachePolicy,
    /// By which device.
    pub protocol: ShareProtocol,
    /// What of it is watched, so that the guest can be told what others change. With FUSE only, and of one share at most.
    pub watch: Option<WatchConfig>,
}

/// A folder that the guest has by a virtio-fs device whose requests another process serves, by vhost-user.
///
/// Its descriptor is a stream socket that is connected to this process. The VM ends with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileServerConfig {
    /// As [`ShareConfig::tag`].
    pub tag: String,
}

/// What is watched of a shared folder, and how the guest's kernel is told of changes.
///
/// The worker tells of changes ([`crate::control::Event::FilesChanged`]). Whoever is to raise their events in the guest does
/// the same once more there, on a mount of the share, as root with one of these file system group ids, and nothing is
/// done: the request is answered as if it had been. Requests of these groups never change anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchConfig {
    /// The names in the folder's root that begin so are watched, with all that is below.
    pub prefix: String,
    /// The groups.
    pub gids: NoticeGids,
}

/// The group of each kind of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoticeGids {
    /// A file's content or attributes: set its times, or open it for writing.
    pub changed: u32,
    /// A name that there was not: make what is there.
    pub created: u32,
    /// A name that is no more, of anything but a folder: remove it.
    pub gone_file: u32,
    /// The same, of a folder.
    pub gone_folder: u32,
    /// A name that has become another, of anything but a folder: rename it. What came from elsewhere is renamed from any name
    /// in the folder's root that is nobody's, and what went elsewhere to one.
    pub moved_file: u32,
    /// The same, of a folder.
    pub moved_folder: u32,
}

#[cfg(any(test, feature = "fuzzing"))]
impl NoticeGids {
    /// Groups for a test: 1 to 6.
    pub const EXAMPLE: Self = Self {
        changed: 1,
        created: 2,
        gone_file: 3,
        gone_folder: 4,
        moved_file: 5,
        moved_folder: 6,
    };
}

/// What guest and worker speak of a shared folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum ShareProtocol {
    /// FUSE: virtio-fs.
    Fuse {
        /// The guest keeps what is written until `fsync`, `close` or its kernel finds the time to tell the worker, and
        /// decides on times and lengths of files itself. Without effect where nothing is kept ([`CachePolicy::None`]).
        writeback: bool,
        /// The size of the DAX window, in which the guest has files mapped instead of asking for what they hold, rounded up to
        /// an even number. None if zero.
        dax_window_mib: u32,
    },
    /// 9P2000.L: the 9P transport.
    P9,
}

/// How far the guest relies on what it has read before of a shared folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// On the content of a file until it is opened again, on names and attributes for a second.
    Auto,
    /// Not at all: whatever is read is asked for.
    None,
    /// As if nobody else changed the folder.
    Always,
}

/// A virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// What VIRTIO_BLK_T_GET_ID answers, at most 20 bytes of ASCII: the guest finds the disk by it.
    pub serial: String,
    /// Refuses writes (VIRTIO_BLK_F_RO).
    pub read_only: bool,
}

/// A virtio-net device.
///
/// Its descriptors are `queue_pairs` queues of one tap, and, with `vhost`, as many open `/dev/vhost-net`. The tap has
/// packet headers and no packet information (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR), and more than one queue only with
/// IFF_MULTI_QUEUE. The length of the headers and the offloads are the device's to set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// The guest's address on it, by which the guest finds it too: a unicast address that no other has.
    pub mac: [u8; 6],
    /// Largest packet of layer 3 that the guest may send, 68 to 65535 bytes.
    pub mtu: u16,
    /// Pairs of a receive and a transmit queue, 1 to 16.
    pub queue_pairs: u8,
    /// The host's kernel moves the packets (vhost-net) instead of the worker's threads.
    pub vhost: bool,
}

/// A device that can be added to a VM while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// Comes with one descriptor.
    Disk(DiskConfig),
    /// Comes with the descriptors that [`NicConfig`] says.
    Nic(NicConfig),
}

/// Which device: what the guest knows it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceId {
    /// The disk with this serial.
    Disk {
        /// [`DiskConfig::serial`].
        serial: String,
    },
    /// The network device with this address.
    Nic {
        /// [`NicConfig::mac`].
        mac: [u8; 6],
    },
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { serial } => write!(f, "disk {serial:?}"),
            Self::Nic { mac } => write!(f, "network device {}", format_mac(mac)),
        }
    }
}

/// Why a [`VmConfig`] or a [`DeviceConfig`] cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A VM has at least one vCPU.
    #[error("vcpus must be 1 to 255, not 0")]
    NoVcpus,
    /// Too little memory to boot, or more than the address map has room for.
    #[error("memory_mib must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}, not {memory_mib}")]
    MemorySize {
        /// What was asked for.
        memory_mib: u32,
    },
    /// The VM starts with more vCPUs than it may ever have.
    #[error("max_vcpus must be {vcpus} (vcpus) or more, not {max_vcpus}")]
    MaxVcpus {
        /// At the start.
        vcpus: u8,
        /// What was asked for.
        max_vcpus: u8,
    },
    /// The VM starts with more memory than it may ever have, or may have more than the address map has room for.
    #[error(
        "max_memory_mib must be {memory_mib} (memory_mib) to {MAX_MEMORY_MIB}, not {max_memory_mib}"
    )]
    MaxMemorySize {
        /// At the start.
        memory_mib: u32,
        /// What was asked for.
        max_memory_mib: u32,
    },
    /// The guest's context identifier is one of those with a meaning.
    #[error("guest_cid must be 3 to {max}, not {guest_cid}", max = u32::MAX - 1)]
    GuestCid {
        /// What was asked for.
        guest_cid: u32,
    },
    /// A tag does not fit the virtio-fs device, or is used twice.
    #[error("the tag {tag:?} of a share must be 1 to 36 bytes, and unlike the others")]
    ShareTag {
        /// The tag.
        tag: String,
    },
    /// What the guest's kernel keeps of each page of a DAX window would leave it too little memory.
    #[error(
        "a DAX window of {dax_window_mib} MiB takes a sixty-fourth of its size from the VM's memory, which is more than a quarter of {memory_mib} MiB: make it smaller"
    )]
    WindowSize {
        /// What was asked for.
        dax_window_mib: u32,
        /// At the start.
        memory_mib: u32,
    },
    /// A window is mapped by the worker, and no memory that another process could have.
    #[error("a VM with a file server can have no DAX window")]
    WindowBesideServer,
    /// What cannot be watched: a second share, or one by 9P.
    #[error("of the shares, one may be watched, and by FUSE only")]
    Watch,
    /// A serial does not fit the virtio-blk device, or is used twice.
    #[error(
        "the serial {serial:?} of a disk must be 1 to 20 bytes of ASCII, and unlike the others"
    )]
    DiskSerial {
        /// The serial.
        serial: String,
    },
    /// The descriptors beside the description are not those that it names.
    #[error("the VM has {disks} disks, but {files} files were given for them")]
    DiskFiles {
        /// Disks in the description.
        disks: usize,
        /// Files given.
        files: usize,
    },
    /// An address is not one that a device can have, or is used twice.
    #[error(
        "the address {} of a network device must be a unicast one, and unlike the others",
        format_mac(mac)
    )]
    NicAddress {
        /// The address.
        mac: [u8; 6],
    },
    /// The MTU is below what virtio (1.3, 5.1.4.1) and IPv4 allow.
    #[error("the mtu of a network device must be {MIN_MTU} to 65535, not {mtu}")]
    NicMtu {
        /// What was asked for.
        mtu: u16,
    },
    /// Too few or too many queues.
    #[error("queue_pairs of a network device must be 1 to {MAX_QUEUE_PAIRS}, not {queue_pairs}")]
    NicQueuePairs {
        /// What was asked for.
        queue_pairs: u8,
    },
    /// The descriptors of all devices do not fit one message.
    #[error("the VM would need {files} descriptors, and at most {MAX_FDS} can be given")]
    TooManyFiles {
        /// What was asked for.
        files: usize,
    },
    /// The descriptors beside the description are not those that it names.
    #[error("the VM has {nics} network devices, but other descriptors were given for them")]
    NicFiles {
        /// Network devices in the description.
        nics: usize,
    },
    /// The descriptors beside the description are not those that it names.
    #[error("the VM has {servers} file servers, but {files} sockets were given for them")]
    ServerFiles {
        /// File servers in the description.
        servers: usize,
        /// Sockets given.
        files: usize,
    },
    /// The descriptors beside the description are not those that it names.
    #[error("a {device} needs {needed} descriptors, but {given} were given")]
    DeviceFiles {
        /// What is described.
        device: DeviceId,
        /// As the description says.
        needed: usize,
        /// Those beside it.
        given: usize,
    },
}

/// Less does not hold a kernel.
const MIN_MEMORY_MIB: u32 = 32;
/// 8 TiB, far from the end of any processor's physical addresses.
const MAX_MEMORY_MIB: u32 = 8 << 20;
/// Longest tag (virtio 1.3, 5.11.4).
const MAX_TAG_LEN: usize = 36;
/// Longest serial (virtio 1.3, 5.2.6).
const MAX_SERIAL_LEN: usize = 20;
/// Linux keeps 64 bytes for each page of 4 KiB, of a DAX window as well.
const PAGES_PER_DESCRIPTOR: u32 = 64;
/// What every VM has: kernel, initramfs, console.
const COMMON_FILES: usize = 3;
/// Smallest MTU (virtio 1.3, 5.1.4.1).
const MIN_MTU: u16 = 68;
/// As many as have a thread each without hurting; a pod with more processors does not gain from more.
const MAX_QUEUE_PAIRS: u8 = 16;

/// An address as people write it.
pub(crate) fn format_mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl DiskConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let Self { serial, .. } = self;
        if !(1..=MAX_SERIAL_LEN).contains(&serial.len()) || !serial.is_ascii() {
            return Err(ConfigError::DiskSerial {
                serial: serial.clone(),
            });
        }
        Ok(())
    }
}

impl DeviceConfig {
    /// What the guest knows it by.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        match self {
            Self::Disk(disk) => DeviceId::Disk {
                serial: disk.serial.clone(),
            },
            Self::Nic(nic) => DeviceId::Nic { mac: nic.mac },
        }
    }

    /// Descriptors that come with it.
    #[must_use]
    pub fn files(&self) -> usize {
        match self {
            Self::Disk(_) => 1,
            Self::Nic(nic) => nic.files(),
        }
    }

    /// Checks it alone, and that `given` descriptors are what it needs.
    pub(crate) fn validate(&self, given: usize) -> Result<(), ConfigError> {
        match self {
            Self::Disk(disk) => disk.validate()?,
            Self::Nic(nic) => nic.validate()?,
        }
        let needed = self.files();
        if given != needed {
            return Err(ConfigError::DeviceFiles {
                device: self.id(),
                needed,
                given,
            });
        }
        Ok(())
    }

    /// For a device that has the id of another.
    pub(crate) fn taken(&self) -> ConfigError {
        match self {
            Self::Disk(disk) => ConfigError::DiskSerial {
                serial: disk.serial.clone(),
            },
            Self::Nic(nic) => ConfigError::NicAddress { mac: nic.mac },
        }
    }
}

impl NicConfig {
    /// Descriptors that come with it: taps, then vhost-net devices.
    pub(crate) fn files(&self) -> usize {
        usize::from(self.queue_pairs) * if self.vhost { 2 } else { 1 }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let Self {
            mac,
            mtu,
            queue_pairs,
            ..
        } = *self;
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(ConfigError::NicAddress { mac });
        }
        if mtu < MIN_MTU {
            return Err(ConfigError::NicMtu { mtu });
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&queue_pairs) {
            return Err(ConfigError::NicQueuePairs { queue_pairs });
        }
        Ok(())
    }
}

impl VmConfig {
    /// Checks what one field, or two together, can get wrong.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.vcpus == 0 {
            return Err(ConfigError::NoVcpus);
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(ConfigError::MemorySize {
                memory_mib: self.memory_mib,
            });
        }
        if self.max_vcpus < self.vcpus {
            return Err(ConfigError::MaxVcpus {
                vcpus: self.vcpus,
                max_vcpus: self.max_vcpus,
            });
        }
        if !(self.memory_mib..=MAX_MEMORY_MIB).contains(&self.max_memory_mib) {
            return Err(ConfigError::MaxMemorySize {
                memory_mib: self.memory_mib,
                max_memory_mib: self.max_memory_mib,
            });
        }
        if !(3..u32::MAX).contains(&self.guest_cid) {
            return Err(ConfigError::GuestCid {
                guest_cid: self.guest_cid,
            });
        }
        let mut tags = BTreeSet::new();
        let of_shares = self.shares.iter().map(|share| &share.tag);
        let of_servers = self.file_servers.iter().map(|server| &server.tag);
        for tag in of_shares.chain(of_servers) {
            if tag.is_empty() || tag.len() > MAX_TAG_LEN || !tags.insert(tag) {
                return Err(ConfigError::ShareTag { tag: tag.clone() });
            }
        }
        for ShareConfig { protocol, .. } in &self.shares {
            let ShareProtocol::Fuse { dax_window_mib, .. } = *protocol else {
                continue;
            };
            if dax_window_mib / PAGES_PER_DESCRIPTOR > self.memory_mib / 4 {
                return Err(ConfigError::WindowSize {
                    dax_window_mib,
                    memory_mib: self.memory_mib,
                });
            }
            if dax_window_mib > 0 && !self.file_servers.is_empty() {
                return Err(ConfigError::WindowBesideServer);
            }
        }
        let mut watched = self.shares.iter().filter(|share| share.watch.is_some());
        let by_fuse = |share: &ShareConfig| matches!(share.protocol, ShareProtocol::Fuse { .. });
        if !watched.next().is_none_or(by_fuse) || watched.next().is_some() {
            return Err(ConfigError::Watch);
        }
        let mut serials = BTreeSet::new();
        for disk in &self.disks {
            disk.validate()?;
            if !serials.insert(&disk.serial) {
                return Err(ConfigError::DiskSerial {
                    serial: disk.serial.clone(),
                });
            }
        }
        let mut addresses = BTreeSet::new();
        for nic in &self.nics {
            nic.validate()?;
            if !addresses.insert(nic.mac) {
                return Err(ConfigError::NicAddress { mac: nic.mac });
            }
        }
        let files = COMMON_FILES
            + self.disks.len()
            + self.nics.iter().map(NicConfig::files).sum::<usize>()
            + self.file_servers.len();
        if files > MAX_FDS {
            return Err(ConfigError::TooManyFiles { files });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 512,
            max_memory_mib: 512,
            kernel_params: String::new(),
            shares: Vec::new(),
            disks: Vec::new(),
            nics: Vec::new(),
            file_servers: Vec::new(),
            guest_cid: 3,
            ready_port: 1024,
        }
    }

    fn after(change: impl FnOnce(&mut VmConfig)) -> Result<(), ConfigError> {
        let mut config = config();
        change(&mut config);
        config.validate()
    }

    #[test]
    fn a_plain_description_is_taken() {
        assert_eq!(config().validate(), Ok(()));
    }

    #[test]
    fn sizes_and_identifiers_have_limits() {
        assert!(after(|c| c.vcpus = 0).is_err());
        assert!(after(|c| c.memory_mib = 31).is_err());
        assert!(after(|c| c.memory_mib = u32::MAX).is_err());
        assert!(after(|c| c.max_vcpus = u8::MAX).is_ok());
        assert!(after(|c| c.vcpus = 2).is_err());
        assert!(after(|c| c.max_memory_mib = 1 << 20).is_ok());
        assert!(after(|c| c.max_memory_mib = 511).is_err());
        assert!(after(|c| c.max_memory_mib = u32::MAX).is_err());
        assert!(after(|c| c.guest_cid = 2).is_err());
        assert!(after(|c| c.guest_cid = u32::MAX).is_err());
    }

    #[test]
    fn a_window_leaves_the_guest_most_of_its_memory() {
        let with = |dax_window_mib| {
            after(|c| {
                c.shares = vec![ShareConfig {
                    tag: "a".to_owned(),
                    path: "/".into(),
                    cache: CachePolicy::Auto,
                    protocol: ShareProtocol::Fuse {
                        writeback: false,
                        dax_window_mib,
                    },
                    watch: None,
                }];
            })
        };
        assert!(with(0).is_ok());
        assert!(with(8192).is_ok());
        assert_eq!(
            with(8320),
            Err(ConfigError::WindowSize {
                dax_window_mib: 8320,
                memory_mib: 512
            })
        );
        assert!(with(u32::MAX).is_err());
    }

    #[test]
    fn tags_and_serials_fit_and_differ() {
        let share = |tag: &str| ShareConfig {
            tag: tag.to_owned(),
            path: "/".into(),
            cache: CachePolicy::Auto,
            protocol: ShareProtocol::P9,
            watch: None,
        };
        let disk = |serial: &str| DiskConfig {
            serial: serial.to_owned(),
            read_only: false,
        };
        assert!(after(|c| c.shares = vec![share("a"), share("b")]).is_ok());
        assert!(after(|c| c.shares = vec![share("a"), share("a")]).is_err());
        assert!(after(|c| c.shares = vec![share("")]).is_err());
        assert!(after(|c| c.shares = vec![share(&"x".repeat(37))]).is_err());
        assert!(after(|c| c.disks = vec![disk("a"), disk("b")]).is_ok());
        assert!(after(|c| c.disks = vec![disk("a"), disk("a")]).is_err());
        assert!(after(|c| c.disks = vec![disk(&"x".repeat(21))]).is_err());
        assert!(after(|c| c.disks = vec![disk("ä")]).is_err());
    }

    #[test]
    fn one_share_is_watched_and_by_fuse() {
        let share = |tag: &str, protocol| ShareConfig {
            tag: tag.to_owned(),
            path: "/".into(),
            cache: CachePolicy::Auto,
            protocol,
            watch: Some(WatchConfig {
                prefix: ".volume-".to_owned(),
                gids: NoticeGids::EXAMPLE,
            }),
        };
        let fuse = ShareProtocol::Fuse {
            writeback: false,
            dax_window_mib: 0,
        };
        assert!(after(|c| c.shares = vec![share("a", fuse)]).is_ok());
        let by_9p = after(|c| c.shares = vec![share("a", ShareProtocol::P9)]);
        assert_eq!(by_9p, Err(ConfigError::Watch));
        let two = after(|c| c.shares = vec![share("a", fuse), share("b", fuse)]);
        assert_eq!(two, Err(ConfigError::Watch));
    }

    #[test]
    fn network_devices_have_limits_and_differ() {
        let nic = |last| NicConfig {
            mac: [2, 0, 0, 0, 0, last],
            mtu: 1500,
            queue_pairs: 2,
            vhost: true,
        };
        let one = |change: fn(&mut NicConfig)| {
            let mut nic = nic(1);
            change(&mut nic);
            after(|c| c.nics = vec![nic])
        };
        assert!(after(|c| c.nics = vec![nic(1), nic(2)]).is_ok());
        assert!(after(|c| c.nics = vec![nic(1), nic(1)]).is_err());
        assert!(one(|nic| nic.mac = [0; 6]).is_err());
        assert!(one(|nic| nic.mac[0] = 3).is_err());
        assert!(one(|nic| nic.mtu = 67).is_err());
        assert!(one(|nic| nic.mtu = 68).is_ok());
        assert!(one(|nic| nic.queue_pairs = 0).is_err());
        assert!(one(|nic| nic.queue_pairs = 16).is_ok());
        assert!(one(|nic| nic.queue_pairs = 17).is_err());
    }

    #[test]
    fn devices_that_are_added_are_checked_with_their_descriptors() {
        let disk = |serial: &str| {
            DeviceConfig::Disk(DiskConfig {
                serial: serial.to_owned(),
                read_only: false,
            })
        };
        let nic = |mtu| {
            DeviceConfig::Nic(NicConfig {
                mac: [2, 0, 0, 0, 0, 1],
                mtu,
                queue_pairs: 2,
                vhost: true,
            })
        };
        assert_eq!(disk("a").validate(1), Ok(()));
        assert_eq!(nic(1500).validate(4), Ok(()));
        assert!(disk("").validate(1).is_err());
        assert!(nic(67).validate(4).is_err());
        assert_eq!(
            disk("a").validate(2).unwrap_err().to_string(),
            "a disk \"a\" needs 1 descriptors, but 2 were given"
        );
        assert!(nic(1500).validate(2).is_err());
    }

    #[test]
    fn all_descriptors_fit_one_message() {
        let nics = |count| -> Vec<_> {
            let nic = |last| NicConfig {
                mac: [2, 0, 0, 0, 0, last],
                mtu: 1500,
                queue_pairs: 1,
                vhost: false,
            };
            (0..count).map(nic).collect()
        };
        assert!(after(|c| c.nics = nics(61)).is_ok());
        assert_eq!(
            after(|c| c.nics = nics(62)),
            Err(ConfigError::TooManyFiles { files: 65 })
        );
    }

    #[test]
    fn errors_name_the_address_as_people_write_it() {
        let mac = [0x03, 0, 0, 0, 0xab, 1];
        assert_eq!(
            ConfigError::NicAddress { mac }.to_string(),
            "the address 03:00:00:00:ab:01 of a network device must be a unicast one, and unlike the others"
        );
    }
}
