//! What the shim and husk-agent agree on: the ttrpc service `husk.agent.v1` (generated from `proto/agent.proto`), the
//! vsock ports, and the name and place of the shared folder. Beside it, the part of CRI's messages that the shim reads
//! (generated from `proto/cri.proto`).

mod generated {
    #![allow(
        missing_docs,
        unreachable_pub,
        missing_debug_implementations,
        clippy::all,
        clippy::needless_pass_by_value,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        reason = "generated code; its documentation is in proto/"
    )]
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::agent;
pub use generated::agent_ttrpc;
pub use generated::cri;

/// Context identifier of the host on a virtio-vsock device (virtio 1.3, 5.10.4).
pub const HOST_CID: u32 = 2;

/// Context identifier of the guest. Every VM has a device and an address space of its own, so all use the same.
pub const GUEST_CID: u32 = 3;

/// Port on the host to which the agent connects once it listens on all of its own: the one connection that a guest may open. It carries no data; that it is made is the news.
pub const READY_PORT: u32 = 1024;

/// Port in the guest on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;

/// Port in the guest that takes the standard streams, one connection each.
pub const STREAM_PORT: u32 = 1025;

/// Port in the guest that takes connections to be forwarded to a TCP port of the pod, each begun by its number.
pub const FORWARD_PORT: u32 = 1026;

/// What the agent says first on a connection to [`FORWARD_PORT`], when the TCP port has accepted it.
pub const FORWARD_CONNECTED: u8 = 1;

/// Tag of the virtio-fs device that shares the pod's folder.
pub const SHARE_TAG: &str = "husk";

/// Where the agent mounts the shared folder, in its own mount namespace.
pub const SHARE_MOUNT_POINT: &str = "/run/husk/share";

/// Where the agent keeps the namespaces of the pod's sandbox, each under the name that it has in proc(5): `ipc`, `pid`,
/// `uts`.
pub const POD_NAMESPACES: &str = "/run/husk/pod/ns";

/// Where the agent mounts the root file systems that are on disks, each in a folder with the container's id.
pub const DISK_MOUNTS: &str = "/run/husk/disks";

/// The file systems for disks that the guest's kernel has, by their names for mount(8), and whether it can write to them.
pub const GUEST_FILE_SYSTEMS: [(&str, bool); 4] = [
    ("ext4", true),
    ("xfs", true),
    ("erofs", false),
    ("squashfs", false),
];

/// Where the volumes are that are the guest's own, each in a folder that the shim names.
pub const POD_VOLUMES: &str = "/run/husk/pod/volumes";

/// The file system group ids by which the agent tells the guest's kernel what the host has changed: what root does in the
/// shared folder with one of them is answered by the host as if it had been done, and is not done. Nobody gives ids of this
/// range to groups.
pub mod notice {
    /// To set the times of a file, or to open it for writing.
    pub const CHANGED: u32 = 0xf000_4e00;
    /// To make what the host has made.
    pub const CREATED: u32 = 0xf000_4e01;
    /// To remove what is no more, other than a folder.
    pub const GONE_FILE: u32 = 0xf000_4e02;
    /// To remove a folder that is no more.
    pub const GONE_FOLDER: u32 = 0xf000_4e03;
    /// To rename what has been renamed, other than a folder.
    pub const MOVED_FILE: u32 = 0xf000_4e04;
    /// To rename a folder that has been renamed.
    pub const MOVED_FOLDER: u32 = 0xf000_4e05;
}
