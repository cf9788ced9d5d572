//! The service as containerd calls it, against a fake agent and a fake worker: threads and tasks of the test that speak
//! the real protocols over socket pairs. No VM can run where unit tests do; `ci/e2e` has the real ones.

use std::collections::HashMap as Map;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream as StdStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_shim::protos::events::task::TaskExit;
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim_async::{Client, TaskClient, create_events};
use containerd_shim::protos::ttrpc::r#async::Server;
use containerd_shim::protos::ttrpc::r#async::transport::{Listener, Socket};
use containerd_shim::protos::ttrpc::context::Context;
use containerd_shim::protos::ttrpc::error::get_rpc_status;
use containerd_shim::protos::ttrpc::{self, Code};
use containerd_shim::protos::{cgroups, cgroups_v2};
use containerd_shim_protos::sandbox_api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use husk_protocol::agent;
use husk_protocol::agent_ttrpc::{Agent as AgentService, create_agent};
use husk_vmm::control::{self, Call, Reply, Request};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::sandbox::SandboxService;
use super::*;
use crate::agent::Agent;
use crate::container::{Container, Parts};
use crate::disks::Disks;
use crate::events::Events;
use crate::process::Process;
use crate::spec::HostHooks;
use crate::stats::HostCgroups;
use crate::storage::Share;
use crate::vm::{End, Vm};
use crate::vmm::Worker;
use crate::vmm::tests::{fake_worker, reply};

const PID: u32 = 4711;

/// The exit status of a process by container and exec id, once it has ended.
type Exits = Map<(String, String), watch::Sender<Option<u32>>>;

/// The guest's side: processes that end when they are killed, with 128 + signal.
#[derive(Default)]
struct FakeAgent {
    exits: Mutex<Exits>,
    calls: Mutex<Vec<String>>,
    /// Takes signals and does nothing.
    deaf: AtomicBool,
    /// Does not say which processes there are.
    stuck: AtomicBool,
    /// Held by a test, no container is removed.
    removing: tokio::sync::Mutex<()>,
}

impl FakeAgent {
    fn exit(&self, id: &str, exec_id: &str) -> watch::Sender<Option<u32>> {
        self.exits
            .lock()
            .unwrap()
            .entry((id.to_owned(), exec_id.to_owned()))
            .or_insert_with(|| watch::Sender::new(None))
            .clone()
    }

    fn called(&self, what: String) -> ttrpc::Result<agent::Empty> {
        self.calls.lock().unwrap().push(what);
        Ok(agent::Empty::new())
    }
}

#[async_trait]
impl AgentService for FakeAgent {
    async fn start_container(
        &self,
        _: &TtrpcContext,
        req: agent::StartContainerRequest,
    ) -> TtrpcResult<agent::Empty> {
        self.called(format!("start {}", req.container_id))
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        req: agent::RemoveContainerRequest,
    ) -> TtrpcResult<agent::Empty> {
        let _allowed = self.removing.lock().await;
        self.called(format!("remove {}", req.container_id))
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        req: agent::ExecProcessRequest,
    ) -> TtrpcResult<agent::ExecProcessResponse> {
        if req.exec_id == "broken" {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "no such program"));
        }
        self.called(format!("exec {} {}", req.container_id, req.exec_id))?;
        Ok(agent::ExecProcessResponse::new())
    }

    async fn remove_process(
        &self,
        _: &TtrpcContext,
        req: agent::RemoveProcessRequest,
    ) -> TtrpcResult<agent::Empty> {
        self.called(format!("forget {} {}", req.container_id, req.exec_id))
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        req: agent::WaitProcessRequest,
    ) -> TtrpcResult<agent::WaitProcessResponse> {
        let mut exit = self.exit(&req.container_id, &req.exec_id).subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(agent::WaitProcessResponse {
            exit_status: status,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        req: agent::SignalProcessRequest,
    ) -> TtrpcResult<agent::Empty> {
        if !self.deaf.load(Ordering::Relaxed) {
            self.exit(&req.container_id, &req.exec_id)
                .send_replace(Some(128 + req.signal));
        }
        self.called(format!("signal {} {}", req.signal, req.exec_id))
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        req: agent::PauseContainerRequest,
    ) -> TtrpcResult<agent::Empty> {
        self.called(format!("pause {}", req.container_id))
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        req: agent::ResumeContainerRequest,
    ) -> TtrpcResult<agent::Empty> {
        self.called(format!("resume {}", req.container_id))
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        req: agent::UpdateContainerRequest,
    ) -> TtrpcResult<agent::Empty> {
        self.called(format!("update {}", req.container_id))
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        _: agent::ListProcessesRequest,
    ) -> TtrpcResult<agent::ListProcessesResponse> {
        if self.stuck.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let process = |pid, exec_id: &str| agent::Process {
            pid,
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        Ok(agent::ListProcessesResponse {
            processes: vec![process(20, ""), process(31, "sh")],
            ..Default::default()
        })
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        _: agent::StatsContainerRequest,
    ) -> TtrpcResult<agent::StatsContainerResponse> {
        let mut stats = agent::StatsContainerResponse::new();
        stats.pids.mut_or_insert_default().current = 3;
        Ok(stats)
    }
}

struct Containerd(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl containerd_shim::protos::shim_async::Events for Containerd {
    async fn forward(
        &self,
        _: &TtrpcContext,
        req: containerd_shim::protos::api::ForwardRequest,
    ) -> TtrpcResult<Empty> {
        self.0.send(req.envelope.unwrap()).unwrap();
        Ok(Empty::new())
    }
}

/// A worker that connects every stream to a guest which closes it, and tells the size that the guest shall have.
fn worker_with(agent: Arc<FakeAgent>) -> Worker {
    let (worker, _events) = fake_worker(move |socket| {
        while let Ok(Some((request, _))) = control::recv::<Request>(&socket) {
            let (host, _guest) = StdStream::pair().unwrap();
            let (answer, descriptors) = match request.call {
                Call::VsockConnect { .. } => {
                    (Reply::VsockConnected { local_port: 9 }, vec![host.as_fd()])
                }
                Call::Resize(size) => {
                    let size = (size.vcpus.unwrap(), size.memory_mib.unwrap());
                    agent.called(format!("resize {size:?}")).unwrap();
                    (Reply::Resized, vec![])
                }
                other => panic!("{other:?}"),
            };
            reply(&socket, request.id, Ok(answer), &descriptors);
        }
    });
    worker
}

async fn serve(listener: UnixListener, services: HashMap<String, Service>) -> Server {
    listener.set_nonblocking(true).unwrap();
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener).unwrap())
        .register_service(services);
    server.start().await.unwrap();
    server
}

/// A shim with one created container, and containerd's ends of it.
struct Fixture {
    task: TaskClient,
    agent: Arc<FakeAgent>,
    sandbox: Arc<Sandbox>,
    worker: Worker,
    end: watch::Sender<Option<Arc<str>>>,
    events: mpsc::UnboundedReceiver<Envelope>,
    servers: Vec<Server>,
    dir: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bind = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();

        let agent = Arc::new(FakeAgent::default());
        let agent_server = serve(bind("agent"), create_agent(agent.clone())).await;
        let stream = UnixStream::connect(dir.path().join("agent")).await.unwrap();

        let (sender, events) = mpsc::unbounded_channel();
        let containerd = create_events(Arc::new(Containerd(sender)));
        let containerd_server = serve(bind("events"), containerd).await;

        let (end, vm_end) = End::channel();
        let worker = worker_with(agent.clone());
        let vm = Arc::new(Vm::fake(
            worker.clone(),
            Agent::new(stream, vm_end.clone()),
            vm_end,
            PID,
        ));
        let address = dir.path().join("events");
        let sandbox = Sandbox::new(
            "default",
            Share::at(Path::new("/absent")),
            Events::new(address.to_str().unwrap(), "default"),
        );
        add_container(&sandbox, "x", vm);

        let service = TaskService::new(sandbox.clone());
        let task_server = serve(bind("task"), service.services()).await;
        let stream = UnixStream::connect(dir.path().join("task")).await.unwrap();
        Self {
            task: TaskClient::new(Client::new(Socket::from(stream))),
            agent,
            sandbox,
            worker,
            end,
            events,
            servers: vec![agent_server, containerd_server, task_server],
            dir,
        }
    }

    /// containerd's end of the sandbox service.
    async fn pod(&mut self) -> SandboxClient {
        let path = self.dir.path().join("sandbox");
        let service = SandboxService::new(self.sandbox.clone());
        let server = serve(UnixListener::bind(&path).unwrap(), service.services()).await;
        self.servers.push(server);
        let stream = UnixStream::connect(&path).await.unwrap();
        SandboxClient::new(Client::new(Socket::from(stream)))
    }

    async fn start(&self, exec_id: &str) -> TtrpcResult<StartResponse> {
        let req = StartRequest {
            id: "x".into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.start(Context::default(), &req).await
    }

    async fn exec(&self, exec_id: &str) -> TtrpcResult<Empty> {
        let spec = br#"{"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}}"#;
        let req = ExecProcessRequest {
            id: "x".into(),
            exec_id: exec_id.into(),
            spec: Some(Any {
                value: spec.to_vec(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.task.exec(Context::default(), &req).await
    }

    async fn kill(&self, exec_id: &str, signal: u32) -> TtrpcResult<Empty> {
        let req = KillRequest {
            id: "x".into(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.task.kill(Context::default(), &req).await
    }

    async fn wait(&self, exec_id: &str) -> TtrpcResult<WaitResponse> {
        let req = WaitRequest {
            id: "x".into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.wait(Context::default(), &req).await
    }

    async fn delete(&self, exec_id: &str) -> TtrpcResult<DeleteResponse> {
        let req = DeleteRequest {
            id: "x".into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.delete(Context::default(), &req).await
    }

    async fn pause(&self) -> TtrpcResult<Empty> {
        let req = PauseRequest {
            id: "x".into(),
            ..Default::default()
        };
        self.task.pause(Context::default(), &req).await
    }

    async fn resume(&self) -> TtrpcResult<Empty> {
        let req = ResumeRequest {
            id: "x".into(),
            ..Default::default()
        };
        self.task.resume(Context::default(), &req).await
    }

    async fn state(&self, exec_id: &str) -> StateResponse {
        let req = StateRequest {
            id: "x".into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.state(Context::default(), &req).await.unwrap()
    }

    /// The next events, until the one with `last` as topic.
    async fn topics_until(&mut self, last: &str) -> Vec<Envelope> {
        let mut envelopes = Vec::new();
        loop {
            let envelope = tokio::time::timeout(Duration::from_secs(10), self.events.recv())
                .await
                .expect("the event is published")
                .unwrap();
            let topic = envelope.topic.clone();
            envelopes.push(envelope);
            if topic == last {
                return envelopes;
            }
        }
    }
}

fn add_container(sandbox: &Arc<Sandbox>, id: &str, vm: Arc<Vm>) {
    let container = Arc::new(Container::new(Parts {
        id: id.into(),
        bundle: "/bundle".into(),
        oci_version: "1.1.0".into(),
        guest_pid: 1,
        own_pid_namespace: true,
        is_sandbox: false,
        hooks: HostHooks::default(),
        init: Process::new(String::new(), Stdio::default(), TtySize::default()),
        vm,
        storage: None,
        disks: Disks::default(),
    }));
    sandbox.reserve(id).unwrap().commit(container.clone());
    sandbox.watch_exit(container.clone(), container.init().clone());
}

fn topics(envelopes: &[Envelope]) -> Vec<&str> {
    envelopes
        .iter()
        .map(|envelope| envelope.topic.as_str())
        .collect()
}

fn code<T: std::fmt::Debug>(result: TtrpcResult<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test]
async fn life_of_a_task_with_its_events() {
    let mut fixture = Fixture::new().await;
    assert_eq!(fixture.state("").await.status(), ApiStatus::CREATED);
    assert_eq!(fixture.start("").await.unwrap().pid, PID);
    assert_eq!(fixture.state("").await.status(), ApiStatus::RUNNING);
    assert_eq!(
        code(fixture.delete("").await).1,
        "cannot delete a running process"
    );
    fixture.kill("", 15).await.unwrap();
    assert_eq!(fixture.wait("").await.unwrap().exit_status, 143);
    assert_eq!(fixture.wait("").await.unwrap().exit_status, 143);
    let state = fixture.state("").await;
    assert_eq!(
        (state.status(), state.exit_status),
        (ApiStatus::STOPPED, 143)
    );
    let deleted = fixture.delete("").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (PID, 143));
    assert!(deleted.exited_at.seconds > 0);
    let events = fixture.topics_until("/tasks/delete").await;
    assert_eq!(
        topics(&events),
        ["/tasks/start", "/tasks/exit", "/tasks/delete"]
    );
    let exit = TaskExit::parse_from_bytes(&events[1].event.value).unwrap();
    assert_eq!((exit.container_id.as_str(), exit.id.as_str()), ("x", "x"));
    assert_eq!((exit.pid, exit.exit_status), (PID, 143));
    assert_eq!(code(fixture.delete("").await).0, Code::NOT_FOUND);
    assert!(fixture.sandbox.is_empty());
}

#[tokio::test]
async fn delete_that_is_repeated_meanwhile_ends_with_the_first() {
    let mut fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    fixture.kill("", 15).await.unwrap();
    let agent = fixture.agent.clone();
    let removing = agent.removing.lock().await;
    {
        let both = futures::future::join(fixture.delete(""), fixture.delete(""));
        tokio::pin!(both);
        let early = tokio::time::timeout(Duration::from_millis(100), &mut both).await;
        assert!(early.is_err(), "{early:?}");
        drop(removing);
        let (one, other) = both.await;
        assert_eq!(one.unwrap(), other.unwrap());
    }
    fixture.topics_until("/tasks/delete").await;
    let calls = agent.calls.lock().unwrap().join(", ");
    assert_eq!(calls.matches("remove x").count(), 1, "{calls}");
}

#[tokio::test]
async fn both_names_of_the_service_are_served() {
    let services = TaskService::new(Fixture::new().await.sandbox).services();
    let mut names: Vec<_> = services.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["containerd.task.v2.Task", "containerd.task.v3.Task"]
    );
    for service in services.values() {
        assert_eq!(service.methods.len(), 17);
    }
}

/// All that there is of containerd's sandbox service but the creation, for which a VM is booted.
#[tokio::test]
async fn life_of_a_sandbox() {
    let mut fixture = Fixture::new().await;
    let pod = fixture.pod().await;
    let context = Context::default;
    let status = async || {
        let req = sandbox_api::SandboxStatusRequest {
            sandbox_id: "x".into(),
            ..Default::default()
        };
        pod.sandbox_status(context(), &req).await.unwrap()
    };
    let ping = async || {
        let req = sandbox_api::PingRequest {
            sandbox_id: "x".into(),
            ..Default::default()
        };
        pod.ping_sandbox(context(), &req).await
    };

    let platform = sandbox_api::PlatformRequest::new();
    let platform = pod.platform(context(), &platform).await.unwrap();
    let platform = platform.platform.unwrap();
    assert_eq!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
    assert_eq!(status().await.state, "SANDBOX_NOTREADY");
    let start = sandbox_api::StartSandboxRequest {
        sandbox_id: "x".into(),
        ..Default::default()
    };
    let started = pod.start_sandbox(context(), &start).await.unwrap();
    assert_eq!(started.pid, PID);
    assert_eq!(status().await.state, "SANDBOX_READY");
    assert_eq!(status().await.pid, PID);
    ping().await.unwrap();
    let metrics = sandbox_api::SandboxMetricsRequest {
        sandbox_id: "x".into(),
        ..Default::default()
    };
    let metrics = pod.sandbox_metrics(context(), &metrics).await.unwrap();
    let metrics = metrics.metrics.unwrap();
    assert_eq!(metrics.id, "x");
    let data = metrics.data.unwrap();
    let pids = match HostCgroups::detect() {
        HostCgroups::V1 => {
            let metrics = cgroups::metrics::Metrics::parse_from_bytes(&data.value).unwrap();
            metrics.pids.current
        }
        HostCgroups::V2 => {
            let metrics = cgroups_v2::metrics::Metrics::parse_from_bytes(&data.value).unwrap();
            metrics.pids.current
        }
    };
    assert_eq!(pids, 3);

    let wait = sandbox_api::WaitSandboxRequest {
        sandbox_id: "x".into(),
        ..Default::default()
    };
    let stop = sandbox_api::StopSandboxRequest::new();
    let (waited, stopped) = tokio::join!(
        pod.wait_sandbox(context(), &wait),
        pod.stop_sandbox(context(), &stop)
    );
    stopped.unwrap();
    assert_eq!(waited.unwrap().exit_status, 137);
    assert_eq!(status().await.state, "SANDBOX_NOTREADY");
    let shutdown = sandbox_api::ShutdownSandboxRequest::new();
    pod.shutdown_sandbox(context(), &shutdown).await.unwrap();
    fixture.sandbox.wait_shut_down().await;
    assert!(fixture.sandbox.is_empty());
    assert_eq!(code(ping().await).0, Code::NOT_FOUND);
}

/// The shim answers, but that is not what was asked.
#[tokio::test]
async fn sandbox_without_its_vm_does_not_answer_a_ping() {
    let mut fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    let pod = fixture.pod().await;
    let req = sandbox_api::PingRequest {
        sandbox_id: "x".into(),
        ..Default::default()
    };
    fixture.end.send_replace(Some("it was cut off".into()));
    let refused = code(pod.ping_sandbox(Context::default(), &req).await);
    assert!(refused.1.contains("it was cut off"), "{refused:?}");
}

#[tokio::test]
async fn exec_has_a_life_of_its_own() {
    let mut fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    fixture.exec("sh").await.unwrap();
    assert_eq!(code(fixture.exec("sh").await).0, Code::ALREADY_EXISTS);
    assert_eq!(fixture.state("sh").await.pid, 0);
    assert_eq!(
        code(fixture.kill("sh", 9).await).0,
        Code::FAILED_PRECONDITION
    );
    fixture.start("sh").await.unwrap();
    assert_eq!(
        code(fixture.start("sh").await).1,
        "cannot start a running process"
    );
    fixture.kill("sh", 9).await.unwrap();
    assert_eq!(fixture.wait("sh").await.unwrap().exit_status, 137);
    assert_eq!(code(fixture.kill("sh", 9).await).0, Code::NOT_FOUND);
    assert_eq!(fixture.delete("sh").await.unwrap().exit_status, 137);
    assert_eq!(code(fixture.wait("sh").await).0, Code::NOT_FOUND);
    let events = fixture.topics_until("/tasks/exit").await;
    assert_eq!(
        topics(&events),
        [
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit"
        ]
    );
    assert!(
        fixture
            .agent
            .calls
            .lock()
            .unwrap()
            .contains(&"forget x sh".to_owned())
    );
}

#[tokio::test]
async fn exec_that_cannot_start_says_why_and_can_be_deleted() {
    let fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    fixture.exec("broken").await.unwrap();
    let (code, message) = code(fixture.start("broken").await);
    assert_eq!(code, Code::UNKNOWN);
    assert!(message.contains("no such program"), "{message}");
    fixture.wait("broken").await.unwrap();
    fixture.delete("broken").await.unwrap();
}

#[tokio::test]
async fn exits_of_execs_come_before_that_of_the_first_process() {
    let mut fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    fixture.exec("sh").await.unwrap();
    fixture.start("sh").await.unwrap();
    fixture.kill("", 9).await.unwrap();
    fixture.agent.exit("x", "sh").send_replace(Some(137));
    let mut ids = Vec::new();
    while ids.len() < 2 {
        let events = fixture.topics_until("/tasks/exit").await;
        let last = events.last().unwrap();
        ids.push(TaskExit::parse_from_bytes(&last.event.value).unwrap().id);
    }
    assert_eq!(ids, ["sh", "x"]);
    let (code, message) = code(fixture.exec("late").await);
    assert_eq!(
        (code, message.as_str()),
        (Code::UNKNOWN, "cannot exec in a stopped state")
    );
}

#[tokio::test]
async fn pause_and_resume_only_where_they_make_sense() {
    let mut fixture = Fixture::new().await;
    assert_eq!(
        code(fixture.pause().await).1,
        "cannot pause a created container"
    );
    fixture.start("").await.unwrap();
    assert_eq!(
        code(fixture.resume().await).1,
        "cannot resume a running container"
    );
    fixture.exec("early").await.unwrap();
    fixture.pause().await.unwrap();
    assert_eq!(
        code(fixture.start("early").await),
        (Code::UNKNOWN, "cannot exec in a paused state".to_owned())
    );
    assert_eq!(fixture.state("").await.status(), ApiStatus::PAUSED);
    assert_eq!(
        code(fixture.pause().await).1,
        "cannot pause a paused container"
    );
    assert_eq!(
        code(fixture.exec("sh").await).1,
        "cannot exec in a paused state"
    );
    assert_eq!(
        code(fixture.delete("").await).1,
        "cannot delete a paused process"
    );
    fixture.resume().await.unwrap();
    assert_eq!(fixture.state("").await.status(), ApiStatus::RUNNING);
    fixture.start("early").await.unwrap();
    let events = fixture.topics_until("/tasks/exec-started").await;
    assert_eq!(
        topics(&events),
        [
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/paused",
            "/tasks/resumed",
            "/tasks/exec-started"
        ]
    );
}

#[tokio::test]
async fn end_of_the_vm_kills_every_process_and_delete_still_works() {
    let mut fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    fixture.exec("sh").await.unwrap();
    fixture.start("sh").await.unwrap();
    fixture
        .end
        .send_replace(Some(Arc::from("the guest's kernel panicked")));
    assert_eq!(fixture.wait("").await.unwrap().exit_status, 137);
    assert_eq!(fixture.wait("sh").await.unwrap().exit_status, 137);
    let (code, message) = code(
        fixture
            .task
            .stats(
                Context::default(),
                &StatsRequest {
                    id: "x".into(),
                    ..Default::default()
                },
            )
            .await,
    );
    assert_eq!(code, Code::UNAVAILABLE);
    assert_eq!(message, "the VM has ended: the guest's kernel panicked");
    fixture.delete("sh").await.unwrap();
    assert_eq!(fixture.delete("").await.unwrap().exit_status, 137);
    let events = fixture.topics_until("/tasks/delete").await;
    assert_eq!(
        topics(&events)
            .iter()
            .filter(|&&topic| topic == "/tasks/exit")
            .count(),
        2
    );
}

#[tokio::test]
async fn created_container_is_killed_by_delete() {
    let fixture = Fixture::new().await;
    assert_eq!(fixture.delete("").await.unwrap().exit_status, 137);
    assert!(
        fixture
            .agent
            .calls
            .lock()
            .unwrap()
            .contains(&"remove x".to_owned())
    );
}

#[tokio::test]
async fn vm_of_a_container_that_outlives_sigkill_is_ended() {
    let fixture = Fixture::new().await;
    fixture.start("").await.unwrap();
    fixture.agent.deaf.store(true, Ordering::Relaxed);
    fixture.kill("", 9).await.unwrap();
    fixture.worker.connect_vsock(1).await.unwrap();
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    while fixture.worker.connect_vsock(1).await.is_ok() {}
    fixture
        .end
        .send_replace(Some(Arc::from("it was shut down")));
    assert_eq!(fixture.wait("").await.unwrap().exit_status, 137);
}

/// A fixture whose container, one of two, has been killed and did not end for as long as it may take.
async fn disobeyed(stuck: bool) -> Fixture {
    let fixture = Fixture::new().await;
    let vm = fixture.sandbox.container("x").unwrap().vm().clone();
    add_container(&fixture.sandbox, "y", vm);
    fixture.start("").await.unwrap();
    fixture.agent.deaf.store(true, Ordering::Relaxed);
    fixture.agent.stuck.store(stuck, Ordering::Relaxed);
    fixture.kill("", 9).await.unwrap();
    fixture.worker.connect_vsock(1).await.unwrap();
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    fixture
}

#[tokio::test]
async fn vm_of_a_pod_survives_a_container_that_outlives_sigkill_once() {
    let fixture = disobeyed(false).await;
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    fixture.worker.connect_vsock(1).await.unwrap();

    fixture.kill("", 9).await.unwrap();
    fixture.worker.connect_vsock(1).await.unwrap();
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    while fixture.worker.connect_vsock(1).await.is_ok() {}
}

#[tokio::test]
async fn vm_of_a_pod_whose_guest_is_stuck_is_ended() {
    let fixture = disobeyed(true).await;
    // The question is asked by now.
    tokio::task::yield_now().await;
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    while fixture.worker.connect_vsock(1).await.is_ok() {}
}

#[tokio::test]
async fn pids_are_the_guests_with_their_exec() {
    let fixture = Fixture::new().await;
    let req = PidsRequest {
        id: "x".into(),
        ..Default::default()
    };
    let pids = fixture.task.pids(Context::default(), &req).await.unwrap();
    assert_eq!(pids.processes[0].pid, 20);
    assert!(pids.processes[0].info.is_none());
    let info = pids.processes[1].info.as_ref().unwrap();
    assert_eq!(info.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(
        ProcessDetails::parse_from_bytes(&info.value)
            .unwrap()
            .exec_id,
        "sh"
    );
}

#[tokio::test]
async fn unknown_ids_are_not_found_and_connect_does_not_mind() {
    let fixture = Fixture::new().await;
    let req = StateRequest {
        id: "absent".into(),
        ..Default::default()
    };
    let (state, _) = code(fixture.task.state(Context::default(), &req).await);
    assert_eq!(state, Code::NOT_FOUND);
    assert_eq!(code(fixture.kill("absent", 9).await).0, Code::NOT_FOUND);
    let connect = async |id: &str| {
        let req = ConnectRequest {
            id: id.into(),
            ..Default::default()
        };
        fixture
            .task
            .connect(Context::default(), &req)
            .await
            .unwrap()
            .task_pid
    };
    assert_eq!(connect("x").await, PID);
    assert_eq!(connect("absent").await, 0);
    let req = CheckpointTaskRequest::default();
    let (checkpoint, _) = code(fixture.task.checkpoint(Context::default(), &req).await);
    assert_eq!(checkpoint, Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn duplicate_id_is_refused_before_anything_is_done() {
    let fixture = Fixture::new().await;
    let req = CreateTaskRequest {
        id: "x".into(),
        bundle: "/absent".into(),
        ..Default::default()
    };
    let (create, _) = code(fixture.task.create(Context::default(), &req).await);
    assert_eq!(create, Code::ALREADY_EXISTS);
}

#[tokio::test]
async fn failed_create_gives_the_id_back() {
    let fixture = Fixture::new().await;
    let req = CreateTaskRequest {
        id: "y".into(),
        bundle: "/absent".into(),
        ..Default::default()
    };
    for _ in 0..2 {
        let (create, message) = code(fixture.task.create(Context::default(), &req).await);
        assert_eq!(create, Code::UNKNOWN);
        assert!(message.contains("/absent/config.json"), "{message}");
    }
}

#[tokio::test]
async fn shutdown_gives_up_what_is_being_created() {
    let fixture = Fixture::new().await;
    fixture.delete("").await.unwrap();
    let reservation = fixture.sandbox.reserve("y").unwrap();
    let req = ShutdownRequest::default();
    fixture
        .task
        .shutdown(Context::default(), &req)
        .await
        .unwrap();
    fixture.sandbox.wait_abandoned().await;
    // Whoever creates it ends the shim, when it has cleaned up.
    let ended = tokio::time::timeout(Duration::ZERO, fixture.sandbox.wait_shut_down()).await;
    assert!(ended.is_err());
    drop(reservation);
    let req = CreateTaskRequest {
        id: "z".into(),
        bundle: "/absent".into(),
        ..Default::default()
    };
    fixture
        .task
        .create(Context::default(), &req)
        .await
        .unwrap_err();
    fixture.sandbox.wait_shut_down().await;
}

#[tokio::test]
async fn shutdown_waits_for_the_last_container() {
    let fixture = Fixture::new().await;
    let req = ShutdownRequest::default();
    fixture
        .task
        .shutdown(Context::default(), &req)
        .await
        .unwrap();
    let ended = tokio::time::timeout(Duration::ZERO, fixture.sandbox.wait_shut_down()).await;
    assert!(ended.is_err());
    fixture.delete("").await.unwrap();
    fixture
        .task
        .shutdown(Context::default(), &req)
        .await
        .unwrap();
    fixture.sandbox.wait_shut_down().await;
}

#[tokio::test]
async fn vm_grows_before_an_update_and_shrinks_after() {
    let shim = Fixture::new().await;
    shim.start("").await.unwrap();
    let update = async |resources: &str| {
        let resources = Any {
            value: resources.as_bytes().to_vec(),
            ..Default::default()
        };
        let req = UpdateTaskRequest {
            id: "x".into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        shim.task.update(Context::default(), &req).await.unwrap();
        std::mem::take(&mut *shim.agent.calls.lock().unwrap())
    };
    shim.agent.calls.lock().unwrap().clear();
    let more = r#"{"cpu": {"quota": 200000, "period": 100000}, "memory": {"limit": 1073741824}}"#;
    assert_eq!(update(more).await, ["resize (2, 1152)", "update x"]);
    assert_eq!(update(r#"{"cpu": {"shares": 9}}"#).await, ["update x"]);
    // At no moment is there less than what the container is allowed.
    let other = r#"{"cpu": {"quota": 10000, "period": 100000}, "memory": {"limit": 2147483648}}"#;
    assert_eq!(
        update(other).await,
        ["resize (2, 2176)", "update x", "resize (1, 2176)"]
    );
    assert_eq!(
        update(r#"{"memory": {"limit": 1048576}}"#).await,
        ["update x", "resize (1, 512)"]
    );
}
