//! The sleep control, sleep status and reset registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 4.8.3.6).
//!
//! They hold no state: what is written ends the VM or is lost.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::ExitReason;
use crate::end::End;

/// Offset of the sleep control register.
pub(crate) const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub(crate) const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub(crate) const RESET: u64 = 2;
/// What the guest writes to it.
pub(crate) const RESET_VALUE: u8 = 1;
/// SLP_TYP that means S5, soft off.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

/// SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYP is three bits from here.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The three registers.
#[derive(Debug)]
pub(crate) struct PowerRegisters {
    end: Arc<End>,
}

impl PowerRegisters {
    pub(crate) fn new(end: Arc<End>) -> Self {
        Self { end }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const POWER_OFF: u8 = SLEEP_ENABLE | SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT;
        match (offset, data) {
            (SLEEP_CONTROL, [POWER_OFF]) => self.end.report(ExitReason::PowerOff),
            (RESET, [RESET_VALUE]) => self.end.report(ExitReason::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_write(offset: u64, data: &[u8]) -> Option<ExitReason> {
        let end = Arc::new(End::new().unwrap());
        PowerRegisters::new(Arc::clone(&end)).write(offset, data);
        end.reason()
    }

    #[test]
    fn s5_powers_off() {
        assert_eq!(
            after_write(SLEEP_CONTROL, &[0x34]),
            Some(ExitReason::PowerOff)
        );
    }

    #[test]
    fn reset_value_resets() {
        assert_eq!(after_write(RESET, &[RESET_VALUE]), Some(ExitReason::Reset));
    }

    #[test]
    fn anything_else_is_lost() {
        assert_eq!(after_write(SLEEP_CONTROL, &[0x14]), None, "no SLP_EN");
        assert_eq!(after_write(SLEEP_CONTROL, &[0x2c]), None, "S3");
        assert_eq!(after_write(SLEEP_STATUS, &[0x34]), None);
        assert_eq!(after_write(RESET, &[0]), None);
        assert_eq!(after_write(SLEEP_CONTROL, &[0x34, 0]), None);
    }
}
