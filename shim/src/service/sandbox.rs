//! The sandbox service of containerd 2 (`containerd.runtime.sandbox.v1`), for runtimes with `sandboxer = "shim"`: a pod
//! without a pause container. Each method translates; a pod is made, as ever, from a container that stands for it, whose
//! OCI configuration is written here ([`crate::pod_config`]) instead of by containerd.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim::protos::ttrpc::r#async::Service;
use containerd_shim::{TtrpcContext, TtrpcResult};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async;
use serde_json::{Value, json};

use super::{answer, to_the_end};
use crate::container::Status;
use crate::pod_config::{self, Described};
use crate::sandbox::Sandbox;
use crate::streams::Stdio;
use crate::task::create::Create;
use crate::task::exit::timestamp;

/// The states of a sandbox by the names that CRI has for them (`PodSandboxState`).
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Serves a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct SandboxService {
    sandbox: Arc<Sandbox>,
    created_at: Arc<OnceLock<SystemTime>>,
}

impl SandboxService {
    pub(crate) fn new(sandbox: Arc<Sandbox>) -> Self {
        Self {
            sandbox,
            created_at: Arc::default(),
        }
    }

    pub(crate) fn services(&self) -> HashMap<String, Service> {
        sandbox_async::create_sandbox(Arc::new(self.clone()))
    }

    fn created_at(&self) -> SystemTime {
        self.created_at
            .get()
            .copied()
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

#[async_trait]
impl sandbox_async::Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> TtrpcResult<CreateSandboxResponse> {
        let sandbox = self.sandbox.clone();
        let create = async move {
            let described = Described {
                id: &req.sandbox_id,
                network_namespace: &req.netns_path,
                annotations: &req.annotations,
                config: pod_config::parse(req.options.as_ref())?,
            };
            let bundle = req.bundle_path.as_ref();
            described.write(bundle)?;
            sandbox
                .create(Create {
                    id: req.sandbox_id.clone(),
                    bundle: bundle.to_owned(),
                    rootfs: Vec::new(),
                    stdio: Stdio::default(),
                    checkpoint: String::new(),
                    options: None,
                })
                .await
        };
        to_the_end("create sandbox", create).await?;
        self.created_at.get_or_init(SystemTime::now);
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: StartSandboxRequest,
    ) -> TtrpcResult<StartSandboxResponse> {
        let sandbox = self.sandbox.clone();
        let start = async move { sandbox.start(&req.sandbox_id, "").await };
        Ok(StartSandboxResponse {
            pid: to_the_end("start sandbox", start).await?,
            created_at: Some(self.created_at().into()).into(),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: PlatformRequest,
    ) -> TtrpcResult<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        // The only one there are guests for; by Go's name.
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: StopSandboxRequest,
    ) -> TtrpcResult<StopSandboxResponse> {
        let sandbox = self.sandbox.clone();
        to_the_end("stop sandbox", async move { sandbox.stop().await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: WaitSandboxRequest,
    ) -> TtrpcResult<WaitSandboxResponse> {
        let exit = answer("wait sandbox", self.sandbox.wait(&req.sandbox_id, "").await)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> TtrpcResult<SandboxStatusResponse> {
        let state = answer("sandbox status", self.sandbox.state(&req.sandbox_id, ""))?;
        let is_ready = state.status == Status::Running;
        let mut info = HashMap::new();
        if req.verbose {
            // What `crictl inspectp` shows, under the keys that containerd has for its own pods.
            let spec = std::fs::read(Path::new(&state.bundle).join("config.json")).ok();
            let spec = spec.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
            let shown = json!({"pid": state.pid, "runtimeSpec": spec});
            info.insert("info".to_owned(), shown.to_string());
        }
        Ok(SandboxStatusResponse {
            info,
            sandbox_id: state.id,
            pid: state.pid,
            state: if is_ready { READY } else { NOT_READY }.to_owned(),
            created_at: Some(self.created_at().into()).into(),
            exited_at: state.exit.map(timestamp).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: PingRequest) -> TtrpcResult<PingResponse> {
        // The shim answers; whether its guest does is the question.
        answer("ping sandbox", self.sandbox.pids(&req.sandbox_id).await)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> TtrpcResult<ShutdownSandboxResponse> {
        let sandbox = self.sandbox.clone();
        let shutdown = async move {
            // A container that is still being created would keep the shim.
            sandbox.abandon();
            sandbox.stop().await?;
            sandbox.delete_all().await?;
            sandbox.shutdown().await;
            Ok(())
        };
        to_the_end("shutdown sandbox", shutdown).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: SandboxMetricsRequest,
    ) -> TtrpcResult<SandboxMetricsResponse> {
        let stats = answer("sandbox metrics", self.sandbox.stats(&req.sandbox_id).await)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = Some(SystemTime::now().into()).into();
        metric.id = req.sandbox_id;
        metric.data = Some(stats).into();
        Ok(response)
    }
}
