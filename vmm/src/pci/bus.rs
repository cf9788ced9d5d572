//! The root bus: finds the function that an access is for.

use std::sync::Arc;

use super::config_space::Window;
use super::transport::{BAR_SIZE, VirtioPci};
use crate::bus::BusDevice;
use crate::error::Error;
use crate::layout::PCI_WINDOW_32;

/// Devices on a bus, each with one function.
const SLOTS: usize = 32;
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

/// The bus. Device 0 is where a host bridge would be; nothing asks for one, so functions start there.
#[derive(Debug, Default)]
pub(crate) struct PciBus {
    functions: Vec<Arc<VirtioPci>>,
}

impl PciBus {
    /// Puts a function into the next slot.
    pub(crate) fn add(&mut self, function: Arc<VirtioPci>) -> Result<(), Error> {
        if self.functions.len() == SLOTS {
            return Err(Error::PciBusFull);
        }
        self.functions.push(function);
        Ok(())
    }

    /// Where the BAR of the next function goes. Linux keeps what it finds there if it fits, and so moves nothing.
    pub(crate) fn next_bar(&self) -> u32 {
        let slot = u32::try_from(self.functions.len()).expect("a few slots");
        u32::try_from(PCI_WINDOW_32.start).expect("below 4 GiB") + slot * BAR_SIZE
    }

    pub(crate) fn functions(&self) -> &[Arc<VirtioPci>] {
        &self.functions
    }
}

/// The memory-mapped configuration space of the bus.
#[derive(Debug)]
pub(crate) struct Ecam(pub(crate) Arc<PciBus>);

impl Ecam {
    /// The function and register of an access that does not cross into the next function.
    fn find(&self, offset: u64, len: usize) -> Option<(&VirtioPci, usize)> {
        let register = usize::try_from(offset % (1 << FUNCTION_SHIFT)).ok()?;
        let is_first_function = offset >> FUNCTION_SHIFT & 0x7 == 0;
        if !is_first_function || register + len > 1 << FUNCTION_SHIFT {
            return None;
        }
        let slot = usize::try_from(offset >> DEVICE_SHIFT).ok()?;
        Some((self.0.functions.get(slot)?, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.find(offset, data.len()) {
            function.write_config(register, data);
        }
    }
}

/// The addresses that the host bridge forwards to BARs.
#[derive(Debug)]
pub(crate) struct MemoryWindow(pub(crate) Arc<PciBus>);

impl MemoryWindow {
    fn find(&self, offset: u64, len: usize) -> Option<(&VirtioPci, u64)> {
        let address = PCI_WINDOW_32.start + offset;
        self.0.functions.iter().find_map(|function| {
            let offset = function.window().offset_of(address, len)?;
            Some((function.as_ref(), offset))
        })
    }
}

impl BusDevice for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, offset)) => function.read_window(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.find(offset, data.len()) {
            function.write_window(offset, data);
        }
    }
}
