//! The end of a VM: why it ended, told once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use vmm_sys_util::eventfd::EventFd;

use crate::control::ExitReason;

/// The reason of a VM's end and the event that announces it. The first report counts; what a dying guest does after it is
/// a consequence.
#[derive(Debug)]
pub(crate) struct End {
    reason: OnceLock<ExitReason>,
    event: EventFd,
}

impl End {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            reason: OnceLock::new(),
            event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
        })
    }

    /// Reports that the VM has ended.
    pub(crate) fn report(&self, reason: ExitReason) {
        if self.reason.set(reason).is_ok() {
            // It fails only when the counter is about to overflow, and it is written once.
            let _ = self.event.write(1);
        }
    }

    /// The reason, once there is one.
    pub(crate) fn reason(&self) -> Option<ExitReason> {
        self.reason.get().cloned()
    }

    /// Whether the VM has ended.
    pub(crate) fn is_reported(&self) -> bool {
        self.reason.get().is_some()
    }
}

impl AsFd for End {
    /// Readable from the end of the VM on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as self, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.event)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let end = End::new().unwrap();
        assert!(!end.is_reported());
        end.report(ExitReason::Panic);
        end.report(ExitReason::Reset);
        assert_eq!(end.reason(), Some(ExitReason::Panic));
        assert_eq!(end.event.read().unwrap(), 1);
    }
}
