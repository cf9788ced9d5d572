//! The PCI bus of the guest, and virtio's transport over it. It knows registers and interrupts, and no device by name.
//!
//! One root bus, configuration space through ECAM only, memory BARs only, MSI-X only: no I/O space, no INTx, no bridges.

mod bus;
mod config_space;
mod msix;
mod transport;

pub(crate) use bus::{Ecam, MemoryWindow, PciBus, SLOTS, first_bar};
pub(crate) use transport::{VirtioPci, VirtioPciState};
