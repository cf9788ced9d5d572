//! The host's end: one queue of a tap, and what is asked of it beside packets.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::device::HEADER_LEN;

/// The segmentation of UDP, for IPv4 and IPv6 together; kernels before 6.2 have none.
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// One queue of a tap. Packets are read and written through its descriptor, each behind a header of virtio-net's.
pub(super) trait Tap: AsFd + Send + Sync + fmt::Debug {
    /// Lets the tap give packets as the driver takes them: unsegmented or without a checksum (TUN_F_*). Holds for all
    /// queues of the tap.
    fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()>;

    /// Whether the tap puts packets into this queue.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;
}

/// A tap of the kernel's (Documentation/networking/tuntap.rst).
#[derive(Debug)]
pub(super) struct KernelTap {
    fd: OwnedFd,
    enabled: AtomicBool,
}

impl KernelTap {
    /// Takes over a descriptor that was made as [`crate::config::NicConfig`] says.
    pub(super) fn new(fd: OwnedFd, multi_queue: bool) -> io::Result<Self> {
        let mut request = interface_request(0);
        // SAFETY: TUNGETIFF fills an ifreq.
        done(unsafe { ioctl_with_mut_ref(&fd, libc::TUNGETIFF, &mut request) })?;
        // SAFETY: TUNGETIFF has written the flags, and any bits are a valid integer.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let queues = if multi_queue {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        };
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
        if flags & wanted != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("it has the flags {flags:#x}, and {wanted:#x} are needed"),
            ));
        }
        let len = libc::c_int::try_from(HEADER_LEN).expect("a header is short");
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        done(unsafe { ioctl_with_ref(&fd, libc::TUNSETVNETHDRSZ, &len) })?;
        // virtio 1 is little-endian wherever it runs.
        // SAFETY: TUNSETVNETLE reads an int.
        done(unsafe { ioctl_with_ref(&fd, libc::TUNSETVNETLE, &1_i32) })?;
        let status = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, status | OFlags::NONBLOCK)?;
        Ok(Self {
            fd,
            enabled: AtomicBool::new(true),
        })
    }

    /// Whether the kernel segments UDP. Leaves the tap without offloads.
    pub(super) fn has_uso(&self) -> io::Result<bool> {
        let has = self.set_offloads(libc::TUN_F_CSUM | USO).is_ok();
        self.set_offloads(0)?;
        Ok(has)
    }
}

impl AsFd for KernelTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for KernelTap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Tap for KernelTap {
    fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        done(unsafe { ioctl_with_val(self, libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        // The kernel refuses what is so already.
        if self.enabled.load(Ordering::Acquire) == enabled {
            return Ok(());
        }
        let request = interface_request(if enabled {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        });
        // SAFETY: TUNSETQUEUE reads an ifreq.
        done(unsafe { ioctl_with_ref(self, libc::TUNSETQUEUE, &request) })?;
        self.enabled.store(enabled, Ordering::Release);
        Ok(())
    }
}

fn interface_request(flags: libc::c_int) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags).expect("flags have 16 bits"),
        },
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
