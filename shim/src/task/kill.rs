//! `Kill`: sends a signal to a process, or to all of a container.

use std::sync::Arc;
use std::time::Duration;

use log::warn;

use crate::container::Container;
use crate::error::Error;
use crate::process::{KILL, ProcessState};
use crate::sandbox::Sandbox;

/// How long a container may outlive SIGKILL: as long as the system calls that its processes are in.
const OBEY_LIMIT: Duration = Duration::from_secs(30);

/// How long an agent may take for a question that costs it nothing before its guest counts as stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

impl Sandbox {
    /// Sends `signal`. An ended process is `NotFound`, as with runc.
    pub(crate) async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let is_exec = !exec_id.is_empty();
        match process.state() {
            ProcessState::Stopped(_) => return Err(Error::ProcessFinished),
            // A created container has a process, that waits to be started; an exec has none before its start.
            ProcessState::Created | ProcessState::Starting if is_exec => {
                return Err(Error::ProcessNotStarted);
            }
            ProcessState::Created | ProcessState::Starting | ProcessState::Running => {}
        }
        if signal == KILL && !is_exec {
            self.insist(container.clone());
        }
        let target = container.target(&process);
        let agent = container.vm().agent();
        match agent.signal_process(&target, signal, all && !is_exec).await {
            // The VM took the process with it; that its exit is published is a matter of moments.
            Err(Error::VmEnded(_)) => Err(Error::ProcessFinished),
            result => result,
        }
    }

    /// Ends the VM if a container does not end although it is killed: the guest, which is asked to do that, may be stuck or
    /// hostile, and nobody else could get rid of it. As long as the VM is others' too, it is for them, unless it is stuck, or
    /// the container is killed once more: containerd ends a pod's containers before the pod, which would never be ended.
    fn insist(self: &Arc<Self>, container: Arc<Container>) {
        let sandbox = self.clone();
        let once_more = container.outlives_kill();
        tokio::spawn(async move {
            let ended = tokio::time::timeout(OBEY_LIMIT, container.init().wait()).await;
            if ended.is_ok() {
                return;
            }
            container.set_outlives_kill();
            let of_no_use = container.is_sandbox() || sandbox.has_no_other(container.id());
            if once_more || of_no_use || !answers(&container).await {
                warn!("{} outlives SIGKILL, so its VM is ended", container.id());
                container.vm().stop().await;
            }
        });
    }
}

/// Whether the guest's agent still answers.
async fn answers(container: &Container) -> bool {
    let asked = container.vm().agent().list_processes(container.id());
    tokio::time::timeout(ANSWER_LIMIT, asked)
        .await
        .is_ok_and(|answer| !matches!(answer, Err(Error::AgentGone { .. })))
}
