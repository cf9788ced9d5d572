//! The DAX window (virtio 1.3, 5.11.6.3): the device's shared memory region 0, in which the guest has files mapped that it
//! then reads and writes without a request. The library opens the file anew by the inode, with the rights that the request
//! asks for: what cannot be opened to be written is not mapped to be written.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::transport::FsCacheReqHandler;

use crate::virtio::SharedMemory;

/// What FUSE_SETUPMAPPING and FUSE_REMOVEMAPPING change.
#[derive(Debug)]
pub(super) struct Window(pub(super) Arc<SharedMemory>);

impl FsCacheReqHandler for Window {
    fn map(
        &mut self,
        foffset: u64,
        moffset: u64,
        len: u64,
        flags: u64,
        fd: RawFd,
    ) -> io::Result<()> {
        let writable = flags & SetupmappingFlags::WRITE.bits() != 0;
        // SAFETY: the library's caller has the file open for as long as this call lasts.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        self.0.map(moffset, len, file, foffset, writable)
    }

    fn unmap(&mut self, requests: Vec<RemovemappingOne>) -> io::Result<()> {
        requests
            .iter()
            .try_for_each(|request| self.0.unmap(request.moffset, request.len))
    }
}
