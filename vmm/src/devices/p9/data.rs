//! The data of reads and writes, which goes between guest memory and files of the host without a copy.

use std::io;

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::common::file_buf::FileVolatileSlice;
use fuse_backend_rs::common::file_traits::FileReadWriteVolatile;

use crate::virtio::queue::{Readable, Writable};

/// What a write writes, straight from guest memory.
pub(super) struct Data<'d, 'm>(pub(super) &'d mut Readable<'m>);

impl io::Read for Data<'_, '_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(self.0.read(bytes))
    }
}

impl ZeroCopyReader for Data<'_, '_> {
    fn read_to(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let mut data = self.0.take(count);
        let slices: Vec<_> = data
            .pieces()
            .map(FileVolatileSlice::from_volatile_slice)
            .collect();
        let written = file.write_vectored_at_volatile(&slices, offset)?;
        data.take(written);
        data.append(std::mem::take(self.0));
        *self.0 = data;
        Ok(written)
    }
}

/// Where a read reads to, straight into guest memory.
pub(super) struct Room<'r, 'm>(pub(super) &'r mut Writable<'m>);

impl io::Write for Room<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for Room<'_, '_> {
    fn write_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let room = self.0.take(count);
        let slices: Vec<_> = room
            .pieces()
            .map(FileVolatileSlice::from_volatile_slice)
            .collect();
        file.read_vectored_at_volatile(&slices, offset)
    }

    fn available_bytes(&self) -> usize {
        self.0.len()
    }
}
