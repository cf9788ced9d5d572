//! Loads the initramfs below the end of low memory: read once, straight into guest memory.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::kernel::Kernel;
use crate::error::Error;
use crate::layout::LOW_RAM_END;
use crate::memory;

const PAGE_SIZE: u64 = 4096;

/// Loads the archive and returns where it lies.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    archive: &mut File,
    kernel: &Kernel,
) -> Result<Range<u64>, Error> {
    let size = archive
        .seek(SeekFrom::End(0))
        .map_err(Error::ReadInitramfs)?;
    archive.rewind().map_err(Error::ReadInitramfs)?;
    let place =
        place(size, memory::end(memory), kernel).ok_or(Error::InitramfsTooLarge { size })?;
    let len = usize::try_from(size).map_err(|_| Error::InitramfsTooLarge { size })?;
    memory
        .read_exact_volatile_from(GuestAddress(place.start), archive, len)
        .map_err(|source| Error::WriteBootData {
            what: "initramfs",
            source,
        })?;
    Ok(place)
}

/// The highest pages below 4 GiB that the kernel can reach and does not claim itself.
fn place(size: u64, memory_end: u64, kernel: &Kernel) -> Option<Range<u64>> {
    let reachable = match kernel.setup_header {
        Some(header) => u64::from(header.initrd_addr_max) + 1,
        None => LOW_RAM_END,
    };
    let top = memory_end.min(LOW_RAM_END).min(reachable);
    let base = top.checked_sub(size)? & !(PAGE_SIZE - 1);
    (base >= kernel.end.raw_value()).then(|| base..base + size)
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::bootparam::setup_header;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn kernel(initrd_addr_max: Option<u32>) -> Kernel {
        Kernel {
            entry: GuestAddress(16 * MIB),
            end: GuestAddress(40 * MIB),
            setup_header: initrd_addr_max.map(|initrd_addr_max| setup_header {
                initrd_addr_max,
                ..Default::default()
            }),
        }
    }

    #[test]
    fn it_lies_at_the_end_of_low_memory() {
        let place_of = |size, end| place(size, end, &kernel(None));
        assert_eq!(
            place_of(MIB + 1, 64 * MIB),
            Some(63 * MIB - 4096..64 * MIB - 4095)
        );
        assert_eq!(place_of(MIB, 5 << 30), Some(LOW_RAM_END - MIB..LOW_RAM_END));
    }

    #[test]
    fn it_respects_the_limit_of_the_kernel() {
        let place = place(MIB, 3 << 30, &kernel(Some(0x7fff_ffff)));
        assert_eq!(place, Some(0x8000_0000 - MIB..0x8000_0000));
    }

    #[test]
    fn it_never_overlaps_the_kernel() {
        assert_eq!(place(25 * MIB, 64 * MIB, &kernel(None)), None);
        assert_eq!(place(65 * MIB, 64 * MIB, &kernel(None)), None);
        assert!(place(24 * MIB, 64 * MIB, &kernel(None)).is_some());
    }
}
