//! The guest's memory: one memfd, mapped around the hole for memory-mapped I/O, and its KVM memory slots.
//!
//! It is a file so that it can be shared with a vhost-user process or saved without copying through this one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::error::Error;
use crate::layout::{HIGH_RAM_BASE, LOW_RAM_END};

const MIB: u64 = 1 << 20;

/// Where `size` bytes of memory lie: base and length, in ascending order.
pub(crate) fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(HIGH_RAM_BASE), size - low));
    }
    ranges
}

/// The first address above all memory.
pub(crate) fn end(memory: &GuestMemoryMmap) -> u64 {
    memory.last_addr().raw_value() + 1
}

/// Allocates `size_mib` MiB. Pages are taken from the host as the guest touches them.
pub(crate) fn allocate(size_mib: u32) -> Result<GuestMemoryMmap, Error> {
    let size_mib = u64::from(size_mib);
    let file = create_memfd(size_mib * MIB)
        .map_err(|source| Error::AllocateMemory { size_mib, source })?;
    map(file, size_mib * MIB)
}

/// Takes memory that another VM of the same size has left in `file`.
pub(crate) fn adopt(file: File, size_mib: u32) -> Result<GuestMemoryMmap, Error> {
    let size = u64::from(size_mib) * MIB;
    let found = file.metadata().map_err(Error::AdoptMemory)?.len();
    if found != size {
        let source = io::Error::other(format!("it has {found} bytes, not {size}"));
        return Err(Error::AdoptMemory(source));
    }
    map(file, size)
}

/// The file that holds all memory.
pub(crate) fn file(memory: &GuestMemoryMmap) -> &File {
    memory
        .iter()
        .find_map(GuestMemoryRegion::file_offset)
        .expect("every region is mapped from it")
        .file()
}

fn map(file: File, size: u64) -> Result<GuestMemoryMmap, Error> {
    let file = Arc::new(file);
    let mut offset = 0;
    let mut mappings = Vec::new();
    for (base, len) in ranges(size) {
        let len_in_memory = usize::try_from(len).expect("x86-64 has 64-bit pointers");
        let part = FileOffset::from_arc(Arc::clone(&file), offset);
        mappings.push((base, len_in_memory, Some(part)));
        offset += len;
    }
    GuestMemoryMmap::from_ranges_with_files(mappings).map_err(Error::MapMemory)
}

/// A memfd of `size` bytes that nobody can shrink under our mapping.
fn create_memfd(size: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the call takes nothing else from our memory.
    let fd = unsafe {
        libc::memfd_create(
            c"husk-guest-memory".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made this descriptor and nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Gives KVM a memory slot for each region.
///
/// The memory must outlive the VM's last run; the `Vmm` keeps both and ends its vCPUs first.
pub(crate) fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let base = region.start_addr();
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: base.raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a live mapping of exactly this length, regions do not overlap, and the caller keeps it
        // mapped for as long as vCPUs run.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|source| Error::MemorySlot {
            base: base.raw_value(),
            len: region.len(),
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        assert_eq!(ranges(512 * MIB), vec![(GuestAddress(0), 512 * MIB)]);
        assert_eq!(ranges(LOW_RAM_END), vec![(GuestAddress(0), LOW_RAM_END)]);
    }

    #[test]
    fn large_memory_goes_on_above_the_hole() {
        assert_eq!(
            ranges(LOW_RAM_END + 5 * MIB),
            vec![
                (GuestAddress(0), LOW_RAM_END),
                (GuestAddress(HIGH_RAM_BASE), 5 * MIB)
            ]
        );
    }

    #[test]
    fn both_sides_of_the_hole_are_usable_and_the_hole_is_not() {
        let memory = allocate(3 * 1024 + 1).unwrap();
        memory
            .write_obj(7u64, GuestAddress(LOW_RAM_END - 8))
            .unwrap();
        memory.write_obj(9u64, GuestAddress(HIGH_RAM_BASE)).unwrap();
        assert!(memory.write_obj(1u8, GuestAddress(LOW_RAM_END)).is_err());
        assert_eq!(end(&memory), HIGH_RAM_BASE + MIB);
        assert_eq!(
            memory
                .read_obj::<u64>(GuestAddress(LOW_RAM_END - 8))
                .unwrap(),
            7
        );
    }
}
