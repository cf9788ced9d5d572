//! From files to a guest that is ready for its first instruction: kernel, command line, initramfs, ACPI tables and the
//! parameters of the boot protocol, all in guest memory.

mod acpi;
mod cmdline;
mod initramfs;
mod kernel;
mod x86_64;

use std::fs::File;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::error::Error;

/// What is put into guest memory.
#[derive(Debug)]
pub(crate) struct BootSource<'a> {
    pub(crate) kernel: &'a mut File,
    /// May be empty: then the guest gets none.
    pub(crate) initramfs: &'a mut File,
    /// Added at the end of the command line.
    pub(crate) kernel_params: &'a str,
    /// vCPUs that are there from the start.
    pub(crate) vcpus: u8,
    /// vCPUs that there may be.
    pub(crate) max_vcpus: u8,
    /// The first address above all memory, including what may be plugged in.
    pub(crate) memory_end: u64,
    /// The first PCI slot for devices that are added while the guest runs; the others follow.
    pub(crate) first_late_slot: u8,
}

/// Loads everything into `memory`, which is there from the start, and returns the address of the kernel's 64-bit entry point.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    source: &mut BootSource<'_>,
) -> Result<GuestAddress, Error> {
    let kernel = kernel::load(memory, source.kernel)?;
    let initramfs = initramfs::load(memory, source.initramfs, &kernel)?;
    let cmdline_len = cmdline::write(memory, source.kernel_params)?;
    let rsdp = acpi::write(
        memory,
        acpi::Machine {
            vcpus: source.vcpus,
            max_vcpus: source.max_vcpus,
            memory_end: source.memory_end,
            first_late_slot: source.first_late_slot,
        },
    )?;
    x86_64::write_boot_params(
        memory,
        &x86_64::BootParams {
            kernel: &kernel,
            initramfs,
            cmdline_len,
            rsdp,
        },
    )?;
    x86_64::write_page_tables(memory)?;
    Ok(kernel.entry)
}

pub(crate) use x86_64::{GDT, write_page_tables};
