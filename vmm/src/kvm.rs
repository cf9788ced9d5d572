//! Access to KVM, and the part of it that devices need, behind a seam: interrupts and doorbells. Tests put a fake in the
//! place of the latter.

use std::fmt;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting,
    kvm_clock_data, kvm_irq_routing_entry, kvm_irqchip,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::layout::{KVM_IDENTITY_MAP_BASE, KVM_TSS_BASE};

/// `KVM_API_VERSION` of linux/kvm.h.
const API_VERSION: i32 = 12;

/// Opens KVM and checks that it can do what this VMM builds on.
pub(crate) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(Error::OpenKvm)?;
    // The one version that there has been since Linux 2.6.22 (Documentation/virt/kvm/api.rst, 4.1).
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::NotKvm);
    }
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

/// A VM of KVM's, with interrupt controllers and clock.
pub(crate) struct KvmVm(VmFd);

/// The state of what KVM emulates for a VM as a whole.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KvmState {
    interrupt_controllers: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

/// The interrupt controllers: two PICs, which nothing uses, and the I/O APIC.
const INTERRUPT_CONTROLLERS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl KvmVm {
    /// Makes a VM with its interrupt controllers in the kernel. There is no PIT: hardware-reduced ACPI tells Linux so, and
    /// kvm-clock and the TSC deadline timer need no calibration by one.
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, Error> {
        let vm = kvm.create_vm().map_err(failed("make a VM"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP_BASE)
            .map_err(failed("place the identity map of the VM"))?;
        let tss = usize::try_from(KVM_TSS_BASE).expect("x86-64 has 64-bit pointers");
        vm.set_tss_address(tss)
            .map_err(failed("place the task state of the VM"))?;
        vm.create_irq_chip()
            .map_err(failed("make the interrupt controllers"))?;
        Ok(Self(vm))
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.0
    }

    /// Copies the state. The vCPUs are paused.
    pub(crate) fn save(&self) -> Result<KvmState, Error> {
        let mut interrupt_controllers = Vec::new();
        for chip_id in INTERRUPT_CONTROLLERS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.0
                .get_irqchip(&mut chip)
                .map_err(failed("read the interrupt controllers"))?;
            interrupt_controllers.push(chip);
        }
        Ok(KvmState {
            interrupt_controllers,
            clock: self.0.get_clock().map_err(failed("read the clock"))?,
        })
    }

    /// Puts a state back. The guest's clock goes on from where it was.
    pub(crate) fn restore(&self, state: &KvmState) -> Result<(), Error> {
        for chip in &state.interrupt_controllers {
            self.0
                .set_irqchip(chip)
                .map_err(failed("set the interrupt controllers"))?;
        }
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        self.0.set_clock(&clock).map_err(failed("set the clock"))
    }
}

fn failed(operation: &'static str) -> impl FnOnce(errno::Error) -> Error {
    move |source| Error::Vm { operation, source }
}

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
    use std::os::fd::{AsRawFd, RawFd};
    use std::sync::Mutex;

    use super::*;

    /// Remembers what it was asked.
    #[derive(Debug, Default)]
    pub(crate) struct FakeHypervisor {
        routes: Mutex<(usize, Vec<kvm_irq_routing_entry>)>,
        /// GSI and eventfd.
        irqfds: Mutex<BTreeSet<(u32, RawFd)>>,
        doorbells: Mutex<BTreeSet<u64>>,
    }

    impl FakeHypervisor {
        pub(crate) fn routes(&self) -> Vec<kvm_irq_routing_entry> {
            self.routes.lock().unwrap().1.clone()
        }

        pub(crate) fn route_changes(&self) -> usize {
            self.routes.lock().unwrap().0
        }

        /// GSIs that have an irqfd, as often as they have one.
        pub(crate) fn irqfds(&self) -> Vec<u32> {
            let irqfds = self.irqfds.lock().unwrap();
            irqfds.iter().map(|(gsi, _)| *gsi).collect()
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

        fn bind_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), errno::Error> {
            changed(self.irqfds.lock().unwrap().insert((gsi, event.as_raw_fd())))
        }

        fn unbind_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), errno::Error> {
            changed(
                self.irqfds
                    .lock()
                    .unwrap()
                    .remove(&(gsi, event.as_raw_fd())),
            )
        }

        fn bind_doorbell(&self, _event: &EventFd, address: u64) -> Result<(), errno::Error> {
            changed(self.doorbells.lock().unwrap().insert(address))
        }

        fn unbind_doorbell(&self, _event: &EventFd, address: u64) -> Result<(), errno::Error> {
            changed(self.doorbells.lock().unwrap().remove(&address))
        }
    }
}
