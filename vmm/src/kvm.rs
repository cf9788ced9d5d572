//! Access to KVM, and the part of it that devices need, behind a seam: interrupts and doorbells. Tests put a fake in the
//! place of the latter.

use std::fmt;

use kvm_bindings::{KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;

/// Opens KVM and checks that it can do what this VMM builds on.
pub(crate) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(Error::OpenKvm)?;
    for (capability, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(Error::MissingCapability { capability: name });
        }
    }
    Ok(kvm)
}

/// What a device's transport asks of the VM.
pub(crate) trait Hypervisor: Send + Sync + fmt::Debug {
    /// Replaces the whole table that maps GSIs to pins and messages.
    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), errno::Error>;

    /// Raises `gsi` whenever `event` is written.
    fn bind_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), errno::Error>;

    /// Undoes [`Self::bind_irqfd`].
    fn unbind_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), errno::Error>;

    /// Writes `event` whenever the guest writes to `address`, with any width and value and without an exit to this
    /// process.
    fn bind_doorbell(&self, event: &EventFd, address: u64) -> Result<(), errno::Error>;

    /// Undoes [`Self::bind_doorbell`].
    fn unbind_doorbell(&self, event: &EventFd, address: u64) -> Result<(), errno::Error>;
}

/// The real one.
pub(crate) struct KvmVm(pub(crate) VmFd);

impl fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KvmVm").finish_non_exhaustive()
    }
}

impl Hypervisor for KvmVm {
    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), errno::Error> {
        let table =
            KvmIrqRouting::from_entries(routes).map_err(|_| errno::Error::new(libc::E2BIG))?;
        self.0.set_gsi_routing(&table)
    }

    fn bind_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), errno::Error> {
        self.0.register_irqfd(event, gsi)
    }

    fn unbind_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), errno::Error> {
        self.0.unregister_irqfd(event, gsi)
    }

    fn bind_doorbell(&self, event: &EventFd, address: u64) -> Result<(), errno::Error> {
        // Without a value to compare, KVM ignores the width, and Intel processors need not even decode the instruction.
        self.0
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
    }

    fn unbind_doorbell(&self, event: &EventFd, address: u64) -> Result<(), errno::Error> {
        self.0
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;

    /// Remembers what it was asked.
    #[derive(Debug, Default)]
    pub(crate) struct FakeHypervisor {
        routes: Mutex<(usize, Vec<kvm_irq_routing_entry>)>,
        irqfds: Mutex<BTreeSet<u32>>,
        doorbells: Mutex<BTreeSet<u64>>,
    }

    impl FakeHypervisor {
        pub(crate) fn routes(&self) -> Vec<kvm_irq_routing_entry> {
            self.routes.lock().unwrap().1.clone()
        }

        pub(crate) fn route_changes(&self) -> usize {
            self.routes.lock().unwrap().0
        }

        /// GSIs that have an irqfd.
        pub(crate) fn irqfds(&self) -> Vec<u32> {
            self.irqfds.lock().unwrap().iter().copied().collect()
        }

        /// Addresses that have an ioeventfd.
        pub(crate) fn doorbells(&self) -> Vec<u64> {
            self.doorbells.lock().unwrap().iter().copied().collect()
        }
    }

    fn changed(yes: bool) -> Result<(), errno::Error> {
        if yes {
            Ok(())
        } else {
            Err(errno::Error::new(libc::EEXIST))
        }
    }

    impl Hypervisor for FakeHypervisor {
        fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), errno::Error> {
            let mut seen = self.routes.lock().unwrap();
            *seen = (seen.0 + 1, routes.to_vec());
            Ok(())
        }

        fn bind_irqfd(&self, _event: &EventFd, gsi: u32) -> Result<(), errno::Error> {
            changed(self.irqfds.lock().unwrap().insert(gsi))
        }

        fn unbind_irqfd(&self, _event: &EventFd, gsi: u32) -> Result<(), errno::Error> {
            changed(self.irqfds.lock().unwrap().remove(&gsi))
        }

        fn bind_doorbell(&self, _event: &EventFd, address: u64) -> Result<(), errno::Error> {
            changed(self.doorbells.lock().unwrap().insert(address))
        }

        fn unbind_doorbell(&self, _event: &EventFd, address: u64) -> Result<(), errno::Error> {
            changed(self.doorbells.lock().unwrap().remove(&address))
        }
    }
}
