//! The root bus: finds the function that an access is for.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::config_space::Window;
use super::transport::{BAR_SIZE, VirtioPci};
use crate::bus::BusDevice;
use crate::layout::PCI_WINDOW_32;

/// Devices on a bus, each with one function.
pub(crate) const SLOTS: u8 = 32;
/// ECAM: bits of an address below the function's number, and below the device's.
const FUNCTION_SHIFT: u64 = 12;
const DEVICE_SHIFT: u64 = 15;

/// A function on the bus, as the guest's accesses see it.
pub(super) trait PciFunction: Send + Sync {
    /// A load from configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// A store to configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// Where its BAR is.
    fn window(&self) -> &Window;
    /// A load from its BAR.
    fn read_window(&self, offset: u64, data: &mut [u8]);
    /// A store to its BAR.
    fn write_window(&self, offset: u64, data: &[u8]);
}

/// Where the BAR of the function in `slot` goes at first. Linux keeps what it finds there if it fits, and so moves nothing
/// while it boots.
pub(crate) fn first_bar(slot: u8) -> u32 {
    u32::try_from(PCI_WINDOW_32.start).expect("below 4 GiB") + u32::from(slot) * BAR_SIZE
}

/// The bus. Device 0 is where a host bridge would be; nothing asks for one, so functions start there.
#[derive(Debug, Default)]
pub(crate) struct PciBus {
    /// By slot. An access of the guest's holds the lock while it lasts: a function that was taken off the bus is one that
    /// no vCPU is in.
    functions: RwLock<BTreeMap<u8, VirtioPci>>,
}

impl PciBus {
    /// Puts a function into an empty slot.
    pub(crate) fn put(&self, slot: u8, function: VirtioPci) {
        let before = self.write().insert(slot, function);
        debug_assert!(before.is_none(), "slot {slot} was empty");
    }

    /// Takes a function off the bus, once no vCPU is in it.
    pub(crate) fn take(&self, slot: u8) -> Option<VirtioPci> {
        self.write().remove(&slot)
    }

    /// All functions, by slot. None comes or goes while this is held.
    pub(crate) fn functions(&self) -> RwLockReadGuard<'_, BTreeMap<u8, VirtioPci>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<u8, VirtioPci>> {
        self.functions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory-mapped configuration space of the bus.
#[derive(Debug)]
pub(crate) struct Ecam(pub(crate) Arc<PciBus>);

impl Ecam {
    /// Makes an access, which must not cross into the next function. `None` if there is no function.
    fn access<T>(
        &self,
        offset: u64,
        len: usize,
        access: impl FnOnce(&VirtioPci, usize) -> T,
    ) -> Option<T> {
        let register = usize::try_from(offset % (1 << FUNCTION_SHIFT)).ok()?;
        let is_first_function = offset >> FUNCTION_SHIFT & 0x7 == 0;
        if !is_first_function || register + len > 1 << FUNCTION_SHIFT {
            return None;
        }
        let slot = u8::try_from(offset >> DEVICE_SHIFT).ok()?;
        let functions = self.0.functions();
        Some(access(functions.get(&slot)?, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let read = self.access(offset, data.len(), |function, register| {
            function.read_config(register, data);
        });
        if read.is_none() {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // What is for no function is lost.
        let _ = self.access(offset, data.len(), |function, register| {
            function.write_config(register, data);
        });
    }
}

/// The addresses that the host bridge forwards to BARs.
#[derive(Debug)]
pub(crate) struct MemoryWindow(pub(crate) Arc<PciBus>);

impl MemoryWindow {
    /// Makes an access. `None` if no BAR is there.
    fn access<T>(
        &self,
        offset: u64,
        len: usize,
        access: impl FnOnce(&VirtioPci, u64) -> T,
    ) -> Option<T> {
        let address = PCI_WINDOW_32.start + offset;
        let functions = self.0.functions();
        let (function, offset) = functions.values().find_map(|function| {
            let offset = function.window().offset_of(address, len)?;
            Some((function, offset))
        })?;
        Some(access(function, offset))
    }
}

impl BusDevice for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let read = self.access(offset, data.len(), |function, offset| {
            function.read_window(offset, data);
        });
        if read.is_none() {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // What is for no BAR is lost.
        let _ = self.access(offset, data.len(), |function, offset| {
            function.write_window(offset, data);
        });
    }
}
