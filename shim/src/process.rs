//! One process of a container, as containerd sees it: the container's first one, or one of `Exec`.
//!
//! ```text
//! Created ──start──► Starting ──► Running ──exit──► Stopped
//!    │                  └── failed: back (first process) or Stopped (exec)
//!    └──────────── exit (killed before its start) ────► Stopped
//! ```
//!
//! `Starting` lasts until the event of the start is published; an exit that is known earlier waits for it, so that
//! containerd never sees `TaskExit` before `TaskStart`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::error::Error;
use crate::streams::{Stdio, Streams};

/// SIGKILL, as requests number it.
pub(crate) const KILL: u32 = 9;

/// Exit status of a process that was killed, or whose VM was.
pub(crate) const KILLED: u32 = 128 + KILL;

/// Exit status of an exec that could not be started.
pub(crate) const NOT_STARTED: u32 = 255;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An exit that is known of now. The host's clock counts, as for every other time that containerd gets.
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProcessState {
    Created,
    Starting,
    Running,
    Stopped(Exit),
}

impl ProcessState {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created | Self::Starting => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TtySize {
    pub(crate) columns: u32,
    pub(crate) rows: u32,
}

#[derive(Debug)]
pub(crate) struct Process {
    /// Empty for a container's first process.
    exec_id: String,
    stdio: Stdio,
    state: watch::Sender<ProcessState>,
    streams: Mutex<Option<Streams>>,
    /// Stdin was closed before there were streams.
    stdin_closed: AtomicBool,
    tty_size: Mutex<TtySize>,
}

impl Process {
    pub(crate) fn new(exec_id: String, stdio: Stdio, tty_size: TtySize) -> Self {
        Self {
            exec_id,
            stdio,
            state: watch::Sender::new(ProcessState::Created),
            streams: Mutex::new(None),
            stdin_closed: AtomicBool::new(false),
            tty_size: Mutex::new(tty_size),
        }
    }

    pub(crate) fn exec_id(&self) -> &str {
        &self.exec_id
    }

    pub(crate) fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    pub(crate) fn state(&self) -> ProcessState {
        *self.state.borrow()
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        match self.state() {
            ProcessState::Stopped(exit) => Some(exit),
            ProcessState::Created | ProcessState::Starting | ProcessState::Running => None,
        }
    }

    pub(crate) fn tty_size(&self) -> TtySize {
        *lock(&self.tty_size)
    }

    pub(crate) fn set_tty_size(&self, size: TtySize) {
        *lock(&self.tty_size) = size;
    }

    /// Created → Starting; the caller has to call [`Process::started`] or [`Process::not_started`].
    pub(crate) fn begin_start(&self) -> Result<(), Error> {
        let mut before = ProcessState::Created;
        let begun = self.state.send_if_modified(|state| {
            before = *state;
            if *state == ProcessState::Created {
                *state = ProcessState::Starting;
            }
            *state != before
        });
        if begun {
            return Ok(());
        }
        Err(Error::WrongState {
            verb: "start",
            state: match before {
                ProcessState::Starting => "running",
                other => other.name(),
            },
            subject: "process",
        })
    }

    /// Starting → Running, after the event of the start is published.
    pub(crate) fn started(&self) {
        self.state.send_replace(ProcessState::Running);
    }

    /// Starting → `state`, because the start failed.
    pub(crate) fn not_started(&self, state: ProcessState) {
        self.state.send_replace(state);
    }

    /// Waits until no start is under way.
    pub(crate) async fn settled(&self) {
        let mut state = self.state.subscribe();
        // The sender lives as long as `self`.
        let _ = state
            .wait_for(|&state| state != ProcessState::Starting)
            .await;
    }

    /// Records the exit, once no start is under way.
    pub(crate) async fn ended(&self, exit: Exit) {
        self.settled().await;
        self.state.send_replace(ProcessState::Stopped(exit));
    }

    /// Waits for the exit.
    pub(crate) async fn wait(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let ProcessState::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            state
                .changed()
                .await
                .expect("the sender lives as long as self");
        }
    }

    /// Keeps the streams until [`Process::take_streams`].
    pub(crate) fn attach(&self, streams: Streams) {
        let mut attached = lock(&self.streams);
        if self.stdin_closed.load(Ordering::Relaxed) {
            streams.close_stdin();
        }
        *attached = Some(streams);
    }

    /// Begins to read standard input, see [`Streams::open_stdin`].
    pub(crate) fn open_stdin(&self) {
        if let Some(streams) = lock(&self.streams).as_ref() {
            streams.open_stdin();
        }
    }

    pub(crate) fn take_streams(&self) -> Option<Streams> {
        lock(&self.streams).take()
    }

    /// Ends the process's standard input, see [`Streams::close_stdin`]. Counts before the start, too.
    pub(crate) fn close_stdin(&self) {
        let attached = lock(&self.streams);
        self.stdin_closed.store(true, Ordering::Relaxed);
        if let Some(streams) = attached.as_ref() {
            streams.close_stdin();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn process() -> Arc<Process> {
        Arc::new(Process::new(
            String::new(),
            Stdio::default(),
            TtySize::default(),
        ))
    }

    #[tokio::test]
    async fn life_of_a_process() {
        let process = process();
        assert_eq!(process.state().name(), "created");
        process.begin_start().unwrap();
        process.started();
        assert_eq!(process.state().name(), "running");
        let exit = Exit::now(42);
        process.ended(exit).await;
        assert_eq!(process.exit(), Some(exit));
        assert_eq!(process.wait().await, exit);
    }

    #[tokio::test]
    async fn second_start_is_refused_in_every_state() {
        let process = process();
        process.begin_start().unwrap();
        let texts = async |process: &Process| process.begin_start().unwrap_err().to_string();
        assert_eq!(texts(&process).await, "cannot start a running process");
        process.started();
        assert_eq!(texts(&process).await, "cannot start a running process");
        process.ended(Exit::now(0)).await;
        assert_eq!(texts(&process).await, "cannot start a stopped process");
    }

    #[tokio::test]
    async fn exit_waits_for_the_end_of_a_start() {
        let process = process();
        process.begin_start().unwrap();
        let ending = tokio::spawn({
            let process = process.clone();
            async move { process.ended(Exit::now(1)).await }
        });
        tokio::task::yield_now().await;
        assert!(process.exit().is_none());
        process.started();
        ending.await.unwrap();
        assert_eq!(process.exit().unwrap().status, 1);
    }

    #[tokio::test]
    async fn all_waiters_see_the_exit() {
        let process = process();
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let process = process.clone();
                tokio::spawn(async move { process.wait().await.status })
            })
            .collect();
        tokio::task::yield_now().await;
        process.ended(Exit::now(KILLED)).await;
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), 137);
        }
    }
}
