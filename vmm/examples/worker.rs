//! The worker as a program of its own, where the shim has it as a role of its binary: what `tests/worker.rs` starts.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

/// Where the parent has put the control socket.
const CONTROL: i32 = 3;

fn main() -> ExitCode {
    // SAFETY: the parent gives it to this process, and nothing here has opened a descriptor.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    husk_vmm::worker::main(control)
}
