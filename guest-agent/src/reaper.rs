//! The one place where children are waited for. The agent is PID 1: every orphan of the guest becomes its child, and the
//! processes it cares for (the first process of a container, exec'ed processes) arrive the same way, when the process
//! that built them ends. So nobody but [`Reaper::run`] calls wait, and whoever wants an exit status asks here.
//!
//! A process may end before its pid is known to the agent. Exits are therefore kept while an [`Expectation`] is open:
//!
//! ```text
//! expect() ── spawn, learn the pid ── claim(pid) ── exit status, whether the process ended before or after the claim
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::sys::signal;
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::watch;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255; 128 + signal for a process that a signal ended.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// Resolves to a process' [`Exit`]; any number of these may watch one process.
pub(crate) type ExitWatch = watch::Receiver<Option<Exit>>;

/// Waits for every child and hands out exit statuses.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    children: Mutex<Children>,
}

#[derive(Debug, Default)]
struct Children {
    claimed: HashMap<Pid, watch::Sender<Option<Exit>>>,
    /// Exits of processes that nobody has claimed yet; empty unless somebody expects a process.
    unclaimed: HashMap<Pid, Exit>,
    expectations: usize,
}

/// While this lives, no exit status is thrown away.
#[derive(Debug)]
pub(crate) struct Expectation {
    reaper: Arc<Reaper>,
}

impl Reaper {
    /// Announces that a process is about to be started whose pid is not known yet.
    pub(crate) fn expect(self: &Arc<Self>) -> Expectation {
        self.lock().expectations += 1;
        Expectation {
            reaper: Arc::clone(self),
        }
    }

    /// Reaps for as long as the agent lives. `signals` must have been registered before the first child was started.
    pub(crate) async fn run(self: Arc<Self>, mut signals: Signal) {
        loop {
            self.reap();
            signals.recv().await;
        }
    }

    /// Registers for SIGCHLD; must be called in the runtime.
    pub(crate) fn signals() -> std::io::Result<Signal> {
        tokio::signal::unix::signal(SignalKind::child())
    }

    /// Takes every child that has ended. One SIGCHLD may stand for many children.
    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = Pid::from_raw(pid.as_raw_nonzero().get());
                    if let Some(status) = status_of(status) {
                        self.ended(pid, status);
                    }
                }
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "children cannot be waited for");
                    return;
                }
            }
        }
    }

    fn ended(&self, pid: Pid, status: u32) {
        let exit = Exit {
            status,
            at: SystemTime::now(),
        };
        let mut children = self.lock();
        if let Some(watchers) = children.claimed.remove(&pid) {
            watchers.send_replace(Some(exit));
        } else if children.expectations > 0 {
            children.unclaimed.insert(pid, exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expectation {
    /// The process that was expected has this pid.
    pub(crate) fn claim(self, pid: Pid) -> ExitWatch {
        // A pid is free for the kernel to use again once it has been reaped. If it names a process now, then the exit
        // that was kept is that of a predecessor.
        let alive = signal::kill(pid, None).is_ok();
        self.claim_if(pid, alive)
    }

    fn claim_if(self, pid: Pid, alive: bool) -> ExitWatch {
        let mut children = self.reaper.lock();
        if let Some(exit) = children.unclaimed.remove(&pid)
            && !alive
        {
            return watch::channel(Some(exit)).1;
        }
        let (sender, receiver) = watch::channel(None);
        children.claimed.insert(pid, sender);
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut children = self.reaper.lock();
        children.expectations -= 1;
        if children.expectations == 0 {
            children.unclaimed.clear();
        }
    }
}

/// The status as the shim reports it; `None` if the process has not ended.
fn status_of(status: WaitStatus) -> Option<u32> {
    let (base, number) = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => (0, code),
        (None, Some(signal)) => (128, signal),
        (None, None) => return None,
    };
    u32::try_from(number).ok().map(|number| base + number)
}

/// Waits for the end of a process.
pub(crate) async fn exit_of(watch: &mut ExitWatch) -> Option<Exit> {
    // An error means that the reaper is gone, and with it the agent.
    watch
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: Pid = Pid::from_raw(4242);

    #[tokio::test]
    async fn exit_after_the_claim_arrives() {
        let reaper = Arc::new(Reaper::default());
        let mut watch = reaper.expect().claim_if(PID, true);
        reaper.ended(PID, 7);
        assert_eq!(exit_of(&mut watch).await.map(|exit| exit.status), Some(7));
    }

    #[tokio::test]
    async fn exit_before_the_claim_is_kept() {
        let reaper = Arc::new(Reaper::default());
        let expectation = reaper.expect();
        reaper.ended(PID, 9);
        let mut watch = expectation.claim_if(PID, false);
        assert_eq!(exit_of(&mut watch).await.map(|exit| exit.status), Some(9));
    }

    #[test]
    fn exit_of_a_predecessor_with_the_same_pid_is_not_taken() {
        let reaper = Arc::new(Reaper::default());
        let expectation = reaper.expect();
        reaper.ended(PID, 9);
        let watch = expectation.claim_if(PID, true);
        assert_eq!(*watch.borrow(), None);
    }

    #[test]
    fn exits_of_orphans_are_not_kept() {
        let reaper = Arc::new(Reaper::default());
        reaper.ended(PID, 0);
        let expectation = reaper.expect();
        reaper.ended(PID, 0);
        drop(expectation);
        assert!(reaper.lock().unclaimed.is_empty());
    }

    #[tokio::test]
    #[expect(
        clippy::zombie_processes,
        reason = "waiting for it is what the reaper is for"
    )]
    async fn real_children_are_reaped_with_their_status() {
        let reaper = Arc::new(Reaper::default());
        let signals = Reaper::signals().expect("SIGCHLD can be caught");
        let expectation = reaper.expect();
        let child = std::process::Command::new("/bin/sh")
            .args(["-c", "kill -TERM $$"])
            .spawn()
            .expect("there is a shell");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        let mut watch = expectation.claim(pid);
        tokio::spawn(Arc::clone(&reaper).run(signals));
        let exit = exit_of(&mut watch).await.expect("it ended");
        assert_eq!(exit.status, 128 + 15);
    }
}
