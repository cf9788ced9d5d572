//! Starting the process that builds containers ([`crate::creator`]), and hearing from it.
//!
//! libcontainer forks, and forking is for processes with one thread; so each container and each exec'ed process is built
//! by the agent's own program, run again for that one order, which then ends and leaves what it has built to the agent,
//! the parent of all orphans. Reports come through a pipe that the new program's own execve closes, so that its start,
//! too, is an event: the last report before the end of the pipe tells how far it came.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::Pid;
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, User};
use rustix::io::FdFlags;
use rustix::pipe::PipeFlags;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;

use crate::error::{During, Error, Result};
use crate::streams::ChildEnds;

/// The role of the agent's program that follows an [`Order`].
pub(crate) const CREATOR: &str = "creator";

/// Itself, also when nothing in the file system leads to it any more.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// What to build.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) work: Work,
    pub(crate) container_id: String,
    /// libcontainer's state of all containers.
    pub(crate) state_root: PathBuf,
    /// Where the terminal is handed over, if there is to be one.
    pub(crate) console: Option<PathBuf>,
    /// Level of the log, by `tracing`'s names.
    pub(crate) log_level: String,
    /// Descriptor for [`Report`]s.
    pub(crate) reports: i32,
    /// Descriptor that ends once the program may be started.
    pub(crate) gate: Option<i32>,
}

/// The kinds of work.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Work {
    /// A container, up to the OCI state `created`, from the bundle at this path. A pod's sandbox if `sandbox`.
    Create { bundle: PathBuf, sandbox: bool },
    /// A process in a running container, started, from an OCI process in a file.
    Exec {
        process: PathBuf,
        confinement: Option<Box<Confinement>>,
        sub_cgroup: Option<String>,
    },
    /// New limits for the container's cgroup, from OCI resources in a file.
    Update { resources: PathBuf },
}

/// What libcontainer does not apply to an exec'ed process, and the creator therefore does, last.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Confinement {
    /// Who the process is, in the container's user namespace; libcontainer would leave it in the guest's.
    pub(crate) identity: Option<Identity>,
    /// The container's system call filter.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    /// What the process may keep after that. Set unless it has `no_new_privs`, without which installing a filter takes a
    /// capability that the process may not be meant to have; and if it changes its user namespace.
    pub(crate) late_capabilities: Option<LinuxCapabilities>,
}

/// A user of a user namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// A process in the user namespace.
    pub(crate) with: i32,
    pub(crate) user: User,
}

/// What the creator, and the process that it made, tell.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The work is done. For a container or a process: its pid.
    Done { pid: Option<i32> },
    /// The process is about to execute its program. Unless a failure follows, it does.
    Executing,
    /// An error that libcontainer has met and will report in fewer words, or that happens where it can no longer report.
    Trouble { message: String },
    /// In words for the user.
    Failed { message: String },
}

/// The agent's end of the pipe of reports.
#[derive(Debug)]
pub(crate) struct Reports {
    lines: BufReader<pipe::Receiver>,
    /// Of a report that has come in part, when waiting for it was given up.
    line: Vec<u8>,
    /// The first that was reported: the others are its consequences.
    trouble: Option<String>,
}

impl Reports {
    fn new(pipe: pipe::Receiver) -> Self {
        Self {
            lines: BufReader::new(pipe),
            line: Vec::new(),
            trouble: None,
        }
    }

    /// The next report; `None` when there can be no more.
    async fn next(&mut self) -> Result<Option<Report>> {
        self.lines
            .read_until(b'\n', &mut self.line)
            .await
            .during("reading reports")?;
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line)
            .map(Some)
            .map_err(|source| Error::Malformed {
                what: "a report",
                source,
            })
    }

    /// Waits for the end of the work. The process may have started its program by then, if that is part of the work.
    /// May be given up and called again.
    pub(crate) async fn done(&mut self) -> Result<Option<Pid>> {
        loop {
            match self.next().await? {
                Some(Report::Done { pid }) => return Ok(pid.map(Pid::from_raw)),
                Some(Report::Executing) => {}
                Some(Report::Trouble { message }) => self.note(message),
                Some(Report::Failed { message }) => return Err(self.failure(message)),
                None => {
                    return Err(self.failure("the process that builds containers died".to_owned()));
                }
            }
        }
    }

    /// Waits until the program runs, or failed to.
    pub(crate) async fn executed(&mut self) -> Result<()> {
        let mut executing = false;
        loop {
            match self.next().await? {
                Some(Report::Executing) => executing = true,
                Some(Report::Trouble { message }) => self.note(message),
                Some(Report::Failed { message }) => return Err(Error::Launch(message)),
                Some(Report::Done { .. }) => {}
                None if executing => return Ok(()),
                None => {
                    let message = "the container ended before it executed its program";
                    return Err(self.failure(message.to_owned()));
                }
            }
        }
    }

    fn note(&mut self, trouble: String) {
        self.trouble.get_or_insert(trouble);
    }

    fn failure(&mut self, message: String) -> Error {
        Error::Launch(self.trouble.take().unwrap_or(message))
    }
}

/// A creator at work.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) reports: Reports,
    /// Dropped when the program may be started; only where the order has a console.
    pub(crate) gate: Option<OwnedFd>,
}

/// What is the same for every order.
#[derive(Debug)]
pub(crate) struct Launcher {
    pub(crate) state_root: PathBuf,
    pub(crate) log_level: String,
}

impl Launcher {
    /// Starts a creator. With a console, the program waits at the gate.
    pub(crate) fn launch(
        &self,
        container_id: &str,
        work: Work,
        console: Option<&Path>,
        stdio: ChildEnds,
    ) -> Result<Launch> {
        const FAILED: &str = "starting the process that builds containers";
        let (reports, child_reports) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).during(FAILED)?;
        let gate = match console {
            Some(_) => Some(rustix::pipe::pipe_with(PipeFlags::CLOEXEC).during(FAILED)?),
            None => None,
        };
        let (child_gate, gate) = gate.unzip();
        let order = Order {
            work,
            container_id: container_id.to_owned(),
            state_root: self.state_root.clone(),
            console: console.map(Path::to_owned),
            log_level: self.log_level.clone(),
            reports: child_reports.as_raw_fd(),
            gate: child_gate.as_ref().map(AsRawFd::as_raw_fd),
        };
        let order = serde_json::to_string(&order).map_err(|source| Error::Malformed {
            what: "an order",
            source,
        })?;
        // The child keeps these two. Nothing else in this process starts programs, so no other child sees them.
        for descriptor in [Some(&child_reports), child_gate.as_ref()]
            .into_iter()
            .flatten()
        {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty()).during(FAILED)?;
        }
        // The reaper waits for it, as for every child.
        Command::new(OWN_PROGRAM)
            .args([CREATOR, &order])
            .env_clear()
            .current_dir("/")
            .stdin(stdio.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(stdio.stdout.map_or_else(Stdio::null, Stdio::from))
            .stderr(stdio.stderr.map_or_else(Stdio::null, Stdio::from))
            .spawn()
            .during(FAILED)?;
        let reports = pipe::Receiver::from_owned_fd(reports).during(FAILED)?;
        Ok(Launch {
            reports: Reports::new(reports),
            gate,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn reports(said: &[Report]) -> Reports {
        let (read_end, write_end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let mut write_end = std::fs::File::from(write_end);
        for report in said {
            let mut line = serde_json::to_vec(report).expect("plain data");
            line.push(b'\n');
            write_end.write_all(&line).expect("there is room");
        }
        Reports::new(pipe::Receiver::from_owned_fd(read_end).expect("a pipe"))
    }

    fn failed(message: &str) -> Report {
        Report::Failed {
            message: message.to_owned(),
        }
    }

    #[tokio::test]
    async fn container_is_created_then_started() {
        let mut reports = reports(&[Report::Done { pid: Some(5) }, Report::Executing]);
        assert_eq!(reports.done().await.expect("done"), Some(Pid::from_raw(5)));
        reports.executed().await.expect("started");
    }

    #[tokio::test]
    async fn first_failure_is_the_one_that_is_told() {
        let mut reports = reports(&[failed("no such program"), failed("some consequence")]);
        let error = reports.done().await.expect_err("it failed");
        assert_eq!(error.to_string(), "no such program");
    }

    #[tokio::test]
    async fn first_trouble_is_the_reason_of_the_failure() {
        let trouble = |message: &str| Report::Trouble {
            message: message.to_owned(),
        };
        let said = [
            trouble("no such folder"),
            trouble("no root file system"),
            failed("failed"),
        ];
        let error = reports(&said).done().await.expect_err("it failed");
        assert_eq!(error.to_string(), "no such folder");
        let error = reports(&[trouble("a hook failed")])
            .executed()
            .await
            .expect_err("it failed");
        assert_eq!(error.to_string(), "a hook failed");
    }

    #[tokio::test]
    async fn program_that_cannot_be_executed_fails_the_start() {
        let mut reports = reports(&[Report::Executing, failed("exec format error")]);
        let error = reports.executed().await.expect_err("it failed");
        assert_eq!(error.to_string(), "exec format error");
    }

    #[tokio::test]
    async fn silence_is_not_success() {
        assert!(reports(&[]).done().await.is_err());
        assert!(reports(&[]).executed().await.is_err());
    }
}
