//! The DAX windows of the shared folders: where in the guest's address space they are. They lie in the PCI host bridge's
//! 64-bit window, are no memory that the guest's kernel hands out or that is saved with the VM, and are part of what devices
//! may read and write.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::config::{ShareConfig, ShareProtocol};
use crate::error::Error;
use crate::layout::pci_window_64;
use crate::memory;
use crate::virtio::SharedMemory;

/// A window for each share that is to have one, in a VM with this memory and processors of so many bits of physical addresses.
pub(crate) fn reserve(
    shares: &[ShareConfig],
    memory: &GuestMemoryMmap,
    address_bits: u32,
) -> Result<Vec<Option<Arc<SharedMemory>>>, Error> {
    let mut room = pci_window_64(memory::end(memory));
    room.end = room
        .end
        .min(1u64.checked_shl(address_bits).unwrap_or(u64::MAX));
    let reserve = |share: &ShareConfig| {
        let ShareProtocol::Fuse { dax_window_mib, .. } = share.protocol else {
            return Ok(None);
        };
        if dax_window_mib == 0 {
            return Ok(None);
        }
        let len = (u64::from(dax_window_mib) << 20).next_multiple_of(SharedMemory::UNIT);
        let at = take(&mut room, len).ok_or(Error::WindowPlace {
            size_mib: dax_window_mib,
            address_bits,
        })?;
        let window = SharedMemory::new(at, len).map_err(|source| Error::AllocateWindow {
            size_mib: dax_window_mib,
            source,
        })?;
        Ok(Some(Arc::new(window)))
    };
    shares.iter().map(reserve).collect()
}

/// What devices may read and write: the memory, and the windows.
pub(crate) fn reachable(
    memory: &GuestMemoryMmap,
    windows: &[Option<Arc<SharedMemory>>],
) -> GuestMemoryMmap {
    windows
        .iter()
        .flatten()
        .fold(memory.clone(), |memory, window| {
            let with = memory.insert_region(window.region());
            with.expect("windows lie above all memory, and apart")
        })
}

/// Cuts a place for a BAR of `len` bytes off the room: as long as the next power of two, and at a multiple of that.
fn take(room: &mut Range<u64>, len: u64) -> Option<GuestAddress> {
    let size = len.checked_next_power_of_two()?;
    let at = room.start.checked_next_multiple_of(size)?;
    let end = at.checked_add(size)?;
    if end > room.end {
        return None;
    }
    room.start = end;
    Some(GuestAddress(at))
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestMemory, GuestMemoryRegion};

    use super::*;
    use crate::config::CachePolicy;

    fn share(protocol: ShareProtocol) -> ShareConfig {
        ShareConfig {
            tag: "share".to_owned(),
            path: "/".into(),
            cache: CachePolicy::Auto,
            protocol,
            watch: None,
        }
    }

    fn window(dax_window_mib: u32) -> ShareConfig {
        share(ShareProtocol::Fuse {
            writeback: false,
            dax_window_mib,
        })
    }

    #[test]
    fn windows_lie_above_memory_and_apart() {
        let memory = memory::allocate(64, 128).unwrap();
        let shares = [
            window(0),
            window(2),
            share(ShareProtocol::P9),
            window(5),
            window(64),
        ];
        let windows = reserve(&shares, &memory, 46).unwrap();
        assert_eq!(
            windows.iter().map(Option::is_some).collect::<Vec<_>>(),
            [false, true, false, true, true]
        );
        let lengths = windows.iter().flatten().map(|window| window.len() >> 20);
        assert_eq!(lengths.collect::<Vec<_>>(), [2, 6, 64]);
        let room = pci_window_64(memory::end(&memory));
        let mut free_from = room.start;
        for window in windows.iter().flatten() {
            let at = window.at().0;
            let size = window.len().next_power_of_two();
            assert!(at >= free_from && at.is_multiple_of(size), "{at:#x}");
            free_from = at + size;
        }
        assert!(free_from <= room.end);

        let reachable = reachable(&memory, &windows);
        assert_eq!(reachable.num_regions(), memory.num_regions() + 3);
        assert!(reachable.iter().any(|region| region.len() == 6 << 20));
        assert!(
            memory::end(&memory) < room.start,
            "the memory itself has none"
        );
    }

    #[test]
    fn a_window_beyond_what_the_processor_can_address_is_refused() {
        let memory = memory::allocate(64, 64).unwrap();
        // The host bridge's window begins at 64 GiB.
        let refused = |mib, bits| reserve(&[window(mib)], &memory, bits).unwrap_err();
        assert_eq!(
            refused(2, 36).to_string(),
            "a DAX window of 2 MiB finds no place below the 36 bits of the processor's physical addresses: \
             make it smaller, or max_memory_mib"
        );
        assert!(matches!(refused(u32::MAX, 46), Error::WindowPlace { .. }));
        reserve(&[window(1024)], &memory, 37).unwrap();
        reserve(&[window(1024)], &memory, 64).unwrap();
    }
}
