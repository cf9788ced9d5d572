//! The ttrpc service `husk.agent.v1.Agent`: translates requests, delegates to [`crate::container`], translates answers.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use futures::stream::StreamExt;
use husk_protocol::agent::{
    CreateContainerRequest, CreateContainerResponse, Empty, ExecProcessRequest,
    ExecProcessResponse, ListProcessesRequest, ListProcessesResponse, PauseContainerRequest,
    Process, RaiseChangesRequest, RemoveContainerRequest, RemoveProcessRequest, ResizeTtyRequest,
    ResumeContainerRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, Stdio, UpdateContainerRequest, UpdateNetworkRequest, WaitOomRequest,
    WaitOomResponse, WaitProcessRequest, WaitProcessResponse,
};
use husk_protocol::agent_ttrpc::{Agent, create_agent};
use nix::unistd::Pid;
use tokio_vsock::{VsockListener, VsockStream};
use ttrpc::Result as TtrpcResult;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::changes::Changes;
use crate::container::{self, Containers, Creation};
use crate::error::{Error, Result};
use crate::network;
use crate::process::{self, StdioRequest};
use crate::signals::Signal;
use crate::streams::Ports;
use crate::terminal::Size;

/// Serves on `listener` until the server that is returned is dropped.
pub(crate) async fn serve(
    containers: Arc<Containers>,
    listener: VsockListener,
) -> TtrpcResult<Server> {
    // A process of the guest has no business here.
    let of_host = listener.incoming().filter(|stream| {
        let of_host = stream.as_ref().map_or(true, is_of_host);
        std::future::ready(of_host)
    });
    let mut server = Server::new()
        .add_listener(Listener::new(of_host))
        .register_service(create_agent(Arc::new(Service {
            containers,
            changes: Changes::default(),
        })));
    server.start().await?;
    Ok(server)
}

fn is_of_host(stream: &VsockStream) -> bool {
    stream
        .peer_addr()
        .is_ok_and(|peer| peer.cid() == husk_protocol::HOST_CID)
}

struct Service {
    containers: Arc<Containers>,
    changes: Changes,
}

#[async_trait]
impl Agent for Service {
    async fn create_container(
        &self,
        _context: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> TtrpcResult<CreateContainerResponse> {
        let id = container_id(&request.container_id)?;
        let stdio = stdio(&request.stdio)?;
        let pid = self
            .containers
            .create(Creation {
                id,
                spec: &request.spec,
                sandbox: request.sandbox,
                volumes: &request.volumes,
                root_disk: request.root_disk.as_ref(),
                root_layers: request.root_layers.as_ref(),
                disk_devices: &request.disk_devices,
                folder: request.folder.get_or_default(),
                stdio,
            })
            .await?;
        tracing::info!(id, %pid, "container created");
        Ok(CreateContainerResponse {
            pid: number(pid),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _context: &TtrpcContext,
        request: StartContainerRequest,
    ) -> TtrpcResult<Empty> {
        self.containers.start(&request.container_id).await?;
        tracing::info!(id = request.container_id, "container started");
        Ok(Empty::new())
    }

    async fn remove_container(
        &self,
        _context: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> TtrpcResult<Empty> {
        self.containers.remove(&request.container_id).await?;
        tracing::info!(id = request.container_id, "container removed");
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _context: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> TtrpcResult<ExecProcessResponse> {
        if request.exec_id.is_empty() {
            return Err(Error::Invalid("the exec id is empty".to_owned()).into());
        }
        let stdio = stdio(&request.stdio)?;
        let pid = self
            .containers
            .exec(
                &request.container_id,
                &request.exec_id,
                &request.process,
                stdio,
            )
            .await?;
        Ok(ExecProcessResponse {
            pid: number(pid),
            ..Default::default()
        })
    }

    async fn wait_process(
        &self,
        _context: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> TtrpcResult<WaitProcessResponse> {
        let watch = {
            let container = self.containers.get(&request.container_id)?;
            container.process(&request.exec_id)?.watch()
        };
        let exit = process::wait(watch).await?;
        if let Ok(container) = self.containers.get(&request.container_id) {
            container.count_oom_kills();
        }
        let since_epoch = exit
            .at
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Ok(WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            ..Default::default()
        })
    }

    async fn remove_process(
        &self,
        _context: &TtrpcContext,
        request: RemoveProcessRequest,
    ) -> TtrpcResult<Empty> {
        self.containers
            .get(&request.container_id)?
            .remove_process(&request.exec_id)?;
        Ok(Empty::new())
    }

    async fn signal_process(
        &self,
        _context: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> TtrpcResult<Empty> {
        let signal = Signal::new(request.signal)?;
        let container = self.containers.get(&request.container_id)?;
        container.signal(&request.exec_id, signal, request.all)?;
        Ok(Empty::new())
    }

    async fn resize_tty(
        &self,
        _context: &TtrpcContext,
        request: ResizeTtyRequest,
    ) -> TtrpcResult<Empty> {
        let size = Size::new(request.columns, request.rows)?;
        let process = self
            .containers
            .get(&request.container_id)?
            .process(&request.exec_id)?;
        let terminal = process.terminal().ok_or_else(|| Error::NoTerminal {
            name: match request.exec_id.as_str() {
                "" => request.container_id.clone(),
                exec_id => exec_id.to_owned(),
            },
        })?;
        terminal.resize(size)?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _context: &TtrpcContext,
        request: ListProcessesRequest,
    ) -> TtrpcResult<ListProcessesResponse> {
        let processes = self.containers.get(&request.container_id)?.processes()?;
        let processes = processes
            .into_iter()
            .map(|(pid, exec_id)| Process {
                pid: number(pid),
                exec_id,
                ..Default::default()
            })
            .collect();
        Ok(ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _context: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> TtrpcResult<Empty> {
        self.containers.get(&request.container_id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _context: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> TtrpcResult<Empty> {
        self.containers.get(&request.container_id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _context: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> TtrpcResult<Empty> {
        self.containers
            .update(&request.container_id, &request.resources)
            .await?;
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _context: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> TtrpcResult<StatsContainerResponse> {
        Ok(self.containers.get(&request.container_id)?.stats())
    }

    async fn wait_oom(
        &self,
        _context: &TtrpcContext,
        request: WaitOomRequest,
    ) -> TtrpcResult<WaitOomResponse> {
        let kills = self.containers.get(&request.container_id)?.oom_kills();
        let oom_kills = container::beyond(kills, request.seen, &request.container_id).await?;
        Ok(WaitOomResponse {
            oom_kills,
            ..Default::default()
        })
    }

    async fn update_network(
        &self,
        _context: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> TtrpcResult<Empty> {
        network::update(&request).await?;
        Ok(Empty::new())
    }

    async fn raise_changes(
        &self,
        _context: &TtrpcContext,
        request: RaiseChangesRequest,
    ) -> TtrpcResult<Empty> {
        self.changes.raise(request.changes).await?;
        Ok(Empty::new())
    }
}

/// Ids become names of files and cgroups.
fn container_id(id: &str) -> Result<&str> {
    let is_name = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !is_name || id.is_empty() || id.starts_with('.') {
        return Err(Error::Invalid(format!(
            "{id:?} cannot be the id of a container"
        )));
    }
    Ok(id)
}

fn stdio(stdio: &Stdio) -> Result<StdioRequest> {
    Ok(StdioRequest {
        terminal: stdio.terminal,
        ports: Ports {
            stdin: stdio.stdin_port,
            stdout: stdio.stdout_port,
            stderr: if stdio.terminal { 0 } else { stdio.stderr_port },
        },
        size: Size::new(stdio.columns, stdio.rows)?,
    })
}

fn number(pid: Pid) -> u32 {
    pid.as_raw().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::container_id;

    #[test]
    fn ids_that_are_no_file_names_are_refused() {
        for id in ["", "..", "a/b", "a b", "a\0"] {
            assert!(container_id(id).is_err(), "{id:?}");
        }
        assert!(container_id("k8s.io_Pod-1").is_ok());
    }
}
