//! What a VM is made of. It crosses the control socket as JSON; descriptors travel beside it.

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
