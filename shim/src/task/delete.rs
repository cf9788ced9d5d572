//! `Delete`: forgets an ended process; with the first one, the container and all that it holds.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim::protos::events::task::TaskDelete;
use containerd_shim::protos::ttrpc::Code;
use log::warn;

use super::exit::timestamp;
use crate::container::Container;
use crate::error::Error;
use crate::hooks;
use crate::process::{Exit, KILL, Process, ProcessState};
use crate::sandbox::Sandbox;

/// How long the output of a container's first process may take to be read; as in runc's shim.
const INIT_DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The same for an exec, whose children may go on and hold its output open.
const EXEC_DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// How long a process may take to end that was killed before its start.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What containerd is told.
#[derive(Debug)]
pub(crate) struct Deleted {
    pub(crate) pid: u32,
    pub(crate) exit: Exit,
}

impl Sandbox {
    /// Deletes an ended process, or one that was never started.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<Deleted, Error> {
        let container = self.container(id)?;
        let exit = if exec_id.is_empty() {
            self.delete_container(&container).await?
        } else {
            delete_exec(&container, exec_id).await?
        };
        Ok(Deleted {
            pid: container.vm().pid(),
            exit,
        })
    }

    async fn delete_container(&self, container: &Arc<Container>) -> Result<Exit, Error> {
        // containerd asks again when it has waited for some seconds, and takes a container for gone that is not found. Its disks
        // are given to others then.
        let deleted = container.deleted();
        deleted
            .get_or_try_init(async || self.end_and_free(container).await)
            .await
            .copied()
    }

    async fn end_and_free(&self, container: &Arc<Container>) -> Result<Exit, Error> {
        let exit = end(container).await?;
        drain(container.init(), INIT_DRAIN_LIMIT).await;
        for exec in container.execs() {
            drain(&exec.process, EXEC_DRAIN_LIMIT).await;
        }
        if container.vm().end().reason().is_none() {
            // The container's place in the guest; the host's part is freed whatever the guest says.
            if let Err(err) = container
                .vm()
                .agent()
                .remove_container(container.id())
                .await
            {
                warn!(
                    "the guest does not free {}: {}",
                    container.id(),
                    err.chain()
                );
            }
            container.disks().unplug(container.vm()).await;
        }
        if let Some(storage) = container.take_storage() {
            // Unmounting may wait for a disk.
            let unmounted = tokio::task::spawn_blocking(move || drop(storage)).await;
            unmounted.expect("unmounting does not panic");
        }
        let hooks = &container.hooks().poststop;
        hooks::run_all("poststop", hooks, &container.hook_state(), "stopped").await;
        self.remove(container.id());
        self.publish(TaskDelete {
            container_id: container.id().to_owned(),
            pid: container.vm().pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit)).into(),
            ..Default::default()
        });
        Ok(exit)
    }
}

/// Makes sure that the container's first process has ended: one that was only created is killed, one that runs is an
/// error.
async fn end(container: &Container) -> Result<Exit, Error> {
    let init = container.init();
    match init.state() {
        ProcessState::Stopped(exit) => Ok(exit),
        ProcessState::Created => {
            let target = container.target(init);
            match container
                .vm()
                .agent()
                .signal_process(&target, KILL, true)
                .await
            {
                // With the VM the process ends as well.
                Ok(()) | Err(Error::VmEnded(_)) => tokio::time::timeout(END_LIMIT, init.wait())
                    .await
                    .map_err(|_| cannot_delete("running")),
                Err(err) => Err(err),
            }
        }
        ProcessState::Starting | ProcessState::Running => {
            Err(cannot_delete(container.status_of(init).name()))
        }
    }
}

async fn delete_exec(container: &Container, exec_id: &str) -> Result<Exit, Error> {
    let exec = container.exec(exec_id)?;
    let exit = match exec.process.state() {
        ProcessState::Stopped(exit) => exit,
        // Never started: there is nothing of it in the guest.
        ProcessState::Created => {
            container.remove_exec(exec_id);
            return Ok(Exit::now(0));
        }
        ProcessState::Starting | ProcessState::Running => return Err(cannot_delete("running")),
    };
    drain(&exec.process, EXEC_DRAIN_LIMIT).await;
    if container.vm().end().reason().is_none() {
        let target = container.target(&exec.process);
        match container.vm().agent().remove_process(&target).await {
            // The guest never had one that could not be started.
            Ok(())
            | Err(Error::Agent {
                code: Code::NOT_FOUND,
                ..
            }) => {}
            Err(err) => warn!("the guest does not forget {target:?}: {}", err.chain()),
        }
    }
    container.remove_exec(exec_id);
    Ok(exit)
}

async fn drain(process: &Process, limit: Duration) {
    if let Some(streams) = process.take_streams() {
        streams.drain(limit).await;
    }
}

fn cannot_delete(state: &'static str) -> Error {
    Error::WrongState {
        verb: "delete",
        state,
        subject: "process",
    }
}
