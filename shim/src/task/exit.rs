//! What happens when a process ends: not a verb, but what half of them wait for.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim::protos::events::task::{TaskExit, TaskOOM};
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use log::warn;

use crate::agent::Target;
use crate::cgroup::PodCgroup;
use crate::container::Container;
use crate::error::Error;
use crate::process::{Exit, KILL, KILLED, Process, ProcessState};
use crate::sandbox::Sandbox;

/// How long the exits of execs may take to be known after their container's first process has ended.
const EXECS_LIMIT: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Waits in a task of its own for the end of `process`, records it and publishes it. A process whose VM ends was
    /// killed.
    pub(crate) fn watch_exit(self: &Arc<Self>, container: Arc<Container>, process: Arc<Process>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let target = container.target(&process);
            let waited = container.vm().agent().wait_process(&target).await;
            let status = waited.unwrap_or_else(|err| {
                if !matches!(err, Error::VmEnded(_)) {
                    warn!("the end of {target:?} is unknown: {}", err.chain());
                }
                sandbox.report_host_oom(&process, &target);
                KILLED
            });
            if process.exec_id().is_empty() {
                end_execs(&container).await;
            }
            let exit = Exit::now(status);
            process.ended(exit).await;
            sandbox.publish(TaskExit {
                container_id: container.id().to_owned(),
                // The id of the container for its first process, as in runc's shim.
                id: match process.exec_id() {
                    "" => container.id().to_owned(),
                    exec_id => exec_id.to_owned(),
                },
                pid: container.vm().pid(),
                exit_status: exit.status,
                exited_at: Some(timestamp(exit)).into(),
                ..Default::default()
            });
            if process.exec_id().is_empty() {
                sandbox.demand_nothing(container.vm(), container.id()).await;
            }
        });
    }
}

impl Sandbox {
    /// If it was the host's OOM killer that ended the VM, the container's first process was killed by it.
    fn report_host_oom(&self, process: &Process, target: &Target) {
        let is_first = process.exec_id().is_empty();
        if is_first && self.cgroup().is_some_and(PodCgroup::has_oom_killed) {
            warn!(
                "{} was killed with its VM by the host's OOM killer",
                target.id
            );
            self.publish(TaskOOM {
                container_id: target.id.clone(),
                ..Default::default()
            });
        }
    }
}

/// Waits for the execs of a container whose first process has ended: their exits are published before its own.
async fn end_execs(container: &Container) {
    let running: Vec<_> = container
        .execs()
        .into_iter()
        .filter(|exec| exec.process.state() == ProcessState::Running)
        .collect();
    if running.is_empty() {
        return;
    }
    if !container.own_pid_namespace() {
        // The kernel does it only where the first process was the namespace's init.
        let target = container.target(container.init());
        let killed = container.vm().agent().signal_process(&target, KILL, true);
        if let Err(err) = killed.await {
            warn!("execs of {} are left: {}", container.id(), err.chain());
        }
    }
    let ended = async {
        for exec in running {
            exec.process.wait().await;
        }
    };
    if tokio::time::timeout(EXECS_LIMIT, ended).await.is_err() {
        warn!("execs of {} outlive its first process", container.id());
    }
}

/// The time of an exit for containerd.
pub(crate) fn timestamp(exit: Exit) -> Timestamp {
    exit.at.into()
}
