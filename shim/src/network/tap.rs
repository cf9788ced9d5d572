//! The device files behind a guest's virtio-net device: the queues of a tap, and vhost-net.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc::{self, c_char, c_short, ifreq};

/// The host's datapath.
const VHOST_NET: &str = "/dev/vhost-net";

const TUN: &str = "/dev/net/tun";

/// The kernel puts the first free number in the place of `%d`.
const TEMPLATE: &CStr = c"tap%d_husk";

/// A tap of the namespace that the caller is in. It is there as long as one of its queues is open.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) name: String,
    pub(super) queues: Vec<OwnedFd>,
}

/// Whether an interface of this name is a tap of ours.
pub(super) fn is_ours(name: &str) -> bool {
    name.strip_prefix("tap")
        .and_then(|rest| rest.strip_suffix("_husk"))
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Makes a tap in the namespace of the calling thread.
pub(super) fn open(queues: usize) -> io::Result<Tap> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: c_short::try_from(flags).map_err(io::Error::other)?,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(TEMPLATE.to_bytes()) {
        *to = c_char::from_ne_bytes([*from]);
    }
    // The first request makes the tap and says its name; the others, with that name, add queues to it.
    let queues = (0..queues)
        .map(|_| {
            let file = open_device(TUN)?;
            // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is, and keeps no reference to it.
            unsafe { set_interface(file.as_raw_fd(), &raw mut request) }?;
            Ok(file.into())
        })
        .collect::<io::Result<_>>()?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| byte.to_ne_bytes()[0])
        .take_while(|&byte| byte != 0)
        .collect();
    Ok(Tap {
        name: String::from_utf8_lossy(&name).into_owned(),
        queues,
    })
}

/// One pair of queues of the host's datapath.
pub(super) fn open_vhost() -> io::Result<OwnedFd> {
    open_device(VHOST_NET).map(OwnedFd::from)
}

fn open_device(path: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

nix::ioctl_readwrite_bad!(
    /// TUNSETIFF, see linux/if_tun.h.
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    ifreq
);
