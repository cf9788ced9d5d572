//! `Start`: runs the first process of a created container, or a process that `Exec` added.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim::protos::events::task::{TaskExecStarted, TaskOOM, TaskStart};
use husk_protocol::agent::ExecProcessRequest;
use log::debug;

use super::create::connect;
use crate::container::{Container, Exec};
use crate::error::Error;
use crate::hooks;
use crate::process::{Exit, NOT_STARTED, ProcessState};
use crate::sandbox::Sandbox;
use crate::streams::{self, LogIdentity};

/// How long containerd may take for the news of an OOM kill before it gets the next.
const OOM_EVENT_LIMIT: Duration = Duration::from_secs(60);

impl Sandbox {
    /// Starts a process and returns the pid of the VM's worker.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            self.start_init(&container).await?;
        } else {
            self.start_exec(&container, exec_id).await?;
        }
        Ok(container.vm().pid())
    }

    async fn start_init(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), Error> {
        let init = container.init();
        init.begin_start()?;
        if let Err(err) = container.vm().agent().start_container(container.id()).await {
            // It can still be killed and deleted.
            init.not_started(ProcessState::Created);
            return Err(err);
        }
        init.open_stdin();
        self.publish(TaskStart {
            container_id: container.id().to_owned(),
            pid: container.vm().pid(),
            ..Default::default()
        });
        init.started();
        self.watch_oom(container.clone());
        let hooks = &container.hooks().poststart;
        hooks::run_all("poststart", hooks, &container.hook_state(), "running").await;
        Ok(())
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec_id: &str,
    ) -> Result<(), Error> {
        let exec = container.exec(exec_id)?;
        if container.init().exit().is_some() {
            return Err(Error::InitNotRunning {
                id: container.id().to_owned(),
            });
        }
        container.begin_exec(&exec)?;
        let size = exec.process.tty_size();
        if let Err(err) = self.run_exec(container, &exec).await {
            let exit = Exit::now(NOT_STARTED);
            exec.process.not_started(ProcessState::Stopped(exit));
            return Err(err);
        }
        self.publish(TaskExecStarted {
            container_id: container.id().to_owned(),
            exec_id: exec_id.to_owned(),
            pid: container.vm().pid(),
            ..Default::default()
        });
        exec.process.started();
        self.watch_exit(container.clone(), exec.process.clone());
        if exec.process.tty_size() != size {
            // Resized while it started, which may have been too late for the start.
            let size = exec.process.tty_size();
            if let Err(err) = self.resize_pty(container.id(), exec_id, size).await {
                debug!("terminal of {exec_id} is not resized: {}", err.chain());
            }
        }
        Ok(())
    }

    async fn run_exec(&self, container: &Container, exec: &Exec) -> Result<(), Error> {
        let process = &exec.process;
        let identity = LogIdentity {
            namespace: self.namespace(),
            id: process.exec_id(),
        };
        let ends = streams::open(process.stdio(), identity).await?;
        connect(ends, container.vm(), process, async |stdio| {
            let request = ExecProcessRequest {
                container_id: container.id().to_owned(),
                exec_id: process.exec_id().to_owned(),
                process: exec.spec.clone(),
                stdio: Some(stdio).into(),
                ..Default::default()
            };
            container.vm().agent().exec_process(request).await
        })
        .await?;
        process.open_stdin();
        Ok(())
    }

    /// Reports every OOM kill in the container, until the container or the VM is gone.
    fn watch_oom(self: &Arc<Self>, container: Arc<Container>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let mut seen = 0;
            loop {
                match container.vm().agent().wait_oom(container.id(), seen).await {
                    Ok(kills) if kills > seen => {
                        seen = kills;
                        sandbox.publish(TaskOOM {
                            container_id: container.id().to_owned(),
                            ..Default::default()
                        });
                        // A guest that kills without end must not fill the queue.
                        sandbox.events().flush(OOM_EVENT_LIMIT).await;
                    }
                    Ok(kills) => {
                        debug!("no OOM kills beyond {kills} of {}", container.id());
                        return;
                    }
                    Err(err) => {
                        debug!(
                            "OOM kills of {} are not watched: {}",
                            container.id(),
                            err.chain()
                        );
                        return;
                    }
                }
            }
        });
    }
}
