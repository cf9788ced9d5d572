//! The panic notifier (ACPI id QEMU0001; QEMU's docs/specs/pvpanic): one byte at one port.
//!
//! By the time that the guest writes it, its kernel has printed why it panics; the rest of its end is of no use, so the
//! VM ends here. It holds no state.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::ExitReason;
use crate::end::End;

/// The event that is offered and taken: the guest's kernel has panicked and will not run a crash kernel.
const PANICKED: u8 = 1 << 0;

/// The notifier.
#[derive(Debug)]
pub(crate) struct PanicNotifier {
    end: Arc<End>,
}

impl PanicNotifier {
    pub(crate) fn new(end: Arc<End>) -> Self {
        Self { end }
    }
}

impl BusDevice for PanicNotifier {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.iter().any(|event| event & PANICKED != 0) {
            self.end.report(ExitReason::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_offers_and_takes_only_the_panic_event() {
        let end = Arc::new(End::new().unwrap());
        let notifier = PanicNotifier::new(Arc::clone(&end));
        let mut offered = [0xff];
        notifier.read(0, &mut offered);
        assert_eq!(offered, [PANICKED]);
        notifier.write(0, &[0b10]);
        assert_eq!(end.reason(), None);
        notifier.write(0, &[0b01]);
        assert_eq!(end.reason(), Some(ExitReason::Panic));
    }
}
