//! The task service: each method translates the request, calls the verb, and translates the answer.
//!
//! ttrpc drops the future of a method whose caller goes away, or whose deadline passes. A verb that changes something
//! must not stop half-way, so it runs in a task of its own ([`to_the_end`]).

pub(crate) mod sandbox;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim::api::Status as ApiStatus;
use containerd_shim::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim::protos::api::ProcessInfo;
use containerd_shim::protos::shim::oci::ProcessDetails;
use containerd_shim::protos::shim_async::{Task, create_task};
use containerd_shim::protos::ttrpc::r#async::Service;
use containerd_shim::util::convert_to_any;
use containerd_shim::{TtrpcContext, TtrpcResult};
use log::{debug, warn};

use crate::container::Status;
use crate::error::Error;
use crate::process::TtySize;
use crate::sandbox::Sandbox;
use crate::streams::Stdio;
use crate::task::create::Create;
use crate::task::exec::Exec;
use crate::task::exit::timestamp;
use crate::task::state::State;

/// The name under which containerd 1 calls the service, and containerd 2 calls that of a shim that answers `start` with
/// a bare address. The messages are those of version 3.
const TASK_V2: &str = "containerd.task.v2.Task";

/// Serves a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct TaskService {
    sandbox: Arc<Sandbox>,
}

impl TaskService {
    pub(crate) fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    /// The service under every name that containerd knows it by.
    pub(crate) fn services(&self) -> HashMap<String, Service> {
        let v3 = create_task(Arc::new(self.clone()));
        let v2 = create_task(Arc::new(self.clone()))
            .into_values()
            .map(|service| (TASK_V2.to_owned(), service));
        v3.into_iter().chain(v2).collect()
    }
}

/// Runs a verb to its end, whether or not the caller waits for it.
async fn to_the_end<T: Send + 'static>(
    verb: &'static str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> TtrpcResult<T> {
    let result = match tokio::spawn(work).await {
        Ok(result) => result,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    };
    answer(verb, result)
}

/// Logs a failure, which travels no further than containerd.
fn answer<T>(verb: &'static str, result: Result<T, Error>) -> TtrpcResult<T> {
    result.map_err(|err| {
        match &err {
            // What clients run into every day.
            Error::ContainerNotFound { .. }
            | Error::ProcessNotFound { .. }
            | Error::ProcessFinished => debug!("{verb}: {err}"),
            _ => warn!("{verb}: {}", err.chain()),
        }
        err.into()
    })
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        req: CreateTaskRequest,
    ) -> TtrpcResult<CreateTaskResponse> {
        let sandbox = self.sandbox.clone();
        let create = Create {
            id: req.id,
            bundle: req.bundle.into(),
            rootfs: req.rootfs,
            stdio: Stdio {
                terminal: req.terminal,
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
            },
            checkpoint: req.checkpoint,
            options: req.options.into_option(),
        };
        let pid = to_the_end("create", async move { sandbox.create(create).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> TtrpcResult<StartResponse> {
        let sandbox = self.sandbox.clone();
        let start = async move { sandbox.start(&req.id, &req.exec_id).await };
        Ok(StartResponse {
            pid: to_the_end("start", start).await?,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        let sandbox = self.sandbox.clone();
        let delete = async move { sandbox.delete(&req.id, &req.exec_id).await };
        let deleted = to_the_end("delete", delete).await?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: Some(timestamp(deleted.exit)).into(),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> TtrpcResult<Empty> {
        let exec = Exec {
            id: req.id,
            exec_id: req.exec_id,
            stdio: Stdio {
                terminal: req.terminal,
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
            },
            spec: req
                .spec
                .into_option()
                .map(|any| any.value)
                .unwrap_or_default(),
        };
        answer("exec", self.sandbox.exec(exec))?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        let kill = async move {
            sandbox
                .kill(&req.id, &req.exec_id, req.signal, req.all)
                .await
        };
        to_the_end("kill", kill).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> TtrpcResult<WaitResponse> {
        let exit = answer("wait", self.sandbox.wait(&req.id, &req.exec_id).await)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit)).into(),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> TtrpcResult<StateResponse> {
        let state = answer("state", self.sandbox.state(&req.id, &req.exec_id))?;
        Ok(state_response(state, req.exec_id))
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.sandbox.connect(&req.id),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> TtrpcResult<PidsResponse> {
        let processes = answer("pids", self.sandbox.pids(&req.id).await)?;
        Ok(PidsResponse {
            processes: processes.into_iter().map(process_info).collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end("pause", async move { sandbox.pause(&req.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end("resume", async move { sandbox.resume(&req.id).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        let resources = req
            .resources
            .into_option()
            .map(|any| any.value)
            .unwrap_or_default();
        to_the_end("update", async move {
            sandbox.update(&req.id, &resources).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> TtrpcResult<StatsResponse> {
        let stats = answer("stats", self.sandbox.stats(&req.id).await)?;
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..Default::default()
        })
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> TtrpcResult<Empty> {
        let size = TtySize {
            columns: req.width,
            rows: req.height,
        };
        let resized = self.sandbox.resize_pty(&req.id, &req.exec_id, size).await;
        answer("resize", resized)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> TtrpcResult<Empty> {
        answer("closeio", self.sandbox.close_io(&req.id, &req.exec_id))?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        answer("checkpoint", Err(Error::Unimplemented("checkpoint")))
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        let shutdown = async move {
            sandbox.shutdown().await;
            Ok(())
        };
        to_the_end("shutdown", shutdown).await?;
        Ok(Empty::new())
    }
}

fn state_response(state: State, exec_id: String) -> StateResponse {
    StateResponse {
        id: state.id,
        bundle: state.bundle,
        pid: state.pid,
        status: match state.status {
            Status::Created => ApiStatus::CREATED,
            Status::Running => ApiStatus::RUNNING,
            Status::Pausing => ApiStatus::PAUSING,
            Status::Paused => ApiStatus::PAUSED,
            Status::Stopped => ApiStatus::STOPPED,
        }
        .into(),
        stdin: state.stdio.stdin,
        stdout: state.stdio.stdout,
        stderr: state.stdio.stderr,
        terminal: state.stdio.terminal,
        exit_status: state.exit.map_or(0, |exit| exit.status),
        exited_at: state.exit.map(timestamp).into(),
        exec_id,
        ..Default::default()
    }
}

fn process_info(process: husk_protocol::agent::Process) -> ProcessInfo {
    let details = (!process.exec_id.is_empty()).then(|| ProcessDetails {
        exec_id: process.exec_id,
        ..Default::default()
    });
    ProcessInfo {
        pid: process.pid,
        info: details
            .and_then(|details| convert_to_any(Box::new(details)).ok())
            .into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
