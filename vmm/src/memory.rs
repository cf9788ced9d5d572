//! The guest's memory, mapped around the hole for memory-mapped I/O, and its KVM memory slots.
//!
//! It is anonymous and private, so that the host backs it with large pages where it can: a boot then takes some 500 page
//! faults of the guest, where a memfd, which Linux by default never gives large pages, takes 11,000. The mapping must lie
//! at a multiple of 2 MiB for that, which Linux sees to only since 6.7. Only a VM whose memory another process is to use has
//! it in a memfd.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, VolatileSlice,
};

use crate::error::Error;
use crate::layout::{HIGH_RAM_BASE, LOW_RAM_END, pluggable_memory};

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;

/// What may be plugged in is rounded up to this much: in a VM with less than 64 GiB, Linux uses no smaller block of memory.
const PLUGGABLE_UNIT: u64 = 128 * MIB;

/// Where `size` bytes of memory lie: base and length, in ascending order.
fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
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

/// Where memory lies in a VM that starts with `size_mib` MiB and may grow to `max_mib`. The second is what may be plugged
/// in, all of it, whether it is or not; empty where the VM may not grow.
pub(crate) fn map(size_mib: u32, max_mib: u32) -> (Vec<(GuestAddress, u64)>, Range<u64>) {
    let ram = ranges(u64::from(size_mib) * MIB);
    let end = ram.iter().map(|(base, len)| base.0 + len).max();
    let growth = u64::from(max_mib.saturating_sub(size_mib)) * MIB;
    let pluggable = pluggable_memory(
        end.expect("there is low memory"),
        growth.next_multiple_of(PLUGGABLE_UNIT),
    );
    (ram, pluggable)
}

/// Allocates what [`map`] says. Pages are taken from the host as the guest touches them.
pub(crate) fn allocate(size_mib: u32, max_mib: u32) -> Result<GuestMemoryMmap, Error> {
    let ranges = all_ranges(size_mib, max_mib);
    let mappings = ranges.iter().map(|(_, len)| map_aligned(as_len(*len)));
    made_of(&ranges, mappings.collect(), max_mib)
}

/// The same, of memory that other processes can use: each region is a part of a file that can be handed to them.
pub(crate) fn allocate_shared(size_mib: u32, max_mib: u32) -> Result<GuestMemoryMmap, Error> {
    let ranges = all_ranges(size_mib, max_mib);
    let mappings = file_of(&ranges).and_then(|file| map_file(file, &ranges, libc::MAP_SHARED));
    made_of(&ranges, mappings, max_mib)
}

/// The memory of these mappings, with large pages where the host has some.
fn made_of(
    ranges: &[(GuestAddress, u64)],
    mappings: io::Result<Vec<MmapRegion>>,
    size_mib: u32,
) -> Result<GuestMemoryMmap, Error> {
    let mappings = mappings.map_err(|source| Error::AllocateMemory {
        size_mib: size_mib.into(),
        source,
    })?;
    let mut regions = Vec::new();
    for ((base, _), mapping) in ranges.iter().zip(mappings) {
        let advised =
            // SAFETY: the range is this mapping, and the advice changes nothing of what it holds.
            unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
        if advised != 0 {
            log::debug!(
                "the guest's memory has no large pages: {}",
                io::Error::last_os_error()
            );
        }
        regions.push(region(mapping, *base));
    }
    Ok(collect(regions))
}

/// A file in memory for these ranges, one after the other. Whoever gets it cannot cut anything off, which would be SIGBUS for
/// all others.
fn file_of(ranges: &[(GuestAddress, u64)]) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(
        "husk-guest",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?);
    file.set_len(ranges.iter().map(|(_, len)| len).sum())?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Maps these ranges, which lie in `file` one after the other.
fn map_file(
    file: File,
    ranges: &[(GuestAddress, u64)],
    sharing: libc::c_int,
) -> io::Result<Vec<MmapRegion>> {
    let file = std::sync::Arc::new(file);
    let mut offset = 0;
    let map = |(_, len): &(GuestAddress, u64)| {
        let place = FileOffset::from_arc(file.clone(), offset);
        offset += len;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = sharing | libc::MAP_NORESERVE;
        MmapRegion::build(Some(place), as_len(*len), rights, flags).map_err(io::Error::other)
    };
    ranges.iter().map(map).collect()
}

/// Maps `len` bytes of memory at a multiple of [`LARGE_PAGE`].
///
/// Where is the kernel's choice, since [`MmapRegion`] owns only what it has mapped itself: it takes the highest gap that is
/// large enough. So one of exactly this length is left at the right place. Should another thread map something there before,
/// the memory comes to lie elsewhere, and KVM may map it by small pages only.
pub(crate) fn map_aligned(len: usize) -> io::Result<MmapRegion> {
    let reserved_len = len + 2 * LARGE_PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved =
        // SAFETY: a new mapping, at a place where nothing is.
        unsafe { libc::mmap(ptr::null_mut(), reserved_len, libc::PROT_NONE, flags, -1, 0) };
    if reserved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // At least a page of the reservation stays on either side.
    let before = PAGE + reserved.wrapping_byte_add(PAGE).align_offset(LARGE_PAGE);
    let unmap = |offset: usize, len: usize| {
        // SAFETY: the pieces that are passed lie in the reservation, nothing is in them, and each is passed once.
        let unmapped = unsafe { libc::munmap(reserved.wrapping_byte_add(offset), len) };
        assert_eq!(unmapped, 0, "a reservation can be given up");
    };
    unmap(before, len);
    let mapping = MmapRegion::new(len).map_err(io::Error::other);
    unmap(0, before);
    unmap(before + len, reserved_len - before - len);
    mapping
}

fn all_ranges(size_mib: u32, max_mib: u32) -> Vec<(GuestAddress, u64)> {
    let (mut ranges, pluggable) = map(size_mib, max_mib);
    if !pluggable.is_empty() {
        ranges.push((
            GuestAddress(pluggable.start),
            pluggable.end - pluggable.start,
        ));
    }
    ranges
}

/// The memory that is there from the start: all but what may be plugged in.
pub(crate) fn at_start(memory: &GuestMemoryMmap, pluggable: &Range<u64>) -> GuestMemoryMmap {
    if pluggable.is_empty() {
        return memory.clone();
    }
    let (rest, _) = memory
        .remove_region(
            GuestAddress(pluggable.start),
            pluggable.end - pluggable.start,
        )
        .expect("it was allocated as a region of its own");
    rest
}

/// Gives the host back the whole pages of a piece of `memory`: what they held is lost, and what is read next is zero,
/// or what the file has that the memory was adopted from. Returns how many bytes that were.
pub(crate) fn give_back(memory: &GuestMemoryMmap, piece: &VolatileSlice<'_>) -> io::Result<usize> {
    let start = piece.ptr_guard_mut().as_ptr();
    let skipped = start.align_offset(PAGE);
    let len = piece.len().saturating_sub(skipped) / PAGE * PAGE;
    if len == 0 {
        return Ok(0);
    }
    // SAFETY: at most `len` bytes less than the slice is long are skipped.
    let first = unsafe { start.add(skipped) };
    let advice = if is_shared(memory, start) {
        // The other would only take the pages off this process, and leave them in the file.
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    // SAFETY: the pages lie in the slice, whose mapping lives. Nothing in this process relies on what guest memory holds:
    // it is only ever accessed as memory that changes at any time.
    match unsafe { libc::madvise(first.cast(), len, advice) } {
        0 => Ok(len),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether what is at `pointer` was made by [`allocate_shared`]. A DAX window was not: it has no file of its own.
fn is_shared(memory: &GuestMemoryMmap, pointer: *const u8) -> bool {
    memory.iter().any(|region| {
        let first = region.as_ptr().addr();
        let offset = pointer.addr().checked_sub(first);
        offset.is_some_and(|offset| offset < region.size())
            && region.file_offset().is_some()
            && region.flags() & libc::MAP_SHARED != 0
    })
}

/// Takes the memory that a VM of the same size has left in `file` ([`save`]). What the guest changes does not reach the
/// file, so any number of VMs may share it.
pub(crate) fn adopt(file: File, size_mib: u32, max_mib: u32) -> Result<GuestMemoryMmap, Error> {
    let ranges = all_ranges(size_mib, max_mib);
    let size: u64 = ranges.iter().map(|(_, len)| len).sum();
    let found = file.metadata().map_err(Error::AdoptMemory)?.len();
    if found != size {
        let source = io::Error::other(format!("it has {found} bytes, not {size}"));
        return Err(Error::AdoptMemory(source));
    }
    let mappings = map_file(file, &ranges, libc::MAP_PRIVATE).map_err(Error::AdoptMemory)?;
    let regions = ranges.iter().zip(mappings);
    Ok(collect(
        regions
            .map(|((base, _), mapping)| region(mapping, *base))
            .collect(),
    ))
}

/// Writes all memory into `file`, region after region. Pages of zeroes become holes.
pub(crate) fn save(memory: &GuestMemoryMmap, file: &File) -> Result<(), Error> {
    let mut offset = 0;
    let mut page = [0; PAGE];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        for at in (0..region.len()).step_by(PAGE) {
            memory
                .read_slice(&mut page, GuestAddress(start + at))
                .map_err(|err| Error::SaveMemory(io::Error::other(err)))?;
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(&page, offset + at)
                    .map_err(Error::SaveMemory)?;
            }
        }
        offset += region.len();
    }
    file.set_len(offset).map_err(Error::SaveMemory)
}

fn as_len(len: u64) -> usize {
    usize::try_from(len).expect("x86-64 has 64-bit pointers")
}

fn region(mapping: MmapRegion, base: GuestAddress) -> GuestRegionMmap {
    GuestRegionMmap::new(mapping, base).expect("the address map ends far below 2^64")
}

fn collect(regions: Vec<GuestRegionMmap>) -> GuestMemoryMmap {
    GuestMemoryMmap::from_regions(regions).expect("the ranges ascend and do not overlap")
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
    fn what_may_be_plugged_in_lies_above_and_is_apart() {
        assert!(map(512, 512).1.is_empty());
        let (ram, pluggable) = map(5 * 1024, 5 * 1024 + 200);
        assert_eq!(ram[1].0.0 + ram[1].1, HIGH_RAM_BASE + 2 * 1024 * MIB);
        assert_eq!(pluggable.start, HIGH_RAM_BASE + 2 * 1024 * MIB);
        assert_eq!(pluggable.end - pluggable.start, 256 * MIB);
        assert_eq!(map(64, 65).1.start, HIGH_RAM_BASE);

        let memory = allocate(2, 3).unwrap();
        let (_, pluggable) = map(2, 3);
        memory
            .write_obj(7u64, GuestAddress(pluggable.end - 8))
            .unwrap();
        let file = tempfile::tempfile().unwrap();
        save(&memory, &file).unwrap();
        let other = adopt(file, 2, 3).unwrap();
        let address = GuestAddress(pluggable.end - 8);
        assert_eq!(other.read_obj::<u64>(address).unwrap(), 7);
        assert_eq!(end(&at_start(&other, &pluggable)), 2 * MIB);
        assert_eq!(end(&at_start(&other, &map(3, 3).1)), pluggable.end);
    }

    #[test]
    fn memory_lies_where_large_pages_fit() {
        let memories: Vec<_> = (0..8).map(|_| allocate(6, 6).unwrap()).collect();
        let aligned = |memory: &&GuestMemoryMmap| {
            let start = memory.get_host_address(GuestAddress(0)).unwrap();
            start.align_offset(LARGE_PAGE) == 0
        };
        // The threads of other tests map as well, and may be faster once.
        assert!(memories.iter().filter(aligned).count() >= 6);
    }

    #[test]
    fn whole_pages_are_given_back() {
        let memory = allocate(1, 1).unwrap();
        memory.write_slice(&[7; 5 * PAGE], GuestAddress(0)).unwrap();
        let piece = memory.get_slice(GuestAddress(100), 4 * PAGE).unwrap();
        assert_eq!(give_back(&memory, &piece).unwrap(), 3 * PAGE);
        let mut seen = [1; 5 * PAGE];
        memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
        assert!(seen[..PAGE].iter().all(|byte| *byte == 7));
        assert!(seen[PAGE..4 * PAGE].iter().all(|byte| *byte == 0));
        assert!(seen[4 * PAGE..].iter().all(|byte| *byte == 7));
        for len in [0, 1, PAGE, 2 * PAGE - 101] {
            let piece = memory.get_slice(GuestAddress(100), len).unwrap();
            assert_eq!(give_back(&memory, &piece).unwrap(), 0, "{len}");
        }
    }

    #[test]
    fn shared_memory_is_a_file_that_nobody_can_cut_and_pages_go_back_to_the_host() {
        let memory = allocate_shared(2, 3).unwrap();
        assert_eq!(memory.num_regions(), 2);
        let mut files = memory.iter().map(|region| region.file_offset().unwrap());
        let (first, second) = (files.next().unwrap(), files.next().unwrap());
        assert_eq!((first.start(), second.start()), (0, 2 * MIB));
        let file = first.file();
        assert!(file.set_len(MIB).is_err() && file.set_len(1 << 40).is_err());

        memory.write_slice(&[7; 5 * PAGE], GuestAddress(0)).unwrap();
        let mut seen = [0; PAGE];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [7; PAGE]);
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks();
        let piece = memory.get_slice(GuestAddress(0), 4 * PAGE).unwrap();
        assert_eq!(give_back(&memory, &piece).unwrap(), 4 * PAGE);
        assert_eq!(before - blocks(), (4 * PAGE / 512) as u64);
        memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
        assert_eq!(seen, [0; PAGE]);
        let last = memory.read_obj::<u8>(GuestAddress(4 * PAGE as u64));
        assert_eq!(last.unwrap(), 7);
    }

    #[test]
    fn saved_memory_is_adopted_and_not_changed() {
        let memory = allocate(2, 2).unwrap();
        memory.write_obj(7u64, GuestAddress(0x1_2340)).unwrap();
        let file = tempfile::tempfile().unwrap();
        save(&memory, &file).unwrap();
        let first = adopt(file.try_clone().unwrap(), 2, 2).unwrap();
        let address = GuestAddress(0x1_2340);
        assert_eq!(first.read_obj::<u64>(address).unwrap(), 7);
        first.write_obj(8u64, address).unwrap();
        let second = adopt(file.try_clone().unwrap(), 2, 2).unwrap();
        assert_eq!(second.read_obj::<u64>(address).unwrap(), 7);
        assert!(adopt(file, 3, 3).is_err());
    }

    #[test]
    fn both_sides_of_the_hole_are_usable_and_the_hole_is_not() {
        let memory = allocate(3 * 1024 + 1, 3 * 1024 + 1).unwrap();
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
