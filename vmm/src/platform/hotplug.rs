//! The registers by which the guest's ACPI methods (`boot/acpi/hotplug.rs`) learn which vCPUs come and go.
//!
//! | offset | read | written |
//! |---|---|---|
//! | 0 to 31 | bit n: vCPU n is there | |
//! | 32 | the next vCPU that has come, or 0xff: each is named once | |
//! | 33 | the next vCPU that shall go, or 0xff: each is named once | |
//! | 34 | | number of a vCPU that the guest has let go of |
//!
//! ```text
//! absent ──resize──► come ──the guest reads it──► in use ──resize──► to go ──the guest lets go──► absent
//! ```
//!
//! The guest may let go of any vCPU but the first, asked or not; one that it should have is offered to it again. What it
//! never answers stays as it is: a vCPU goes only when the guest lets go of it. All that the guest can change here is which
//! of its vCPUs are offered to itself.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::error::Error;
use crate::platform::NONE;
use crate::snapshot::RestoreError;

/// Bytes of the map of those that are there.
pub(crate) const PRESENT_BYTES: usize = 32;

const COME: u64 = 32;
const TO_GO: u64 = 33;
const LET_GO: u64 = 34;

/// The registers' state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HotplugState {
    /// How many vCPUs the guest shall have: those with the lowest numbers.
    wanted: u8,
    present: BTreeSet<u8>,
    come: BTreeSet<u8>,
    to_go: BTreeSet<u8>,
}

/// The registers.
#[derive(Debug)]
pub(crate) struct HotplugRegisters {
    state: Mutex<HotplugState>,
    max_vcpus: u8,
    interrupt: EventFd,
}

impl HotplugRegisters {
    /// Of a VM that starts with `vcpus`; `interrupt` calls the guest's generic event device.
    pub(crate) fn new(vcpus: u8, max_vcpus: u8, interrupt: EventFd) -> Self {
        Self {
            state: Mutex::new(HotplugState {
                wanted: vcpus,
                present: (0..vcpus).collect(),
                come: BTreeSet::new(),
                to_go: BTreeSet::new(),
            }),
            max_vcpus,
            interrupt,
        }
    }

    /// Tells the guest that it shall have `wanted` vCPUs, at least one; KVM has them.
    pub(crate) fn resize(&self, wanted: u8) {
        let mut state = self.lock();
        state.wanted = wanted;
        for vcpu in 0..self.max_vcpus {
            let is_present = state.present.contains(&vcpu);
            match (is_present, vcpu < wanted) {
                (false, true) => {
                    state.present.insert(vcpu);
                    state.come.insert(vcpu);
                }
                (true, false) => {
                    state.to_go.insert(vcpu);
                }
                // If the guest has heard already that it shall go, and lets go of it, it gets it back then.
                (_, true) => {
                    state.to_go.remove(&vcpu);
                }
                (false, false) => {}
            }
        }
        self.call(&state);
    }

    /// A copy of what calls the guest's generic event device, which hears of other news by it too.
    pub(crate) fn interrupt(&self) -> Result<EventFd, Error> {
        self.interrupt.try_clone().map_err(Error::EventFd)
    }

    /// How many vCPUs the guest has, as far as it has answered.
    pub(crate) fn vcpus(&self) -> usize {
        self.lock().present.len()
    }

    pub(crate) fn save(&self) -> HotplugState {
        self.lock().clone()
    }

    pub(crate) fn restore(&self, state: HotplugState) -> Result<(), RestoreError> {
        let fits = |vcpus: &BTreeSet<u8>| vcpus.last().is_none_or(|last| *last < self.max_vcpus);
        let sets = [&state.present, &state.come, &state.to_go];
        let counts = (1..=self.max_vcpus).contains(&state.wanted);
        if !counts || !sets.into_iter().all(fits) || !state.present.contains(&0) {
            return Err(RestoreError {
                device: "hot-plug registers",
                reason: "they name vCPUs that this VM cannot have".to_owned(),
            });
        }
        *self.lock() = state;
        Ok(())
    }

    fn let_go(&self, vcpu: u8) {
        let mut state = self.lock();
        if vcpu == 0 || !state.present.remove(&vcpu) {
            return;
        }
        state.come.remove(&vcpu);
        state.to_go.remove(&vcpu);
        if vcpu < state.wanted {
            state.present.insert(vcpu);
            state.come.insert(vcpu);
            self.call(&state);
        }
    }

    /// Interrupts the guest if there is news for it.
    fn call(&self, state: &HotplugState) {
        if !state.come.is_empty() || !state.to_go.is_empty() {
            // It fails only when the counter is about to overflow: then the interrupt is pending.
            let _ = self.interrupt.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HotplugState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HotplugState {
    fn read(&mut self, offset: u64) -> u8 {
        let next = |vcpus: &mut BTreeSet<u8>| vcpus.pop_first().unwrap_or(NONE);
        match offset {
            0..COME => (0..8u8)
                .filter(|bit| {
                    u8::try_from(offset * 8)
                        .ok()
                        .is_some_and(|first| self.present.contains(&(first + bit)))
                })
                .fold(0, |byte, bit| byte | 1 << bit),
            COME => next(&mut self.come),
            TO_GO => next(&mut self.to_go),
            _ => 0,
        }
    }
}

impl BusDevice for HotplugRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = state.read(at);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (LET_GO, [vcpu]) = (offset, data) {
            self.let_go(*vcpu);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn registers(vcpus: u8, max_vcpus: u8) -> HotplugRegisters {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        HotplugRegisters::new(vcpus, max_vcpus, interrupt)
    }

    fn read(registers: &HotplugRegisters, offset: u64) -> u8 {
        let mut data = [0];
        registers.read(offset, &mut data);
        data[0]
    }

    fn is_called(registers: &HotplugRegisters) -> bool {
        registers.interrupt.read().is_ok()
    }

    #[test]
    fn vcpus_that_come_are_there_and_named_once() {
        let registers = registers(1, 12);
        assert_eq!((read(&registers, 0), read(&registers, COME)), (1, NONE));
        registers.resize(10);
        assert!(is_called(&registers));
        assert_eq!((read(&registers, 0), read(&registers, 1)), (0xff, 0x03));
        for vcpu in 1..10 {
            assert_eq!(read(&registers, COME), vcpu);
        }
        assert_eq!(read(&registers, COME), NONE);
        assert_eq!(read(&registers, TO_GO), NONE);
        registers.resize(10);
        assert!(!is_called(&registers));
    }

    #[test]
    fn vcpus_that_shall_go_are_there_until_the_guest_lets_go() {
        let registers = registers(3, 3);
        registers.resize(1);
        assert!(is_called(&registers));
        assert_eq!((read(&registers, TO_GO), read(&registers, TO_GO)), (1, 2));
        assert_eq!(registers.vcpus(), 3);
        registers.write(LET_GO, &[2]);
        assert_eq!(read(&registers, 0), 0b011);
        assert_eq!(read(&registers, COME), NONE);
        registers.write(LET_GO, &[2]);
        registers.write(LET_GO, &[0]);
        assert_eq!(registers.vcpus(), 2);
    }

    #[test]
    fn guest_that_lets_go_of_what_it_shall_have_is_offered_it_again() {
        let registers = registers(2, 2);
        registers.resize(1);
        assert_eq!(read(&registers, TO_GO), 1);
        registers.resize(2);
        assert!(is_called(&registers));
        registers.write(LET_GO, &[1]);
        assert!(is_called(&registers));
        assert_eq!((read(&registers, COME), read(&registers, 0)), (1, 0b11));
    }

    #[test]
    fn state_of_more_vcpus_is_refused() {
        let wide = registers(4, 4);
        let state = wide.save();
        assert!(registers(1, 3).restore(state.clone()).is_err());
        let same = registers(1, 4);
        same.restore(state).unwrap();
        assert_eq!(same.vcpus(), 4);
    }

    proptest! {
        #[test]
        fn no_access_breaks_the_registers(
            accesses in prop::collection::vec((any::<bool>(), 0..40u64, prop::collection::vec(any::<u8>(), 1..5)), 0..60),
            sizes in prop::collection::vec(1..=5u8, 0..4),
        ) {
            let registers = registers(2, 5);
            let mut sizes = sizes.into_iter();
            for (is_write, offset, mut data) in accesses {
                if is_write {
                    registers.write(offset, &data);
                } else {
                    registers.read(offset, &mut data);
                }
                if let Some(size) = sizes.next() {
                    registers.resize(size);
                }
                let state = registers.save();
                prop_assert!(state.present.contains(&0));
                prop_assert!(state.present.iter().all(|vcpu| *vcpu < 5));
                // Whatever the guest does, what it shall have stays on offer or in its hands.
                prop_assert!((0..state.wanted).all(|vcpu| state.present.contains(&vcpu)));
            }
        }
    }
}
