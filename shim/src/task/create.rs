//! `Create`: boots the VM if there is none, mounts what the container sees, and has the agent create it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use containerd_shim::protos::api::Mount;
use containerd_shim::protos::events::task::{TaskCreate, TaskIO};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use husk_protocol::agent::{self, CreateContainerRequest};
use log::info;
use oci_spec::runtime::{LinuxNamespaceType, Process as OciProcess, Spec};

use crate::container::{Container, Parts};
use crate::error::Error;
use crate::hooks::{self, HookState};
use crate::network;
use crate::options;
use crate::process::{Process, TtySize};
use crate::sandbox::Sandbox;
use crate::spec::{self, Divided, VmSize};
use crate::streams::{self, Ends, LogIdentity, Ports, Stdio};

/// Written to the bundle, so that the `delete` action finds the worker of a shim that is gone.
pub(crate) const WORKER_PID_FILE: &str = "worker.pid";

/// Written to the bundle of the first container, so that the `delete` action finds the network namespace in which a shim
/// that is gone has changed something.
pub(crate) const NETWORK_FILE: &str = "network";

const MEMINFO: &str = "/proc/meminfo";

/// What containerd asks for.
#[derive(Debug)]
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) stdio: Stdio,
    pub(crate) checkpoint: String,
    pub(crate) options: Option<Any>,
}

impl Sandbox {
    /// Creates a container and returns the pid of its VM's worker. On failure nothing is left.
    pub(crate) async fn create(self: &Arc<Self>, request: Create) -> Result<u32, Error> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("create a task from a checkpoint"));
        }
        check_id(&request.id)?;
        let reservation = self.reserve(&request.id)?;
        let event = created_event(&request);
        let built = tokio::select! {
            built = self.build(request) => built,
            () = self.wait_abandoned() => Err(Error::Abandoned),
        };
        match built {
            Ok(container) => {
                let container = Arc::new(container);
                let pid = container.vm().pid();
                reservation.commit(container.clone());
                self.publish(TaskCreate { pid, ..event });
                self.watch_exit(container.clone(), container.init().clone());
                Ok(pid)
            }
            Err(err) => {
                drop(reservation);
                self.stop_unused_vm().await;
                if self.is_abandoned() && self.is_empty() {
                    self.shut_down();
                }
                Err(err)
            }
        }
    }

    /// Everything up to the container; what it holds is in the returned value, or given back.
    async fn build(&self, request: Create) -> Result<Container, Error> {
        let begin = Instant::now();
        let spec = load_spec(&request.bundle)?;
        let annotations = spec.annotations().iter().flatten();
        let config = options::config(request.options.as_ref())?
            .with_annotations(annotations.map(|(name, value)| (name.as_str(), value.as_str())))
            .map_err(Error::Config)?;
        let size = spec::vm_size(&spec, config.vm(), host_size()?);
        let network = network::Wanted {
            place: network::Place::of(&spec),
            config: config.network(),
            vcpus: size.vcpus,
            record: &request.bundle.join(NETWORK_FILE),
        };
        let oci_version = spec.version().clone();
        let own_pid_namespace = has_own_pid_namespace(&spec);
        let Divided {
            guest,
            root,
            binds,
            hooks,
        } = spec::divide(spec, &request.id)?;
        let tty_size = guest.process().as_ref().map(tty_size).unwrap_or_default();

        // The guest boots while the host mounts.
        let first = self.running_vm().is_none();
        let (vm, storage, ends) = tokio::join!(
            self.vm(config.vm(), size, &network),
            self.share().prepare(
                &request.id,
                request.rootfs,
                request.bundle.join(root),
                binds
            ),
            streams::open(&request.stdio, self.log_identity(&request.id)),
        );
        let (vm, storage, ends) = (vm?, storage?, ends?);
        storage.publish()?;
        let prepared = Instant::now();

        let pid_file = request.bundle.join(WORKER_PID_FILE);
        std::fs::write(&pid_file, vm.pid().to_string()).map_err(|source| Error::Storage {
            operation: "write",
            path: pid_file,
            source,
        })?;
        let hook_state = HookState {
            oci_version: &oci_version,
            id: &request.id,
            pid: vm.pid(),
            bundle: &request.bundle,
        };
        hooks::run("prestart", &hooks.prestart, &hook_state, "creating").await?;
        hooks::run(
            "createRuntime",
            &hooks.create_runtime,
            &hook_state,
            "creating",
        )
        .await?;

        let init = Process::new(String::new(), request.stdio, tty_size);
        let guest = serde_json::to_vec(&guest).map_err(|source| Error::InvalidRequest {
            what: "OCI configuration",
            source: source.into(),
        })?;
        connect(ends, &vm, &init, async |stdio| {
            let request = CreateContainerRequest {
                container_id: request.id.clone(),
                spec: guest,
                stdio: Some(stdio).into(),
                ..Default::default()
            };
            vm.agent().create_container(request).await
        })
        .await?;

        if first {
            info!(
                "boot phases: {} prepared={}ms container={}ms",
                vm.phases(),
                (prepared - begin).as_millis(),
                prepared.elapsed().as_millis()
            );
            let vm = vm.clone();
            tokio::spawn(async move { vm.log_exits().await });
        }
        Ok(Container::new(Parts {
            id: request.id,
            bundle: request.bundle,
            oci_version,
            own_pid_namespace,
            hooks,
            init,
            vm,
            storage,
        }))
    }

    fn log_identity<'a>(&'a self, id: &'a str) -> LogIdentity<'a> {
        LogIdentity {
            namespace: self.namespace(),
            id,
        }
    }
}

/// Connects the streams of `process` to the guest, lets `create` create the process with them, and attaches them.
pub(super) async fn connect(
    ends: Ends,
    vm: &crate::vm::Vm,
    process: &Process,
    create: impl AsyncFnOnce(agent::Stdio) -> Result<(), Error>,
) -> Result<(), Error> {
    let (streams, ports) = ends.connect(vm).await?;
    create(agent_stdio(process, ports)).await?;
    process.attach(streams);
    Ok(())
}

fn agent_stdio(process: &Process, ports: Ports) -> agent::Stdio {
    let size = process.tty_size();
    agent::Stdio {
        terminal: process.stdio().terminal,
        stdin_port: ports.stdin,
        stdout_port: ports.stdout,
        stderr_port: ports.stderr,
        columns: size.columns,
        rows: size.rows,
        ..Default::default()
    }
}

/// The size of the terminal that an OCI process asks for; zero if it does not say.
pub(super) fn tty_size(process: &OciProcess) -> TtySize {
    let size = process.console_size().unwrap_or_default();
    let clamped = |length: u64| u32::try_from(length).unwrap_or(0);
    TtySize {
        columns: clamped(size.width()),
        rows: clamped(size.height()),
    }
}

/// Ids become names of folders.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    if id.is_empty() || id == "." || id == ".." || id.contains(['/', '\0']) {
        return Err(Error::InvalidId(format!("{id:?}")));
    }
    Ok(())
}

fn created_event(request: &Create) -> TaskCreate {
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.display().to_string(),
        rootfs: request.rootfs.clone(),
        io: Some(TaskIO {
            stdin: request.stdio.stdin.clone(),
            stdout: request.stdio.stdout.clone(),
            stderr: request.stdio.stderr.clone(),
            terminal: request.stdio.terminal,
            ..Default::default()
        })
        .into(),
        checkpoint: request.checkpoint.clone(),
        ..Default::default()
    }
}

fn load_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    Spec::load(&path).map_err(|source| Error::ReadSpec { path, source })
}

fn has_own_pid_namespace(spec: &Spec) -> bool {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|namespaces| {
            namespaces
                .iter()
                .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
        })
}

/// What the host has, which no VM exceeds for the sake of a container's limit.
fn host_size() -> Result<VmSize, Error> {
    let vcpus = std::thread::available_parallelism()
        .map_or(1, |count| u8::try_from(count.get()).unwrap_or(u8::MAX));
    let failed = |source| Error::Storage {
        operation: "read",
        path: MEMINFO.into(),
        source,
    };
    let meminfo = std::fs::read_to_string(MEMINFO).map_err(failed)?;
    let total_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
        .and_then(|total| total.parse::<u64>().ok())
        .ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
    Ok(VmSize {
        vcpus,
        memory_mib: u32::try_from(total_kib / 1024).unwrap_or(u32::MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for id in ["", ".", "..", "a/b", "../x", "a\0"] {
            assert!(matches!(check_id(id), Err(Error::InvalidId(_))), "{id:?}");
        }
        for id in ["x", "a.b", "...", "pod-1_2"] {
            check_id(id).unwrap();
        }
    }

    #[test]
    fn missing_bundle_is_named() {
        let err = load_spec(Path::new("/absent")).unwrap_err();
        assert!(
            err.chain().contains("/absent/config.json"),
            "{}",
            err.chain()
        );
    }
}
