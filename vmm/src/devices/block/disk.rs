//! Where a disk's bytes are: [`Storage`] is the seam, [`Disk`] a file or a block device behind it.
//!
//! Offsets and lengths are in bytes and have been checked against the capacity.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, seek};

use super::ring::{Engine, Ring};
use crate::virtio::queue::{Readable, Writable};

/// Unit of capacity, addresses and lengths, whatever the block size (virtio 1.3, 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Block devices and file systems work in units of at least this size, and do so faster when asked in such units.
const USUAL_PHYSICAL_BLOCK: u32 = 4096;

/// BLKDISCARD of linux/fs.h, which libc does not have.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// BLKZEROOUT of linux/fs.h.
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// What a disk can do.
pub(super) trait Storage: Send + Sync + fmt::Debug {
    /// Fills `room` from its start on, and takes away what is filled. Returns how many bytes that is: none past the end.
    fn read(&self, room: &mut Writable<'_>, offset: u64) -> io::Result<usize>;
    /// Writes `data` from its start on, and takes away what is written. Returns how many bytes that is.
    fn write(&self, data: &mut Readable<'_>, offset: u64) -> io::Result<usize>;
    /// Returns when everything that was written before is durable.
    fn flush(&self) -> io::Result<()>;
    /// Gives up the range; what it reads as afterwards is open.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes the range read as zeroes; gives its blocks up if `unmap` and possible.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// What does up to `capacity` reads, writes and flushes of it at a time.
    fn engine(&self, capacity: u16) -> io::Result<Box<dyn Engine>>;
}

/// Sizes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Capacity in sectors.
    pub(super) sectors: u64,
    /// Bytes that are addressed together.
    pub(super) logical_block: u32,
    /// Bytes that are best written together: a power of two times the logical block.
    pub(super) physical_block: u32,
}

/// A regular file or a block device.
#[derive(Debug)]
pub(super) struct Disk {
    file: Arc<OwnedFd>,
    is_device: bool,
}

impl Disk {
    /// Looks at what `file` is, and how large.
    pub(super) fn new(file: OwnedFd) -> io::Result<(Self, Geometry)> {
        let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            return Err(io::Error::from_raw_os_error(libc::ENOTBLK));
        }
        let len = seek(&file, SeekFrom::End(0))?;
        let (logical, physical) = if is_device {
            (
                rustix::fs::ioctl_blksszget(&file)?,
                rustix::fs::ioctl_blkpbszget(&file)?,
            )
        } else {
            (512, USUAL_PHYSICAL_BLOCK)
        };
        let geometry = Geometry {
            sectors: len / SECTOR,
            logical_block: logical,
            physical_block: physical.max(logical),
        };
        let file = Arc::new(file);
        Ok((Self { file, is_device }, geometry))
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(
            &self.file,
            flags | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )?)
    }

    /// One of the requests of block devices that take a range.
    fn range_ioctl(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: both requests read two u64, and the array outlives the call. They change the disk, which is ours.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw const range) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Writes zeroes the long way, for file systems that cannot do better (tmpfs).
    fn write_plain_zeroes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
        let end = offset + len;
        while offset < end {
            let count =
                usize::try_from(end - offset).map_or(ZEROES.len(), |rest| rest.min(ZEROES.len()));
            let written = rustix::io::retry_on_intr(|| {
                rustix::io::pwrite(&self.file, &ZEROES[..count], offset)
            })?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += written as u64;
        }
        Ok(())
    }
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Whether the host cannot do what was asked, as opposed to has failed to.
pub(super) fn is_unsupported(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

impl Storage for Disk {
    fn read(&self, room: &mut Writable<'_>, offset: u64) -> io::Result<usize> {
        room.read_from_at(self.file.as_fd(), position(offset)?)
    }

    fn write(&self, data: &mut Readable<'_>, offset: u64) -> io::Result<usize> {
        data.write_to_at(self.file.as_fd(), position(offset)?)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device {
            self.range_ioctl(BLKDISCARD, offset, len)
        } else {
            self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        // The kernel takes a hole in a block device for zeroes without blocks.
        let best = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match self.fallocate(best, offset, len) {
            Err(err) if is_unsupported(&err) => {}
            result => return result,
        }
        if self.is_device {
            self.range_ioctl(BLKZEROOUT, offset, len)
        } else {
            self.write_plain_zeroes(offset, len)
        }
    }

    fn engine(&self, capacity: u16) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(Ring::new(Arc::clone(&self.file), capacity)?))
    }
}
