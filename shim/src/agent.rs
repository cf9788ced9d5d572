//! The shim's client of the guest's agent: `husk.agent.v1`, with the VM's end and a deadline as further ways out of
//! every call, and errors in the shim's own type.

use std::future::Future;
use std::time::Duration;

use containerd_shim::protos::ttrpc;
use husk_protocol::agent::{
    Change, CreateContainerRequest, ExecProcessRequest, ListProcessesRequest,
    PauseContainerRequest, Process, RaiseChangesRequest, RemoveContainerRequest,
    RemoveProcessRequest, ResizeTtyRequest, ResumeContainerRequest, SignalProcessRequest,
    StartContainerRequest, StatsContainerRequest, StatsContainerResponse, UpdateContainerRequest,
    UpdateNetworkRequest, WaitOomRequest, WaitProcessRequest,
};
use husk_protocol::agent_ttrpc::AgentClient;
use log::warn;
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use crate::console::printable;
use crate::error::Error;
use crate::vm::End;

/// How long the agent may take for anything but waiting. Long, because a guest can be busy; there at all, because a
/// guest can be hostile, and a task of the shim that waits for ever is a leak.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// How long it may take to remove a container: as long as a disk to take what is still in the guest's memory.
const REMOVAL_LIMIT: Duration = Duration::from_secs(600);

/// How long the news of a VM's end may take to overtake the news that its connections failed: the worker has to be
/// reaped for it.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Longest message of the agent's that is passed on, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Names a process in the guest; without an `exec_id`, a container's first one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) id: String,
    pub(crate) exec_id: String,
}

/// A connection to the agent. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    end: End,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Agent")
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Speaks over `stream`, a connection to the agent's port, until the VM ends.
    pub(crate) fn new(stream: UnixStream, end: End) -> Self {
        let client = AgentClient::new(Client::new(Socket::from(stream)));
        Self { client, end }
    }

    /// Returns the guest's pid of the container's first process.
    pub(crate) async fn create_container(
        &self,
        request: CreateContainerRequest,
    ) -> Result<u32, Error> {
        self.call(
            "CreateContainer",
            self.client.create_container(Context::default(), &request),
        )
        .await
        .map(|created| created.pid)
    }

    pub(crate) async fn start_container(&self, id: &str) -> Result<(), Error> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            "StartContainer",
            self.client.start_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call_within(
            REMOVAL_LIMIT,
            "RemoveContainer",
            self.client.remove_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn exec_process(&self, request: ExecProcessRequest) -> Result<(), Error> {
        self.call(
            "ExecProcess",
            self.client.exec_process(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn remove_process(&self, target: &Target) -> Result<(), Error> {
        let request = RemoveProcessRequest {
            container_id: target.id.clone(),
            exec_id: target.exec_id.clone(),
            ..Default::default()
        };
        self.call(
            "RemoveProcess",
            self.client.remove_process(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// Returns the exit status of the process, when it has ended.
    pub(crate) async fn wait_process(&self, target: &Target) -> Result<u32, Error> {
        let request = WaitProcessRequest {
            container_id: target.id.clone(),
            exec_id: target.exec_id.clone(),
            ..Default::default()
        };
        let answer = self
            .wait(
                "WaitProcess",
                self.client.wait_process(Context::default(), &request),
            )
            .await?;
        // What else a guest may say is no exit status.
        Ok(answer.exit_status & 0xff)
    }

    pub(crate) async fn signal_process(
        &self,
        target: &Target,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: target.id.clone(),
            exec_id: target.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        self.call(
            "SignalProcess",
            self.client.signal_process(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn resize_tty(
        &self,
        target: &Target,
        columns: u32,
        rows: u32,
    ) -> Result<(), Error> {
        let request = ResizeTtyRequest {
            container_id: target.id.clone(),
            exec_id: target.exec_id.clone(),
            columns,
            rows,
            ..Default::default()
        };
        self.call(
            "ResizeTty",
            self.client.resize_tty(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn list_processes(&self, id: &str) -> Result<Vec<Process>, Error> {
        let request = ListProcessesRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            "ListProcesses",
            self.client.list_processes(Context::default(), &request),
        )
        .await
        .map(|answer| answer.processes)
    }

    pub(crate) async fn pause_container(&self, id: &str) -> Result<(), Error> {
        let request = PauseContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            "PauseContainer",
            self.client.pause_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn resume_container(&self, id: &str) -> Result<(), Error> {
        let request = ResumeContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            "ResumeContainer",
            self.client.resume_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// `resources` is JSON of the OCI type.
    pub(crate) async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources,
            ..Default::default()
        };
        self.call(
            "UpdateContainer",
            self.client.update_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn stats_container(&self, id: &str) -> Result<StatsContainerResponse, Error> {
        let request = StatsContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            "StatsContainer",
            self.client.stats_container(Context::default(), &request),
        )
        .await
    }

    /// Returns the count of OOM kills in the container, when it is more than `seen`.
    pub(crate) async fn wait_oom(&self, id: &str, seen: u64) -> Result<u64, Error> {
        let request = WaitOomRequest {
            container_id: id.to_owned(),
            seen,
            ..Default::default()
        };
        self.wait(
            "WaitOom",
            self.client.wait_oom(Context::default(), &request),
        )
        .await
        .map(|answer| answer.oom_kills)
    }

    pub(crate) async fn update_network(&self, request: &UpdateNetworkRequest) -> Result<(), Error> {
        self.call(
            "UpdateNetwork",
            self.client.update_network(Context::default(), request),
        )
        .await
        .map(drop)
    }

    pub(crate) async fn raise_changes(&self, changes: Vec<Change>) -> Result<(), Error> {
        let request = RaiseChangesRequest {
            changes,
            ..Default::default()
        };
        self.call(
            "RaiseChanges",
            self.client.raise_changes(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        rpc: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        self.call_within(ANSWER_LIMIT, verb, rpc).await
    }

    async fn call_within<T>(
        &self,
        limit: Duration,
        verb: &'static str,
        rpc: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        tokio::time::timeout(limit, self.wait(verb, rpc))
            .await
            .unwrap_or(Err(Error::AgentTimeout { verb, limit }))
    }

    async fn wait<T>(
        &self,
        verb: &'static str,
        rpc: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        let result = tokio::select! {
            result = rpc => result,
            reason = self.end.wait() => return Err(Error::VmEnded(reason.to_string())),
        };
        match result {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => Err(Error::Agent {
                verb,
                code: status.code(),
                message: message_of(status.message()),
            }),
            // The connection has failed, which most often is the VM's end. Then say that.
            Err(source) => match tokio::time::timeout(END_LIMIT, self.end.wait()).await {
                Ok(reason) => Err(Error::VmEnded(reason.to_string())),
                Err(_) => {
                    warn!("the agent's connection failed although the VM runs: {source}");
                    Err(Error::AgentGone { verb, source })
                }
            },
        }
    }
}

/// What the agent says of an error. It is logged and shown to people, and the guest is not trusted.
fn message_of(text: &str) -> String {
    let bytes = text.as_bytes();
    printable(bytes.get(..MAX_MESSAGE).unwrap_or(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_of_a_guest_is_one_short_line() {
        assert_eq!(message_of("a\nb\x1b[2J"), "a\u{fffd}b\u{fffd}[2J");
        assert_eq!(message_of(&"x".repeat(1 << 20)).len(), MAX_MESSAGE);
        assert!(message_of(&"ä".repeat(1 << 20)).len() <= MAX_MESSAGE + 3);
    }
}
