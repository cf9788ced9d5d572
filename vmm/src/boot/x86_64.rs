//! The 64-bit boot protocol of Linux: `boot_params`, and the page tables and descriptor table under which the first
//! instructions run (Documentation/arch/x86/boot.rst, "64-bit boot protocol"; zero-page.rst).

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};

use super::kernel::Kernel;
use crate::error::Error;
use crate::layout::{
    ACPI_BASE, ACPI_END, BOOT_PARAMS_BASE, CMDLINE_BASE, CONVENTIONAL_END, ECAM_BASE, ECAM_SIZE,
    GDT_BASE, HIGH_MEMORY_BASE, PAGE_TABLES_BASE,
};

/// `boot_flag` of a kernel header.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// What an ELF kernel's header would say.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Usable memory.
const E820_RAM: u32 = 1;
/// Not to be touched.
const E820_RESERVED: u32 = 2;
/// ACPI tables.
const E820_ACPI: u32 = 3;

/// Page table entry: present, writable.
const PTE_TABLE: u64 = 0b11;
/// The same for a page of 2 MiB.
const PTE_LARGE_PAGE: u64 = 0b1000_0011;
const PAGE_SIZE: u64 = 4096;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = 512;

/// Null, unused, `__BOOT_CS` (0x10: 64-bit code), `__BOOT_DS` (0x18: data), both flat.
pub(crate) const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// What the kernel is told.
#[derive(Debug)]
pub(super) struct BootParams<'a> {
    pub(super) kernel: &'a Kernel,
    /// Empty without one.
    pub(super) initramfs: Range<u64>,
    pub(super) cmdline_len: u32,
    pub(super) rsdp: GuestAddress,
}

/// Writes the zero page.
pub(super) fn write_boot_params(
    memory: &GuestMemoryMmap,
    what: &BootParams<'_>,
) -> Result<(), Error> {
    let mut params = boot_params {
        hdr: what.kernel.setup_header.unwrap_or_default(),
        acpi_rsdp_addr: what.rsdp.raw_value(),
        ..Default::default()
    };
    if what.kernel.setup_header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = split(CMDLINE_BASE);
    params.hdr.cmdline_size = what.cmdline_len;
    let initramfs = &what.initramfs;
    (params.hdr.ramdisk_image, params.ext_ramdisk_image) = split(initramfs.start);
    (params.hdr.ramdisk_size, params.ext_ramdisk_size) = split(initramfs.end - initramfs.start);
    let map = e820(memory);
    params.e820_entries = u8::try_from(map.len()).expect("a handful of entries");
    params.e820_table[..map.len()].copy_from_slice(&map);
    memory
        .write_slice(params.as_slice(), GuestAddress(BOOT_PARAMS_BASE))
        .map_err(|source| Error::WriteBootData {
            what: "boot parameters",
            source,
        })
}

/// Low and high half.
fn split(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// The memory map. What is not in it is not memory.
fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |range: Range<u64>, type_| boot_e820_entry {
        addr: range.start,
        size: range.end - range.start,
        type_,
    };
    let mut map = vec![
        entry(0..CONVENTIONAL_END, E820_RAM),
        entry(ACPI_BASE..ACPI_END, E820_ACPI),
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        map.push(entry(
            start.max(HIGH_MEMORY_BASE)..start + region.len(),
            E820_RAM,
        ));
    }
    // Linux wants configuration space reserved, or does not trust the MCFG table that names it.
    map.push(entry(ECAM_BASE..ECAM_BASE + ECAM_SIZE, E820_RESERVED));
    map.sort_by_key(|entry| entry.addr);
    map
}

/// Writes page tables that map the first GiB one to one with large pages (kernel, zero page and command line lie in it),
/// and the descriptor table.
pub(crate) fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let pdpt = PAGE_TABLES_BASE + PAGE_SIZE;
    let pd = pdpt + PAGE_SIZE;
    let failed = |source| Error::WriteBootData {
        what: "boot page tables",
        source,
    };
    let write = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).map_err(failed);
    write(pdpt | PTE_TABLE, PAGE_TABLES_BASE)?;
    write(pd | PTE_TABLE, pdpt)?;
    for index in 0..ENTRIES {
        write((index * LARGE_PAGE_SIZE) | PTE_LARGE_PAGE, pd + index * 8)?;
    }
    for (index, descriptor) in (0u64..).zip(GDT) {
        write(descriptor, GDT_BASE + index * 8)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{HIGH_RAM_BASE, LOW_RAM_END};

    fn map_of(size_mib: u32) -> Vec<(u64, u64, u32)> {
        let memory = crate::memory::allocate(size_mib, size_mib).unwrap();
        e820(&memory)
            .iter()
            .map(|entry| (entry.addr, entry.addr + entry.size, entry.type_))
            .collect()
    }

    #[test]
    fn the_map_of_small_memory() {
        assert_eq!(
            map_of(256),
            [
                (0, CONVENTIONAL_END, E820_RAM),
                (ACPI_BASE, ACPI_END, E820_ACPI),
                (HIGH_MEMORY_BASE, 256 << 20, E820_RAM),
                (ECAM_BASE, ECAM_BASE + ECAM_SIZE, E820_RESERVED),
            ]
        );
    }

    #[test]
    fn the_map_of_large_memory_goes_around_the_hole() {
        let map = map_of(4096);
        assert!(map.contains(&(HIGH_MEMORY_BASE, LOW_RAM_END, E820_RAM)));
        assert!(map.contains(&(HIGH_RAM_BASE, HIGH_RAM_BASE + (1 << 30), E820_RAM)));
        assert!(map.is_sorted());
        assert!(map.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    }

    #[test]
    fn the_parameters_read_back() {
        let memory = crate::memory::allocate(64, 64).unwrap();
        let kernel = Kernel {
            entry: GuestAddress(0x100_0000),
            end: GuestAddress(0x200_0000),
            setup_header: None,
        };
        write_boot_params(
            &memory,
            &BootParams {
                kernel: &kernel,
                initramfs: 0x1_2345_6000..0x1_2345_7001,
                cmdline_len: 7,
                rsdp: GuestAddress(ACPI_BASE),
            },
        )
        .unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS_BASE)).unwrap();
        let header = params.hdr;
        assert_eq!({ header.header }, HEADER_MAGIC);
        assert_eq!({ header.ramdisk_image }, 0x2345_6000);
        assert_eq!({ params.ext_ramdisk_image }, 1);
        assert_eq!({ header.ramdisk_size }, 0x1001);
        assert_eq!({ params.acpi_rsdp_addr }, ACPI_BASE);
    }

    #[test]
    fn the_page_tables_map_the_first_gib() {
        let memory = crate::memory::allocate(1, 1).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let pdpt = entry(PAGE_TABLES_BASE) & !0xfff;
        let pd = entry(pdpt) & !0xfff;
        assert_eq!(entry(pd), PTE_LARGE_PAGE);
        assert_eq!(
            entry(pd + 511 * 8),
            ((1 << 30) - LARGE_PAGE_SIZE) | PTE_LARGE_PAGE
        );
    }
}
