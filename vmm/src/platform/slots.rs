//! The registers by which the guest's ACPI methods (`boot/acpi/slots.rs`) learn which devices of the PCI bus come and go.
//!
//! | offset | read | written |
//! |---|---|---|
//! | 0 | the next slot into which a device has come, or 0xff: each is named once | |
//! | 1 | the next slot whose device shall go, or 0xff: each is named once | |
//! | 2 | | number of a slot whose device the guest has let go of |
//!
//! ```text
//! empty ──announce──► in use ──ask_to_go──► to go ──the guest lets go──► empty
//!                        ▲                    │
//!                        └───────keep─────────┘
//! ```
//!
//! A device goes only when it was asked to and the guest lets go of it. One that the guest lets go of unasked is offered to
//! it again; what it writes about an empty slot, or one whose device was there from the start, is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::platform::NONE;
use crate::snapshot::RestoreError;

const COME: u64 = 0;
const TO_GO: u64 = 1;
const LET_GO: u64 = 2;

/// What came of asking the guest to let go of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The guest uses it no more. Said on the thread of a vCPU.
    LetGo,
    /// It was not to be waited for any longer: the device stays.
    Kept,
}

/// Takes the answer.
pub(crate) type OnAnswer = Box<dyn FnOnce(Answer) + Send>;

/// What is saved. In a restored VM nobody waits for a device to go: the guest is offered again what it lets go of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SlotState {
    come: BTreeSet<u8>,
}

#[derive(Default)]
struct State {
    /// Slots with devices that have come while the guest ran.
    in_use: BTreeSet<u8>,
    /// Those of them that the guest has not been told of.
    come: BTreeSet<u8>,
    /// Those that it has not been told to let go of.
    to_go: BTreeSet<u8>,
    /// Those that it shall let go of, told or not.
    asked: BTreeMap<u8, OnAnswer>,
}

/// The registers.
pub(crate) struct SlotRegisters {
    state: Mutex<State>,
    interrupt: EventFd,
}

impl SlotRegisters {
    /// `interrupt` calls the guest's generic event device.
    pub(crate) fn new(interrupt: EventFd) -> Self {
        Self {
            state: Mutex::default(),
            interrupt,
        }
    }

    /// A device is in the slot, of which the guest knows.
    pub(crate) fn occupy(&self, slot: u8) {
        self.lock().in_use.insert(slot);
    }

    /// A device is in the slot: tells the guest.
    pub(crate) fn announce(&self, slot: u8) {
        let mut state = self.lock();
        state.in_use.insert(slot);
        state.come.insert(slot);
        self.call();
    }

    /// Asks the guest to let go of the device in the slot. `on_answer` is called once, unless the VM ends before. False if
    /// it has been asked already, or there is no device.
    pub(crate) fn ask_to_go(&self, slot: u8, on_answer: OnAnswer) -> bool {
        let mut state = self.lock();
        if !state.in_use.contains(&slot) || state.asked.contains_key(&slot) {
            return false;
        }
        state.asked.insert(slot, on_answer);
        state.to_go.insert(slot);
        self.call();
        true
    }

    /// Waits no longer for the guest to let go of the device, if it has not by now.
    pub(crate) fn keep(&self, slot: u8) {
        let mut state = self.lock();
        state.to_go.remove(&slot);
        let on_answer = state.asked.remove(&slot);
        drop(state);
        if let Some(on_answer) = on_answer {
            on_answer(Answer::Kept);
        }
    }

    pub(crate) fn save(&self) -> SlotState {
        SlotState {
            come: self.lock().come.clone(),
        }
    }

    /// After [`Self::occupy`] for all devices of the state.
    pub(crate) fn restore(&self, saved: SlotState) -> Result<(), RestoreError> {
        let mut state = self.lock();
        if !saved.come.is_subset(&state.in_use) {
            return Err(RestoreError {
                device: "registers of PCI slots",
                reason: "they name a slot without a device".to_owned(),
            });
        }
        state.come = saved.come;
        Ok(())
    }

    fn let_go(&self, slot: u8) {
        let mut state = self.lock();
        if let Some(on_answer) = state.asked.remove(&slot) {
            state.in_use.remove(&slot);
            state.come.remove(&slot);
            state.to_go.remove(&slot);
            drop(state);
            on_answer(Answer::LetGo);
        } else if state.in_use.contains(&slot) {
            state.come.insert(slot);
            self.call();
        }
    }

    /// Interrupts the guest: there is news for it.
    fn call(&self) {
        // It fails only when the counter is about to overflow: then the interrupt is pending.
        let _ = self.interrupt.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SlotRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("SlotRegisters")
            .field("in_use", &state.in_use)
            .field("come", &state.come)
            .field("to_go", &state.to_go)
            .finish_non_exhaustive()
    }
}

impl BusDevice for SlotRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                COME => state.come.pop_first().unwrap_or(NONE),
                TO_GO => state.to_go.pop_first().unwrap_or(NONE),
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (LET_GO, [slot]) = (offset, data) {
            self.let_go(*slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use proptest::prelude::*;

    use super::*;

    fn registers() -> SlotRegisters {
        SlotRegisters::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    fn read(registers: &SlotRegisters, offset: u64) -> u8 {
        let mut data = [0];
        registers.read(offset, &mut data);
        data[0]
    }

    fn is_called(registers: &SlotRegisters) -> bool {
        registers.interrupt.read().is_ok()
    }

    fn ask(registers: &SlotRegisters, slot: u8) -> Option<Receiver<Answer>> {
        let (sender, answer) = channel();
        let on_answer = Box::new(move |answer| sender.send(answer).unwrap());
        registers.ask_to_go(slot, on_answer).then_some(answer)
    }

    #[test]
    fn devices_that_come_are_named_once() {
        let registers = registers();
        registers.announce(9);
        registers.announce(7);
        assert!(is_called(&registers));
        assert_eq!((read(&registers, COME), read(&registers, COME)), (7, 9));
        assert_eq!(read(&registers, COME), NONE);
        assert_eq!(read(&registers, TO_GO), NONE);
    }

    #[test]
    fn device_that_was_asked_to_goes_when_the_guest_lets_go() {
        let registers = registers();
        registers.announce(7);
        assert_eq!(read(&registers, COME), 7);
        let answer = ask(&registers, 7).unwrap();
        assert!(ask(&registers, 7).is_none(), "it has been asked already");
        assert!(is_called(&registers));
        assert_eq!(
            (read(&registers, TO_GO), read(&registers, TO_GO)),
            (7, NONE)
        );
        assert!(answer.try_recv().is_err());
        registers.write(LET_GO, &[7]);
        assert_eq!(answer.recv(), Ok(Answer::LetGo));
        // Once more, of an empty slot.
        assert!(!is_called(&registers));
        registers.write(LET_GO, &[7]);
        assert!(!is_called(&registers));
        assert!(ask(&registers, 7).is_none(), "it is gone");
    }

    #[test]
    fn device_that_was_not_asked_to_go_is_offered_again() {
        let registers = registers();
        registers.announce(7);
        assert_eq!(read(&registers, COME), 7);
        assert!(is_called(&registers));
        registers.write(LET_GO, &[7]);
        assert!(is_called(&registers));
        assert_eq!(read(&registers, COME), 7);
        // One that was there from the start, and what is no slot.
        for slot in [0, 6, 32, 0xff] {
            registers.write(LET_GO, &[slot]);
            assert!(!is_called(&registers));
        }
    }

    #[test]
    fn device_that_is_kept_stays_though_the_guest_lets_go_late() {
        let registers = registers();
        registers.announce(7);
        let answer = ask(&registers, 7).unwrap();
        registers.keep(7);
        assert_eq!(answer.recv(), Ok(Answer::Kept));
        assert_eq!((read(&registers, COME), read(&registers, TO_GO)), (7, NONE));
        assert!(is_called(&registers));
        registers.write(LET_GO, &[7]);
        assert!(is_called(&registers));
        assert_eq!(read(&registers, COME), 7);
        // It may be asked again, and what is not asked is not kept.
        assert!(ask(&registers, 7).is_some());
        registers.keep(8);
    }

    #[test]
    fn news_survive_save_and_restore() {
        let before = registers();
        before.announce(7);
        before.announce(8);
        assert_eq!(read(&before, COME), 7);
        let state = before.save();
        let after = registers();
        assert!(after.restore(state.clone()).is_err(), "slot 8 is empty");
        after.occupy(8);
        after.restore(state).unwrap();
        assert_eq!((read(&after, COME), read(&after, COME)), (8, NONE));
    }

    proptest! {
        #[test]
        fn no_access_makes_a_device_go_that_was_not_asked(
            accesses in prop::collection::vec((0..4u8, 0..4u64, prop::collection::vec(0..12u8, 1..5)), 0..60),
        ) {
            let registers = registers();
            (6..10).for_each(|slot| registers.announce(slot));
            let gone = ask(&registers, 8).unwrap();
            for (kind, offset, mut data) in accesses {
                match kind {
                    0 => registers.read(offset, &mut data),
                    _ => registers.write(offset, &data),
                }
                let state = registers.lock();
                prop_assert!([6, 7, 9].iter().all(|slot| state.in_use.contains(slot)));
                prop_assert!(state.come.is_subset(&state.in_use));
            }
            let is_in_use = registers.lock().in_use.contains(&8);
            prop_assert_eq!(is_in_use, gone.try_recv().is_err());
        }
    }
}
