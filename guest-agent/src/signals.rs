//! Signals by number: unlike nix' enum, this knows the real-time signals, which containers use (systemd stops on
//! SIGRTMIN+3).

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::error::{Error, Result};

/// The number of a signal that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signal(i32);

impl Signal {
    pub(crate) const KILL: Self = Self(libc::SIGKILL);

    /// Checks the number of a request.
    pub(crate) fn new(number: u32) -> Result<Self> {
        i32::try_from(number)
            .ok()
            .filter(|number| (1..=libc::SIGRTMAX()).contains(number))
            .map(Self)
            .ok_or_else(|| Error::Invalid(format!("{number} is no signal")))
    }

    /// Whether it is one by which a process is asked to end.
    pub(crate) fn asks_to_end(self) -> bool {
        matches!(
            self.0,
            libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM
        )
    }

    /// Sends it to one process.
    pub(crate) fn send(self, pid: Pid) -> nix::Result<()> {
        // SAFETY: kill takes two numbers and touches no memory of the caller.
        let result = unsafe { libc::kill(pid.as_raw(), self.0) };
        Errno::result(result).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_signals_that_exist_are_taken() {
        assert!(Signal::new(15).is_ok());
        assert!(Signal::new(37).is_ok());
        assert!(Signal::new(0).is_err());
        assert!(Signal::new(65).is_err());
        assert!(Signal::new(u32::MAX).is_err());
    }

    #[test]
    fn some_ask_to_end() {
        let asks = |number| Signal::new(number).expect("it exists").asks_to_end();
        assert!(asks(1) && asks(2) && asks(3) && asks(15));
        assert!(!asks(9) && !asks(10) && !asks(18) && !asks(28));
    }
}
