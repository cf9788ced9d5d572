//! `containerd-shim-husk-v2`: the containerd shim that runs each pod in a virtual machine, and, in another role, the
//! worker process of that machine.

mod agent;
mod cgroup;
mod changes;
mod console;
mod container;
mod disks;
mod error;
mod events;
mod file_server;
mod growth;
mod hooks;
mod network;
mod options;
mod pod;
mod pod_config;
mod process;
mod sandbox;
mod service;
mod size;
mod spec;
mod start;
mod stats;
mod storage;
mod streams;
mod task;
mod vm;
mod vmm;

use std::ffi::OsString;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments
        .first()
        .is_some_and(|role| role == husk_vmm::worker::ROLE)
    {
        // SAFETY: `husk_vmm::worker::command` passes the control socket as this descriptor, and nothing in this new process has taken
        // it before.
        let control = unsafe { OwnedFd::from_raw_fd(husk_vmm::worker::SOCKET) };
        return husk_vmm::worker::main(control);
    }
    match start::main(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{}: {}", env!("CARGO_BIN_NAME"), error::chain(&err));
            ExitCode::FAILURE
        }
    }
}
