//! The guest's interrupts: pins of the in-kernel I/O APIC and message-signalled ones, both raised by writing an eventfd.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_IRQ_ROUTES,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::kvm::Hypervisor;
use crate::layout::FIRST_MSI_GSI;

/// What a device writes to raise a message-signalled interrupt, as the guest has programmed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MsiMessage {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// The table of GSIs.
#[derive(Debug)]
pub(crate) struct Interrupts {
    hypervisor: Arc<dyn Hypervisor>,
    /// By GSI, those above the pins of the I/O APIC.
    messages: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl Interrupts {
    pub(crate) fn new(hypervisor: Arc<dyn Hypervisor>) -> Arc<Self> {
        Arc::new(Self {
            hypervisor,
            messages: Mutex::default(),
        })
    }

    /// Connects an eventfd to a pin of the I/O APIC.
    pub(crate) fn pin(&self, gsi: u32) -> Result<EventFd, Error> {
        let event = new_event()?;
        self.bind(&event, gsi)?;
        Ok(event)
    }

    /// Reserves a GSI for a message-signalled interrupt.
    pub(crate) fn message(self: &Arc<Self>) -> Result<MsiInterrupt, Error> {
        let mut messages = self.lock();
        let last = FIRST_MSI_GSI + u32::try_from(KVM_MAX_IRQ_ROUTES).expect("a few thousand")
            - FIRST_MSI_GSI;
        let gsi = (FIRST_MSI_GSI..last)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or(Error::NoInterrupt)?;
        let event = new_event()?;
        messages.insert(gsi, None);
        Ok(MsiInterrupt {
            interrupts: Arc::clone(self),
            gsi,
            event,
            bound: false,
        })
    }

    fn bind(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.hypervisor
            .bind_irqfd(event, gsi)
            .map_err(|source| Error::Interrupt {
                gsi,
                operation: "connect",
                source,
            })
    }

    fn unbind(&self, event: &EventFd, gsi: u32) {
        if let Err(err) = self.hypervisor.unbind_irqfd(event, gsi) {
            log::warn!("cannot disconnect interrupt {gsi}: {err}");
        }
    }

    /// Says what message a GSI sends.
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), Error> {
        let mut messages = self.lock();
        let before = messages.insert(gsi, Some(message));
        if before == Some(Some(message)) {
            return Ok(());
        }
        self.hypervisor
            .set_routes(&routes(&messages))
            .map_err(|source| Error::Interrupt {
                gsi,
                operation: "route",
                source,
            })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<MsiMessage>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The whole table as KVM takes it: the pins of the I/O APIC, then the messages.
fn routes(messages: &BTreeMap<u32, Option<MsiMessage>>) -> Vec<kvm_irq_routing_entry> {
    let pins = (0..FIRST_MSI_GSI).map(|pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip {
            irqchip: KVM_IRQCHIP_IOAPIC,
            pin,
        };
        entry
    });
    let messages = messages.iter().filter_map(|(gsi, message)| {
        let message = (*message)?;
        let mut entry = kvm_irq_routing_entry {
            gsi: *gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: u32::from_le_bytes([a, b, c, d]),
            address_hi: u32::from_le_bytes([e, f, g, h]),
            data: message.data,
            ..Default::default()
        };
        Some(entry)
    });
    pins.chain(messages).collect()
}

/// A GSI for one message-signalled interrupt. It is given back when dropped.
#[derive(Debug)]
pub(crate) struct MsiInterrupt {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: EventFd,
    bound: bool,
}

impl MsiInterrupt {
    /// Says what message it sends. Before the first time it sends none.
    pub(crate) fn route(&mut self, message: MsiMessage) -> Result<(), Error> {
        self.interrupts.route(self.gsi, message)?;
        if !self.bound {
            self.interrupts.bind(&self.event, self.gsi)?;
            self.bound = true;
        }
        Ok(())
    }

    /// Sends the message.
    pub(crate) fn raise(&self) {
        // It fails only when the counter is about to overflow: then the interrupt is pending 2^64 times already.
        let _ = self.event.write(1);
    }

    /// Lets `event` raise it too, which somebody else writes to; what was written before counts. After the first
    /// [`Self::route`].
    pub(crate) fn bind(&self, event: &EventFd) -> Result<(), Error> {
        self.interrupts.bind(event, self.gsi)
    }

    /// Undoes [`Self::bind`]. What is written to `event` from then on stays in it.
    pub(crate) fn unbind(&self, event: &EventFd) {
        self.interrupts.unbind(event, self.gsi);
    }

    /// The eventfd that raises it, for tests.
    #[cfg(test)]
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for MsiInterrupt {
    fn drop(&mut self) {
        if self.bound {
            self.unbind(&self.event);
        }
        // The route stays in KVM's table until the next change; nothing raises it any more.
        self.interrupts.lock().remove(&self.gsi);
    }
}

fn new_event() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(Error::EventFd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::testing::FakeHypervisor;

    #[test]
    fn a_message_is_connected_when_first_routed() {
        let fake = Arc::new(FakeHypervisor::default());
        let interrupts = Interrupts::new(fake.clone());
        let mut first = interrupts.message().unwrap();
        let second = interrupts.message().unwrap();
        assert_eq!((first.gsi, second.gsi), (24, 25));
        assert!(fake.irqfds().is_empty());
        let message = MsiMessage {
            address: 0x1_fee0_0000,
            data: 0x4021,
        };
        first.route(message).unwrap();
        assert_eq!(fake.irqfds(), [24]);
        let routes = fake.routes();
        assert_eq!(routes.len(), 25);
        let last = routes.last().unwrap();
        // SAFETY: an entry of type MSI was written with this member.
        let msi = unsafe { last.u.msi };
        assert_eq!(
            (last.gsi, msi.address_lo, msi.address_hi, msi.data),
            (24, 0xfee0_0000, 1, 0x4021)
        );
    }

    #[test]
    fn the_same_message_again_costs_nothing() {
        let fake = Arc::new(FakeHypervisor::default());
        let interrupts = Interrupts::new(fake.clone());
        let mut interrupt = interrupts.message().unwrap();
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 1,
        };
        interrupt.route(message).unwrap();
        interrupt.route(message).unwrap();
        assert_eq!(fake.route_changes(), 1);
    }

    #[test]
    fn a_dropped_message_gives_its_gsi_back() {
        let fake = Arc::new(FakeHypervisor::default());
        let interrupts = Interrupts::new(fake.clone());
        let mut interrupt = interrupts.message().unwrap();
        interrupt
            .route(MsiMessage {
                address: 0xfee0_0000,
                data: 1,
            })
            .unwrap();
        drop(interrupt);
        assert!(fake.irqfds().is_empty());
        assert_eq!(interrupts.message().unwrap().gsi, 24);
    }
}
