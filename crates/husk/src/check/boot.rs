//! Whether a virtual machine starts: the configured kernel and initramfs are booted until the agent is ready, by a worker of
//! the shim's, in its jail and with its filters, as for a pod.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use husk_protocol::{GUEST_CID, READY_PORT, SHARE_TAG};
use husk_vmm::config::{CachePolicy, ShareConfig, ShareProtocol, VmConfig};
use husk_vmm::control::{self, Call, Event, Message, Request};
use husk_vmm::worker;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use super::report::Problem;

/// How much of the console's end a failure shows, in lines.
const LAST_LINES: usize = 10;

const LOOK_AT_CONSOLE: &str = "\
Kernel and initramfs have to be those of one version of Husk: install all of one. If they are, its console says where the guest stopped.";
const CANNOT_BUILD: &str =
    "The kernel or the initramfs is damaged, or this machine lacks what the message names.";

/// Boots with a worker of `shim`, the program.
pub(super) fn check(vm: &husk_config::Vm, shim: &Path) -> Result<String, Problem> {
    let begin = Instant::now();
    let share = tempfile::tempdir().map_err(|err| failed(&err))?;
    let config = VmConfig {
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: vm.memory_mib(),
        max_memory_mib: vm.memory_mib(),
        kernel_params: vm.kernel_params().to_owned(),
        shares: vec![ShareConfig {
            tag: SHARE_TAG.to_owned(),
            path: share.path().to_owned(),
            cache: CachePolicy::Auto,
            protocol: ShareProtocol::Fuse {
                writeback: false,
                dax_window_mib: 0,
            },
            watch: None,
        }],
        disks: Vec::new(),
        nics: Vec::new(),
        file_servers: Vec::new(),
        guest_cid: GUEST_CID,
        ready_port: READY_PORT,
    };
    let (kernel, initramfs) = (open(vm.kernel())?, open(vm.initramfs())?);
    let (console, output) = io::pipe().map_err(|err| failed(&err))?;
    let (mut command, socket) = worker::command(shim).map_err(|err| failed(&err))?;
    let mut worker = command.spawn().map_err(|err| failed(&err))?;
    drop(command);
    let console = std::thread::spawn(move || last_lines(console));
    let errors = worker.stderr.take().expect("it is piped");
    let errors = std::thread::spawn(move || last_lines(errors));
    let request = Request {
        id: 0,
        call: Call::Boot(config),
    };
    let files = [kernel.as_fd(), initramfs.as_fd(), output.as_fd()];
    let sent = control::send(&socket, &request, &files).map_err(io::Error::from);
    drop(output);
    let limit = vm.boot_timeout();
    let outcome = sent.and_then(|()| outcome(&socket, begin + limit));
    let took = begin.elapsed();
    // The worker ends with it, and with the worker the writers of console and errors.
    drop(socket);
    let ended = worker.wait();
    let said = [("console", console), ("worker", errors)].map(|(who, lines)| {
        match lines.join().unwrap_or_default().as_str() {
            "" => format!("Its {who} said nothing."),
            lines => format!("Its {who} ended with\n{lines}"),
        }
    });
    let what = match outcome.map_err(|err| failed(&err))? {
        Outcome::Ready => return Ok(format!("a guest was ready after {} ms", took.as_millis())),
        Outcome::Refused(message) => return Err(Problem::new(message, CANNOT_BUILD)),
        Outcome::Ended(reason) => format!("the VM ended before its guest was ready: {reason}"),
        Outcome::WorkerEnded => {
            let status = ended.map_or_else(|err| err.to_string(), |status| status.to_string());
            format!("the VM's process ended before the guest was ready ({status})")
        }
        Outcome::TooLate => format!("the guest was not ready after {} s", limit.as_secs()),
    };
    Err(Problem::new(
        what,
        format!("{LOOK_AT_CONSOLE}\n{}", said.join("\n")),
    ))
}

/// How a boot came out.
enum Outcome {
    Ready,
    /// The VM was not even built; with the reason.
    Refused(String),
    Ended(control::ExitReason),
    WorkerEnded,
    TooLate,
}

/// Waits for what the worker says, until `deadline`.
fn outcome(socket: &OwnedFd, deadline: Instant) -> io::Result<Outcome> {
    loop {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        let mut waited_for = [PollFd::new(socket, PollFlags::IN)];
        if retry_on_intr(|| poll(&mut waited_for, Some(&left)))? == 0 {
            return Ok(Outcome::TooLate);
        }
        match control::recv::<Message>(socket)? {
            None => return Ok(Outcome::WorkerEnded),
            Some((Message::Event(Event::Ready), _)) => return Ok(Outcome::Ready),
            Some((Message::Event(Event::Exited(reason)), _)) => return Ok(Outcome::Ended(reason)),
            // Nothing is watched.
            Some((Message::Event(Event::FilesChanged), _)) => {}
            Some((Message::Reply { result, .. }, _)) => {
                if let Err(message) = result {
                    return Ok(Outcome::Refused(message));
                }
            }
        }
    }
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
