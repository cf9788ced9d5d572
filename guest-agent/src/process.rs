//! A process that the shim knows by name: the first of a container, or one of exec.

use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::error::{During, Error, Result};
use crate::launch::Launch;
use crate::reaper::{Exit, ExitWatch, exit_of};
use crate::signals::Signal;
use crate::streams::{ChildEnds, Ports, Stdio};
use crate::terminal::{ConsoleSocket, Size, Terminal};

/// What a request says about standard streams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StdioRequest {
    pub(crate) terminal: bool,
    pub(crate) ports: Ports,
    pub(crate) size: Size,
}

/// A process that has been created; it may have ended.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    exit: ExitWatch,
    terminal: Option<Arc<Terminal>>,
}

impl Process {
    pub(crate) fn new(pid: Pid, exit: ExitWatch, terminal: Option<Arc<Terminal>>) -> Self {
        Self {
            pid,
            exit,
            terminal,
        }
    }

    /// As the guest's root PID namespace numbers it.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    pub(crate) fn watch(&self) -> ExitWatch {
        self.exit.clone()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        // The pid stays this process' until the reaper has its status, and the reaper runs on this very thread.
        if self.has_ended() {
            return Err(Error::Finished);
        }
        match signal.send(self.pid) {
            Err(Errno::ESRCH) => Err(Error::Finished),
            result => result.during("sending a signal"),
        }
    }

    pub(crate) fn terminal(&self) -> Option<&Arc<Terminal>> {
        self.terminal.as_ref()
    }
}

/// Waits for the end of a process whose `watch` was taken from it.
pub(crate) async fn wait(mut watch: ExitWatch) -> Result<Exit> {
    exit_of(&mut watch).await.ok_or(Error::Finished)
}

/// The standard streams of a process that is being made.
#[derive(Debug)]
pub(crate) enum Wiring {
    Pipes(ChildEnds),
    Terminal {
        socket: ConsoleSocket,
        stdio: Stdio,
        size: Size,
        uid: u32,
    },
}

impl Wiring {
    /// Makes what a process of this user is to be started with.
    pub(crate) fn new(
        stdio: Stdio,
        request: StdioRequest,
        uid: u32,
        socket: impl FnOnce() -> Result<ConsoleSocket>,
    ) -> Result<Self> {
        if request.terminal {
            Ok(Self::Terminal {
                socket: socket()?,
                stdio,
                size: request.size,
                uid,
            })
        } else {
            Ok(Self::Pipes(stdio.into_pipes(uid)?))
        }
    }

    /// Starts a creator with these streams and waits until it is done.
    pub(crate) async fn launch(
        self,
        start: impl FnOnce(Option<&ConsoleSocket>, ChildEnds) -> Result<Launch>,
    ) -> Result<(Pid, Launch, Option<Arc<Terminal>>)> {
        let (mut launch, terminal) = match self {
            Self::Pipes(ends) => (start(None, ends)?, None),
            Self::Terminal {
                socket,
                stdio,
                size,
                uid,
            } => {
                let mut launch = start(Some(&socket), ChildEnds::default())?;
                let terminal = tokio::select! {
                    terminal = socket.receive(uid) => terminal?,
                    // The work cannot be done before the terminal is here, so this is how it fails.
                    result = launch.reports.done() => {
                        result?;
                        return Err(Error::Launch("the process was given no terminal".to_owned()));
                    }
                };
                if size.is_set() {
                    terminal.resize(size)?;
                }
                stdio.into_terminal(&terminal);
                launch.gate = None;
                (launch, Some(terminal))
            }
        };
        let pid = launch.reports.done().await?;
        let pid = pid.ok_or_else(|| Error::Launch("the process has no pid".to_owned()))?;
        Ok((pid, launch, terminal))
    }
}
