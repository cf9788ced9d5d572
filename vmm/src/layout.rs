//! The guest's physical address map and its I/O ports.
//!
//! ```text
//! 0                  low memory: boot structures below 640 KiB, ACPI tables at 896 KiB, the kernel from 1 MiB
//! LOW_RAM_END        32-bit window of the PCI host bridge (BARs)
//! ECAM_BASE          PCI configuration space, 1 MiB for one bus
//! IOAPIC_BASE        I/O APIC, local APICs, then KVM's own pages
//! 4 GiB              high memory, if there is more than LOW_RAM_END of it
//! above it           memory that may be plugged while the guest runs
//! above it           64-bit window of the PCI host bridge
//! ```

use std::ops::Range;

/// Where the kernel's descriptor table for the first instructions lies.
pub(crate) const GDT_BASE: u64 = 0x500;
/// The kernel's `boot_params`, the "zero page".
pub(crate) const BOOT_PARAMS_BASE: u64 = 0x7000;
/// Top of the stack that the boot protocol wants to exist.
pub(crate) const BOOT_STACK_TOP: u64 = 0x8ff0;
/// The page tables that map the first GiB one to one: three pages from here.
pub(crate) const PAGE_TABLES_BASE: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const CMDLINE_BASE: u64 = 0x2_0000;
/// Longest command line with its terminating zero: what x86 Linux takes (`COMMAND_LINE_SIZE`).
pub(crate) const CMDLINE_MAX_LEN: usize = 2048;
/// End of conventional memory; what follows up to [`HIGH_MEMORY_BASE`] is not for the kernel to use freely.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables, the RSDP first: where a BIOS would have its image.
pub(crate) const ACPI_BASE: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub(crate) const ACPI_END: u64 = HIGH_MEMORY_BASE;
/// Where memory above the legacy area starts, and with it the kernel.
pub(crate) const HIGH_MEMORY_BASE: u64 = 0x10_0000;

/// End of memory below the hole for memory-mapped I/O.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// Addresses below 4 GiB that the PCI host bridge forwards.
pub(crate) const PCI_WINDOW_32: Range<u64> = LOW_RAM_END..0xe000_0000;
/// PCI configuration space.
pub(crate) const ECAM_BASE: u64 = 0xe000_0000;
/// Its size: 256 functions of 4 KiB, one bus.
pub(crate) const ECAM_SIZE: u64 = 0x10_0000;
/// The in-kernel I/O APIC.
pub(crate) const IOAPIC_BASE: u32 = 0xfec0_0000;
/// The local APIC of each vCPU.
pub(crate) const LAPIC_BASE: u32 = 0xfee0_0000;
/// A page for KVM on Intel processors without unrestricted guest mode.
pub(crate) const KVM_IDENTITY_MAP_BASE: u64 = 0xfffb_c000;
/// Three pages of the same kind.
pub(crate) const KVM_TSS_BASE: u64 = 0xfffb_d000;
/// Where memory goes on above the hole.
pub(crate) const HIGH_RAM_BASE: u64 = 0x1_0000_0000;
/// Size of the window above memory that the PCI host bridge forwards.
pub(crate) const PCI_WINDOW_64_SIZE: u64 = 1 << 36;

/// The first serial port (COM1).
pub(crate) const SERIAL_PORTS: Range<u64> = 0x3f8..0x400;
/// Its interrupt.
pub(crate) const SERIAL_GSI: u32 = 4;
/// The panic notifier.
pub(crate) const PVPANIC_PORTS: Range<u64> = 0x505..0x506;
/// ACPI sleep control, sleep status and reset registers, one byte each in this order.
pub(crate) const POWER_PORTS: Range<u64> = 0x600..0x603;

/// Hot-plug of vCPUs: what the guest reads and writes when it hears of one.
pub(crate) const HOTPLUG_PORTS: Range<u64> = 0x620..0x643;
/// Hot-plug of devices on the PCI bus: the same.
pub(crate) const SLOT_PORTS: Range<u64> = 0x650..0x653;
/// By which it hears: the interrupt of the generic event device.
pub(crate) const HOTPLUG_GSI: u32 = 5;

/// First GSI that is no pin of the I/O APIC.
pub(crate) const FIRST_MSI_GSI: u32 = 24;

/// Linux adds memory in blocks of up to this size; one that begins in the middle of a block is lost to it.
const MEMORY_BLOCK_SIZE: u64 = 2 << 30;

/// Where `size` bytes may be plugged in above `ram_end`, the end of the memory that is there from the start.
pub(crate) fn pluggable_memory(ram_end: u64, size: u64) -> Range<u64> {
    let base = ram_end
        .max(HIGH_RAM_BASE)
        .next_multiple_of(MEMORY_BLOCK_SIZE);
    base..base + size
}

/// The window of the PCI host bridge above `ram_end`, the end of all memory: aligned to its size as large BARs need.
pub(crate) fn pci_window_64(ram_end: u64) -> Range<u64> {
    let base = ram_end
        .max(HIGH_RAM_BASE)
        .next_multiple_of(PCI_WINDOW_64_SIZE);
    base..base + PCI_WINDOW_64_SIZE
}
