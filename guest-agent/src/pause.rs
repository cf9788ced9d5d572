//! The role of the agent's program in which it is a pod's sandbox: the first process of the pod's namespaces, which are
//! there as long as it is. It reaps what the pod's containers leave to it, and ends when it is asked to.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use rustix::process::WaitOptions;

/// What the process is called, by itself and in its arguments, which tell this role from the others.
pub(crate) const NAME: &CStr = c"/pause";

/// Turns the calling process into the sandbox. Returns only if that fails.
///
/// The signals are held back from here on: one that comes before the new program waits for it would otherwise be lost,
/// since the first process of a PID namespace ignores what it does not handle.
pub(crate) fn execute(own_program: &File) -> nix::Error {
    if let Err(error) = signals().thread_block() {
        return error;
    }
    let Err(error) = nix::unistd::fexecve(own_program, &[NAME], &[] as &[CString]);
    error
}

/// Runs until SIGTERM or SIGINT.
pub(crate) fn main() -> ExitCode {
    // For tools that show no arguments. Without it the kernel shows the number of a descriptor.
    let _cosmetic = nix::sys::prctl::set_name(c"pause");
    let signals = signals();
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => reap(),
            Ok(_) => return ExitCode::SUCCESS,
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

fn signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM]
        .into_iter()
        .collect()
}

/// Takes every child that has ended. One SIGCHLD may stand for many.
fn reap() {
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asked_to_end_it_ends() {
        // On a thread of its own, whose mask nobody else has.
        let ended = std::thread::spawn(|| {
            signals().thread_block().expect("a valid set");
            nix::sys::signal::raise(Signal::SIGTERM).expect("ours");
            main()
        });
        assert_eq!(ended.join().expect("no panic"), ExitCode::SUCCESS);
    }
}
