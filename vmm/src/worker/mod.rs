//! The worker: the process in which one VM lives, and nothing else. The shim starts it from its own binary, with one end
//! of the control socket ([`crate::control`]), and it ends with the VM, with the socket, or with the shim.
//!
//! ```text
//! main ── Boot ──► jail ──► VM built ──► system calls filtered ──► vCPUs run ──► events and requests ──► Exited
//!   └────────────────┴──────────┴───────── any failure: Err to Boot, and the process ends
//! ```
//!
//! It has no runtime and one thread of its own, which waits in epoll; the other threads are the VM's.

mod boot;
mod inbox;
mod jail;
mod logger;
mod seccomp;
mod service;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Command, ExitCode, Stdio};

use command_fds::{CommandFdExt, FdMapping};

use rustix::process::Signal;

/// The first argument that makes the shim's program a worker.
pub const ROLE: &str = "vmm-worker";

/// The descriptor on which a worker finds its control socket.
pub const SOCKET: RawFd = 3;

/// The variable of the environment that holds the level of the worker's log, by the names of the crate `log`.
pub const LOG_LEVEL: &str = "HUSK_LOG";

/// What ps(1) shows in the column of names.
const PROCESS_NAME: &std::ffi::CStr = c"husk-vmm";

/// What starts a worker from `program`, the shim's, with a piped standard error; and the caller's end of its control socket.
///
/// The worker dies with the thread that spawns it. The command holds the worker's end of the socket: as long as it is not
/// dropped, the end of the worker does not close the socket.
///
/// # Errors
/// Of socketpair(2).
pub fn command(program: impl AsRef<OsStr>) -> io::Result<(Command, OwnedFd)> {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    let mut command = Command::new(program);
    command
        .arg(ROLE)
        .env_clear()
        .env(LOG_LEVEL, log::max_level().as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .fd_mappings(vec![FdMapping {
            parent_fd: theirs,
            child_fd: SOCKET,
        }])
        .expect("one descriptor cannot collide");
    Ok((command, ours))
}

/// Runs the worker on the control socket `control` and returns the process's exit code.
///
/// To be called first thing in a new process: it closes every descriptor but `control` and the standard ones, and takes
/// the place of the process's logger (standard error). The process dies with the thread that made it.
#[must_use]
pub fn main(control: OwnedFd) -> ExitCode {
    logger::install();
    match become_worker(&control).and_then(|()| service::run(control, boot::boot)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            log::error!("{}", one_line(&err));
            ExitCode::FAILURE
        }
    }
}

/// Why the worker ends without the VM having ended.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("cannot become a worker")]
    Become(#[source] io::Error),
    #[error("cannot speak with the shim")]
    Control(#[source] crate::control::FrameError),
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
    /// It has been told to the shim as well.
    #[error("no VM was started: {0}")]
    NotBooted(String),
}

fn become_worker(control: &OwnedFd) -> Result<(), WorkerError> {
    let become_worker = || -> io::Result<()> {
        // Should the parent have died before this, nobody holds the other end of the control socket, whose end is seen
        // at the first receipt.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        rustix::thread::set_name(PROCESS_NAME)?;
        limit_arenas();
        ignore_file_size_signal();
        close_all_but(control)
    };
    become_worker().map_err(WorkerError::Become)
}

/// Threads past the eighth share the heaps of the others. Unless told a limit, the allocator counts the host's processors
/// when it gets there, in a file that the jail does not have and by a call that the filters do not allow.
fn limit_arenas() {
    const ARENAS: libc::c_int = 8;
    // SAFETY: changes a setting of the allocator, which takes its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
}

/// A guest that writes beyond RLIMIT_FSIZE is told so (EFBIG), and does not end the process.
fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, so there is nothing for it to interrupt.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Closes what the shim, or whoever started it, has let slip into this process.
fn close_all_but(control: &OwnedFd) -> io::Result<()> {
    const FIRST_NOT_STANDARD: libc::c_uint = 3;
    let control =
        libc::c_uint::try_from(control.as_raw_fd()).expect("a descriptor is not negative");
    close_range(FIRST_NOT_STANDARD, control.saturating_sub(1))?;
    close_range(control + 1, libc::c_uint::MAX)
}

fn close_range(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: nothing in this new process owns a descriptor yet, save the control socket, which is not in the range.
    match unsafe { libc::close_range(first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An error with its sources.
fn one_line(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(err) = source {
        text.push_str(": ");
        text.push_str(&err.to_string());
        source = err.source();
    }
    text
}
