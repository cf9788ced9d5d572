//! Loads the kernel's image: an ELF `vmlinux` or a `bzImage`.

use std::fs::File;
use std::io::{Read, Seek};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use crate::error::Error;
use crate::layout::HIGH_MEMORY_BASE;

/// Offset of the 64-bit entry point from the start of a bzImage's protected-mode part (Documentation/arch/x86/boot.rst).
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has that entry point.
const XLF_KERNEL_64: u16 = 1 << 0;

/// A kernel in guest memory.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its 64-bit entry point.
    pub(crate) entry: GuestAddress,
    /// First address that the kernel does not claim before it has read its memory map.
    pub(crate) end: GuestAddress,
    /// A bzImage's own header; an ELF has none.
    pub(crate) setup_header: Option<setup_header>,
}

/// Loads the image at the address that it asks for.
pub(crate) fn load(memory: &GuestMemoryMmap, image: &mut File) -> Result<Kernel, Error> {
    image.rewind().map_err(Error::ReadKernel)?;
    let mut magic = [0; 4];
    image.read_exact(&mut magic).map_err(Error::ReadKernel)?;
    if magic == *b"\x7fELF" {
        load_elf(memory, image)
    } else {
        load_bzimage(memory, image)
    }
}

fn load_elf(memory: &GuestMemoryMmap, image: &mut File) -> Result<Kernel, Error> {
    let lowest = Some(GuestAddress(HIGH_MEMORY_BASE));
    let loaded = Elf::load(memory, None, image, lowest).map_err(Error::LoadKernel)?;
    Ok(Kernel {
        entry: loaded.kernel_load,
        end: GuestAddress(loaded.kernel_end),
        setup_header: None,
    })
}

fn load_bzimage(memory: &GuestMemoryMmap, image: &mut File) -> Result<Kernel, Error> {
    let lowest = Some(GuestAddress(HIGH_MEMORY_BASE));
    let loaded = BzImage::load(memory, None, image, lowest).map_err(Error::LoadKernel)?;
    let header = loaded.setup_header.ok_or(Error::Not64Bit)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::Not64Bit);
    }
    let entry = loaded
        .kernel_load
        .checked_add(BZIMAGE_ENTRY_64)
        .ok_or(Error::Not64Bit)?;
    // The kernel unpacks itself to its preferred address, or where it was loaded if that is higher, and needs init_size
    // bytes there.
    let unpacked_at = header.pref_address.max(loaded.kernel_load.raw_value());
    let unpacked_end = unpacked_at.saturating_add(u64::from(header.init_size));
    Ok(Kernel {
        entry,
        end: GuestAddress(unpacked_end.max(loaded.kernel_end)),
        setup_header: Some(header),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = crate::memory::allocate(16, 16).unwrap();
        for content in [&b""[..], b"#!", b"#!/bin/sh\n", &[0; 4096]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            assert!(load(&memory, &mut file).is_err());
        }
    }

    #[test]
    fn a_truncated_elf_is_refused() {
        let memory = crate::memory::allocate(16, 16).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"\x7fELF\x02\x01\x01").unwrap();
        assert!(matches!(
            load(&memory, &mut file),
            Err(Error::LoadKernel(_))
        ));
    }
}
