//! Whether a virtual machine starts: the configured kernel and initramfs are booted until the agent is ready, as for a pod
//! but for the jail.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use husk_protocol::{GUEST_CID, READY_PORT};
use husk_vmm::config::VmConfig;
use husk_vmm::{Confinement, VmFiles, Vmm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::report::Problem;

/// How much of the console's end a failure shows, in lines.
const LAST_LINES: usize = 10;

const LOOK_AT_CONSOLE: &str = "\
Kernel and initramfs have to be those of one version of Husk: install all of one. If they are, its console says where the guest stopped.";
const CANNOT_BUILD: &str =
    "The kernel or the initramfs is damaged, or this machine lacks what the message names.";

pub(super) fn check(vm: &husk_config::Vm) -> Result<String, Problem> {
    let begin = Instant::now();
    let (console, output) = io::pipe().map_err(|err| failed(&err))?;
    let (ready, announce) = io::pipe().map_err(|err| failed(&err))?;
    let config = VmConfig {
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: vm.memory_mib(),
        max_memory_mib: vm.memory_mib(),
        kernel_params: vm.kernel_params().to_owned(),
        shares: Vec::new(),
        disks: Vec::new(),
        nics: Vec::new(),
        guest_cid: GUEST_CID,
        ready_port: READY_PORT,
    };
    let files = VmFiles {
        kernel: open(vm.kernel())?,
        initramfs: open(vm.initramfs())?,
        console: OwnedFd::from(output).into(),
        disks: Vec::new(),
        nics: Vec::new(),
    };
    // Closing its writer makes the reader readable.
    let vmm = Vmm::new(&config, files, move || drop(announce), Confinement::NONE)
        .map_err(|err| Problem::from_error(&err, CANNOT_BUILD))?;
    let lines = std::thread::spawn(move || last_lines(console));
    vmm.start()
        .map_err(|err| Problem::from_error(&err, CANNOT_BUILD))?;

    let mut waited_for = [
        PollFd::new(&ready, PollFlags::IN),
        PollFd::new(&vmm, PollFlags::IN),
    ];
    let limit = vm.boot_timeout();
    poll(&mut waited_for, Some(&timespec(limit))).map_err(|err| failed(&err.into()))?;
    let is_ready = !waited_for[0].revents().is_empty();
    let took = begin.elapsed();
    let reason = vmm.exit_reason();
    drop(vmm);
    // The console's only writer has gone with the VM.
    let lines = lines.join().unwrap_or_default();
    if is_ready {
        return Ok(format!("a guest was ready after {} ms", took.as_millis()));
    }
    let what = match reason {
        Some(reason) => format!("the guest ended before it was ready ({reason:?})"),
        None => format!("the guest was not ready after {} s", limit.as_secs()),
    };
    let console = match lines.as_str() {
        "" => "Its console said nothing.".to_owned(),
        lines => format!("Its console ended with\n{lines}"),
    };
    Err(Problem::new(what, format!("{LOOK_AT_CONSOLE}\n{console}")))
}

fn open(path: &Path) -> Result<File, Problem> {
    File::open(path).map_err(|err| failed(&err))
}

fn failed(err: &io::Error) -> Problem {
    Problem::from_error(err, CANNOT_BUILD)
}

fn timespec(limit: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    }
}

/// Reads the console to its end, which costs no more memory than what is kept of it.
fn last_lines(mut console: impl Read) -> String {
    const KEPT: usize = 16 * 1024;
    let mut buffer = [0; 4096];
    let mut tail = Vec::new();
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        tail.extend_from_slice(&buffer[..count]);
        if tail.len() > 2 * KEPT {
            tail.drain(..tail.len() - KEPT);
        }
    }
    let text = String::from_utf8_lossy(&tail);
    let lines: Vec<_> = text.lines().collect();
    let first = lines.len().saturating_sub(LAST_LINES);
    lines[first..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_long_console_is_kept() {
        let mut text = "x".repeat(100_000);
        for number in 0..50 {
            text.push_str(&format!("\nline {number}"));
        }
        let lines = last_lines(text.as_bytes());
        assert_eq!(lines.lines().count(), LAST_LINES);
        assert!(lines.starts_with("line 40\n"), "{lines}");
        assert!(lines.ends_with("line 49"), "{lines}");
    }
}
