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
use tokio::sync::Notify;

use crate::cgroup::PodCgroup;
use crate::container::{Container, Parts};
use crate::disks::Disks;
use crate::error::Error;
use crate::growth::Demand;
use crate::hooks::{self, HookState};
use crate::network;
use crate::options;
use crate::pod::{self, Kind, Limits};
use crate::pod_config;
use crate::process::{Process, TtySize};
use crate::sandbox::{Machine, Sandbox};
use crate::size::{VmSize, VmSizes};
use crate::spec::{self, Divided};
use crate::storage::{self, ContainerStorage, Images, OpenDisks, Sources, Wanted};
use crate::streams::{self, Ends, LogIdentity, Ports, Stdio};
use crate::vm;

/// Written to the bundle, so that the `delete` action finds the worker of a shim that is gone.
pub(crate) const WORKER_PID_FILE: &str = "worker.pid";

/// Written to the bundle of the first container, so that the `delete` action finds the network namespace in which a shim
/// that is gone has changed something.
pub(crate) const NETWORK_FILE: &str = "network";

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
        let id = request.id.clone();
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
                if let Some(vm) = self.running_vm() {
                    self.demand_nothing(&vm, &id).await;
                }
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
        let mut spec = load_spec(&request.bundle)?;
        let kind = Kind::of(&spec)?;
        if let Kind::Member { sandbox } = &kind {
            let bundle = self.running_sandbox(sandbox)?.bundle().to_owned();
            pod_config::supply(&mut spec, sandbox, &bundle);
        }
        let limits = match kind {
            Kind::Sandbox => Limits::of_sandbox(&spec)?,
            Kind::Single | Kind::Member { .. } => Limits::of_container(&spec),
        };
        let first = self.running_vm().is_none();
        if first && let Some(path) = cgroups_path(&spec) {
            self.enter_cgroup(path);
        }
        let record = request.bundle.join(NETWORK_FILE);
        // What is configured meanwhile is for the next pod.
        let machine = if first {
            Some(self.machine(&request, &spec, limits, &record)?)
        } else {
            None
        };
        let process = spec.process().as_ref();
        let oom_score_adj = process.and_then(OciProcess::oom_score_adj).unwrap_or(0);
        let oci_version = spec.version().clone();
        let own_pid_namespace = has_own_pid_namespace(&spec);
        let image_mib = self.empty_dir_disk_mib(machine.as_ref());
        let sources = self.share().sources(pod::uid(&spec), image_mib > 0);
        let mut divided = divide(spec, &request.id, &kind, sources).await?;
        if let Some(namespace) = spec::pods_processes(&mut divided.guest)
            && let Some(container) = self.only_one_with_own_processes()?
        {
            let path = format!("/proc/{}/ns/pid", container.guest_pid());
            namespace.set_path(Some(path.into()));
        }
        let process = divided.guest.process().as_ref();
        let tty_size = process.map(tty_size).unwrap_or_default();

        // The guest boots while the host mounts, and no longer than that can succeed.
        let host_failed = Notify::new();
        let host = async {
            let prepared = tokio::join!(
                self.prepare_storage(&kind, &request, &divided, image_mib),
                streams::open(&request.stdio, self.log_identity(&request.id)),
            );
            let (storage, ends) = match prepared {
                (Ok(storage), Ok(ends)) => (storage, ends),
                (Err(err), _) | (_, Err(err)) => {
                    host_failed.notify_one();
                    return Err(err);
                }
            };
            Ok((storage, ends))
        };
        let (vm, host) = tokio::join!(self.vm(machine, &host_failed), host);
        let (mut storage, ends) = host?;
        let vm = vm?;
        if kind != Kind::Sandbox {
            // What the sandbox says is for these.
            let demand = Demand {
                limits,
                oom_score_adj,
            };
            self.demand(&vm, &request.id, demand).await?;
        }
        let mut disks = OpenDisks::default();
        if let Some(storage) = &mut storage {
            storage.publish()?;
            divided.place(storage.volumes());
            disks = storage.take_disks();
        }
        if disks.root.is_some() {
            divided.root_is_on_disk(&request.id);
        }
        let hooks = divided.hooks;
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
        let guest = serde_json::to_vec(&divided.guest).map_err(|source| Error::InvalidRequest {
            what: "OCI configuration",
            source: source.into(),
        })?;
        let mut volumes = Vec::new();
        for own in divided.volumes {
            let mut volume = own.volume;
            if let Some(disk) = &own.disk {
                volume.serial = vm.volume(disk).await?;
            }
            volumes.push(volume);
        }
        let disks = Disks::plug(&vm, disks).await?;
        let created = connect(ends, &vm, &init, async |stdio| {
            let request = CreateContainerRequest {
                container_id: request.id.clone(),
                spec: guest,
                stdio: Some(stdio).into(),
                sandbox: kind == Kind::Sandbox,
                volumes,
                root_disk: disks.root.clone().into(),
                root_layers: disks.layers.clone().into(),
                disk_devices: disks.devices.clone(),
                folder: Some(vm::folder(vm.storage())).into(),
                ..Default::default()
            };
            vm.agent().create_container(request).await
        })
        .await;
        let guest_pid = match created {
            Ok(pid) => pid,
            Err(err) => {
                disks.unplug(&vm).await;
                return Err(err);
            }
        };

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
            guest_pid,
            own_pid_namespace,
            is_sandbox: kind == Kind::Sandbox,
            hooks,
            init,
            vm,
            storage,
            disks,
        }))
    }

    /// The size of the disk of an emptyDir, for the VM that there is, or the one that is to be booted.
    fn empty_dir_disk_mib(&self, machine: Option<&Machine<'_>>) -> u32 {
        match (self.running_vm(), machine) {
            (Some(vm), _) => vm.storage().empty_dir_disk_mib(),
            (None, machine) => {
                machine.map_or(0, |machine| machine.config.storage().empty_dir_disk_mib())
            }
        }
    }

    /// The VM that is to be booted for a container.
    fn machine<'a>(
        &self,
        request: &Create,
        spec: &Spec,
        limits: Limits,
        record: &'a Path,
    ) -> Result<Machine<'a>, Error> {
        let annotations = spec.annotations().iter().flatten();
        let config = options::config(request.options.as_ref())?
            .with_annotations(annotations.map(|(name, value)| (name.as_str(), value.as_str())))
            .map_err(Error::Config)?;
        let allowed = self.cgroup().and_then(PodCgroup::memory_limit);
        let sizes = VmSizes::new(limits, config.vm(), VmSize::of_host()?, allowed)?;
        let network = network::Wanted {
            place: network::Place::of(spec),
            config: config.network(),
            vcpus: sizes.start.vcpus,
            record,
        };
        Ok(Machine {
            config,
            sizes,
            network,
        })
    }

    /// Containers come after their sandbox, and not without it: its VM is theirs.
    fn running_sandbox(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.container(id) {
            Ok(sandbox) if sandbox.init().exit().is_none() => Ok(sandbox),
            Ok(_) | Err(_) => Err(Error::NoSandbox { id: id.to_owned() }),
        }
    }

    /// containerd names whose processes a container shall see by the pid that it has on the host, which the sandbox and all
    /// containers have in common. But kubelet lets either all containers of a pod see the sandbox's, and then there is none
    /// here, or none of them but one for debugging, which sees another's.
    fn only_one_with_own_processes(&self) -> Result<Option<Arc<Container>>, Error> {
        let mut all = self.containers();
        all.retain(|one| {
            one.own_pid_namespace() && !one.is_sandbox() && one.init().exit().is_none()
        });
        match &all[..] {
            [] => Ok(None),
            [one] => Ok(Some(one.clone())),
            several => Err(Error::UnsupportedSpec(format!(
                "joins the PID namespace of another container, but which of the {} that have one cannot be told in a VM",
                several.len()
            ))),
        }
    }

    /// None for a sandbox: what containerd mounts for it is an image without use.
    async fn prepare_storage(
        &self,
        kind: &Kind,
        request: &Create,
        divided: &Divided,
        image_mib: u32,
    ) -> Result<Option<ContainerStorage>, Error> {
        if *kind == Kind::Sandbox {
            return Ok(None);
        }
        let wanted = Wanted {
            rootfs: request.rootfs.clone(),
            root: request.bundle.join(&divided.root),
            binds: divided.binds.clone(),
            devices: divided.devices.clone(),
            images: Images {
                places: divided
                    .volumes
                    .iter()
                    .filter_map(|own| own.disk.as_ref()?.image())
                    .map(Path::to_owned)
                    .collect(),
                mib: image_mib,
            },
        };
        self.share().prepare(&request.id, wanted).await.map(Some)
    }

    fn log_identity<'a>(&'a self, id: &'a str) -> LogIdentity<'a> {
        LogIdentity {
            namespace: self.namespace(),
            id,
        }
    }
}

/// Divides a specification. Looking at what it mounts may wait for a disk or a server.
async fn divide(spec: Spec, id: &str, kind: &Kind, sources: Sources) -> Result<Divided, Error> {
    let (id, kind) = (id.to_owned(), kind.clone());
    let look = move |path: &Path, is_shm| sources.look(path, is_shm);
    storage::blocking(move || spec::divide(spec, &id, &kind, look)).await
}

/// Connects the streams of `process` to the guest, lets `create` create the process with them, and attaches them. Returns
/// what `create` does.
pub(super) async fn connect<T>(
    ends: Ends,
    vm: &crate::vm::Vm,
    process: &Process,
    create: impl AsyncFnOnce(agent::Stdio) -> Result<T, Error>,
) -> Result<T, Error> {
    let (streams, ports) = ends.connect(vm).await?;
    let created = create(agent_stdio(process, ports)).await?;
    process.attach(streams);
    Ok(created)
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
    if id.is_empty() || id.starts_with('.') || id.contains(['/', '\0']) {
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

fn cgroups_path(spec: &Spec) -> Option<&Path> {
    spec.linux().as_ref()?.cgroups_path().as_deref()
}

fn has_own_pid_namespace(spec: &Spec) -> bool {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|namespaces| {
            namespaces.iter().any(|namespace| {
                namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none()
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for id in ["", ".", "..", ".hidden", "a/b", "../x", "a\0"] {
            assert!(matches!(check_id(id), Err(Error::InvalidId(_))), "{id:?}");
        }
        for id in ["x", "a.b", "pod-1_2"] {
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
