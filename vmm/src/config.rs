//! What a VM is made of. It crosses the control socket as JSON; descriptors travel beside it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The description of one virtual machine.
///
/// Files are descriptors that arrive with the message, in this order: kernel, initramfs, console (written to by the
/// worker, one line of the guest's console a line), one for each of `disks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual processors, 1 to 255.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Added at the end of the kernel's command line.
    pub kernel_params: String,
    /// The virtio-fs devices.
    pub shares: Vec<ShareConfig>,
    /// The virtio-blk devices; the n-th takes the n-th descriptor after the console's.
    pub disks: Vec<DiskConfig>,
    /// Context identifier of the guest on its vsock device, 3 or more.
    pub guest_cid: u32,
    /// Port on the host to which the guest may connect, once, to say that it is ready.
    pub ready_port: u32,
}

/// A folder shared over virtio-fs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The tag by which the guest mounts it, at most 36 bytes of UTF-8 (virtio 1.3, 5.11.4).
    pub tag: String,
    /// The folder, an absolute path in the worker's mount namespace before it is jailed.
    pub path: std::path::PathBuf,
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

/// Why a [`VmConfig`] cannot be used.
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
}

/// Less does not hold a kernel.
const MIN_MEMORY_MIB: u32 = 32;
/// 8 TiB, far from the end of any processor's physical addresses.
const MAX_MEMORY_MIB: u32 = 8 << 20;
/// Longest tag (virtio 1.3, 5.11.4).
const MAX_TAG_LEN: usize = 36;
/// Longest serial (virtio 1.3, 5.2.6).
const MAX_SERIAL_LEN: usize = 20;

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
        if !(3..u32::MAX).contains(&self.guest_cid) {
            return Err(ConfigError::GuestCid {
                guest_cid: self.guest_cid,
            });
        }
        let mut tags = BTreeSet::new();
        for ShareConfig { tag, .. } in &self.shares {
            if tag.is_empty() || tag.len() > MAX_TAG_LEN || !tags.insert(tag) {
                return Err(ConfigError::ShareTag { tag: tag.clone() });
            }
        }
        let mut serials = BTreeSet::new();
        for DiskConfig { serial, .. } in &self.disks {
            let fits = (1..=MAX_SERIAL_LEN).contains(&serial.len()) && serial.is_ascii();
            if !fits || !serials.insert(serial) {
                return Err(ConfigError::DiskSerial {
                    serial: serial.clone(),
                });
            }
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
            memory_mib: 512,
            kernel_params: String::new(),
            shares: Vec::new(),
            disks: Vec::new(),
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
        assert!(after(|c| c.guest_cid = 2).is_err());
        assert!(after(|c| c.guest_cid = u32::MAX).is_err());
    }

    #[test]
    fn tags_and_serials_fit_and_differ() {
        let share = |tag: &str| ShareConfig {
            tag: tag.to_owned(),
            path: "/".into(),
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
}
