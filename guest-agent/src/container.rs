//! The containers of this guest: what is known of each, and what may be done with it in which state.
//!
//! ```text
//! (creating) ─► created ─► starting ─► running ◄─► paused
//!                  └───────────┴───────────┴──────────┴──► stopped: whenever the first process has ended
//! ```
//!
//! No lock is held while anything is waited for: a step that takes time first moves the container to a state in which
//! nobody else begins another.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_protocol::{SHARE_MOUNT_POINT, agent};
use libcontainer::container::{Container as OciContainer, ContainerStatus};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec, Spec};
use tokio::sync::{OnceCell, watch};
use tokio::task::JoinHandle;

use crate::cgroup::Cgroup;
use crate::devices::{self, Node};
use crate::disks::{self, Disks, blocking};
use crate::error::{During, Error, Result};
use crate::launch::{Confinement, Identity, Launcher, Reports, Work};
use crate::pod::{Mounts, Volumes};
use crate::process::{Process, StdioRequest, Wiring};
use crate::reaper::Reaper;
use crate::signals::Signal;
use crate::spec;
use crate::storage::{self, Removed};
use crate::streams::{ChildEnds, Stdio, Streams};
use crate::terminal::ConsoleSocket;

/// Stopping, thawing or killing a process takes the time of its current system call; a request does not wait longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Everything below is the agent's own; the share is mounted there too.
const RUN: &str = "/run/husk";

/// The root of a pod's sandbox, which has no files.
const SANDBOX_ROOT: &str = "/run/husk/pod/root";

/// All containers, and what they are made with.
#[derive(Debug)]
pub(crate) struct Containers {
    slots: Mutex<HashMap<String, Slot>>,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    disks: Arc<Disks>,
    launcher: Launcher,
    share: OnceCell<()>,
    removed: Removed,
    sysfs: OnceCell<()>,
    volumes: Arc<Volumes>,
    names: AtomicU64,
}

#[derive(Debug)]
enum Slot {
    /// The id is taken; there is nothing to work with yet.
    Creating,
    Created(Arc<Container>),
}

/// Whether of all containers but `id` nothing uses a volume any more.
fn nobody_else(slots: &HashMap<String, Slot>, id: &str) -> bool {
    slots
        .iter()
        .all(|(other, slot)| other == id || slot.is_gone())
}

impl Slot {
    fn is_gone(&self) -> bool {
        match self {
            Self::Creating => false,
            Self::Created(container) => container.is_gone.load(Ordering::Relaxed),
        }
    }
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    spec: Spec,
    cgroup: Cgroup,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Exec>>,
    state: Mutex<State>,
    oom_kills: watch::Sender<u64>,
    oom_watch: JoinHandle<()>,
    is_sandbox: bool,
    /// Nothing of it uses a volume any more. Set with the slots locked, so that one of several sees that it is the last.
    is_gone: AtomicBool,
    /// Locked by who removes it.
    is_removed: tokio::sync::Mutex<bool>,
    /// Of folders of volumes, and of a sandbox's namespaces.
    _mounts: [Mounts; 2],
}

/// What is asked for with a container.
#[derive(Debug)]
pub(crate) struct Creation<'a> {
    pub(crate) id: &'a str,
    /// OCI configuration, JSON.
    pub(crate) spec: &'a [u8],
    /// Whether it is the pod's sandbox.
    pub(crate) sandbox: bool,
    pub(crate) volumes: &'a [agent::Volume],
    /// With the root file system.
    pub(crate) root_disk: Option<&'a agent::RootDisk>,
    pub(crate) root_layers: Option<&'a agent::RootLayers>,
    pub(crate) disk_devices: &'a [agent::DiskDevice],
    /// That the host shares.
    pub(crate) folder: &'a agent::Folder,
    pub(crate) stdio: StdioRequest,
}

#[derive(Debug)]
enum Exec {
    Starting,
    Started(Arc<Process>),
}

#[derive(Debug)]
enum State {
    Created(Reports),
    Starting,
    Running,
    /// On the way from running to paused, or back.
    Turning,
    Paused,
}

impl Containers {
    pub(crate) fn new(
        reaper: Arc<Reaper>,
        streams: Arc<Streams>,
        disks: Arc<Disks>,
        log_level: String,
    ) -> Self {
        Self {
            slots: Mutex::default(),
            reaper,
            streams,
            disks,
            launcher: Launcher {
                state_root: PathBuf::from(RUN).join("state"),
                log_level,
            },
            share: OnceCell::new(),
            removed: Removed::default(),
            sysfs: OnceCell::new(),
            volumes: Arc::default(),
            names: AtomicU64::new(0),
        }
    }

    /// Makes a container up to the OCI state `created`; returns its first process' pid.
    pub(crate) async fn create(&self, creation: Creation<'_>) -> Result<Pid> {
        // Taken whatever becomes of the request: connections that nobody takes stay open for ever.
        let streams = self.streams.take(creation.stdio.ports).await?;
        let id = creation.id;
        match self.slots().entry(id.to_owned()) {
            Entry::Occupied(_) => return Err(Error::ContainerExists { id: id.to_owned() }),
            Entry::Vacant(slot) => slot.insert(Slot::Creating),
        };
        let built = self.build(&creation, streams).await;
        if built.is_err() {
            disks::unmount_root(id).await;
            if nobody_else(&self.slots(), id) {
                self.close_volumes().await;
            }
        }
        let mut slots = self.slots();
        match built {
            Ok(container) => {
                let pid = container.init.pid();
                slots.insert(id.to_owned(), Slot::Created(Arc::new(container)));
                Ok(pid)
            }
            Err(error) => {
                self.forget(id);
                slots.remove(id);
                Err(error)
            }
        }
    }

    async fn build(&self, creation: &Creation<'_>, streams: Stdio) -> Result<Container> {
        let &Creation {
            id,
            sandbox,
            stdio: request,
            folder,
            ..
        } = creation;
        let mut spec: Spec = parse("the specification", creation.spec)?;
        if !sandbox && uses_share(&spec) {
            self.share
                .get_or_try_init(async || storage::mount_share(folder))
                .await?;
            self.removed.look();
        }
        if let Some(disk) = creation.root_disk {
            self.disks.mount_root(id, disk).await?;
        } else if let Some(layers) = creation.root_layers {
            self.disks.mount_layers(id, layers).await?;
        }
        let disks = self.disk_nodes(creation.disk_devices).await?;
        let devices = self.volume_devices(creation.volumes).await?;
        let (volumes, wanted) = (Arc::clone(&self.volumes), creation.volumes.to_vec());
        let (spec, folders) = blocking(move || {
            volumes.make(&wanted, &devices)?;
            let folders = volumes.locate(&mut spec)?;
            Ok::<_, Error>((spec, folders))
        })
        .await?;
        let prepared = if sandbox {
            make_sandbox_root(&spec)?;
            spec::prepare_sandbox(&spec, id, Path::new(SANDBOX_ROOT))?
        } else {
            let lookup = |path: &Path| disks.get(path).copied().or_else(|| devices::lookup(path));
            spec::prepare(spec, id, request.terminal, lookup)?
        };
        for (name, value) in &prepared.network_sysctls {
            set_sysctl(name, value)?;
        }
        let spec = prepared.spec;
        if spec::has_user_namespace(&spec) {
            self.sysfs
                .get_or_try_init(async || storage::mount_sysfs())
                .await?;
        }
        let bundle = self.write(id, "config.json", &spec)?;
        let bundle = bundle.parent().map(PathBuf::from).unwrap_or_default();

        let wiring = self.wire(&spec, spec.process().as_ref(), request, streams)?;
        let expectation = self.reaper.expect();
        let (pid, launch, terminal) = wiring
            .launch(|console, ends| {
                self.launch(id, Work::Create { bundle, sandbox }, console, ends)
            })
            .await?;
        let init = Arc::new(Process::new(pid, expectation.claim(pid), terminal));
        let namespaces = if sandbox {
            Mounts::of_namespaces(pid).inspect_err(|_| {
                let _ended = init.signal(Signal::KILL);
            })?
        } else {
            Mounts::default()
        };

        let cgroup = Cgroup::of(id);
        if !spec::has_pid_namespace(&spec) {
            tokio::spawn(end_with(Arc::clone(&init), cgroup.clone()));
        }
        let oom_kills = watch::Sender::new(0);
        let oom_watch = tokio::spawn({
            let (cgroup, count) = (cgroup.clone(), oom_kills.clone());
            async move {
                if let Err(error) = cgroup.report_oom_kills(count).await {
                    tracing::error!(error = crate::error::chain(&error), "OOM kills go unseen");
                }
            }
        });
        Ok(Container {
            id: id.to_owned(),
            spec,
            cgroup,
            init,
            execs: Mutex::default(),
            state: Mutex::new(State::Created(launch.reports)),
            oom_kills,
            oom_watch,
            is_sandbox: sandbox,
            is_gone: AtomicBool::new(false),
            is_removed: tokio::sync::Mutex::default(),
            _mounts: [folders, namespaces],
        })
    }

    /// The files of the disks that volumes are on, by their serials.
    async fn volume_devices(&self, volumes: &[agent::Volume]) -> Result<HashMap<String, PathBuf>> {
        let mut devices = HashMap::new();
        for volume in volumes.iter().filter(|volume| !volume.serial.is_empty()) {
            let device = self.disks.find(&volume.serial).await?;
            devices.insert(volume.serial.clone(), device);
        }
        Ok(devices)
    }

    /// What the guest has for the devices that are disks, by their paths in the container.
    async fn disk_nodes<'a>(
        &self,
        devices: &'a [agent::DiskDevice],
    ) -> Result<HashMap<&'a Path, Node>> {
        let mut nodes = HashMap::new();
        for device in devices {
            let node = self.disks.node(&device.serial).await?;
            nodes.insert(Path::new(&device.path), node);
        }
        Ok(nodes)
    }

    /// Lets the first process of a created container execute its program.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.get(id)?.start(&self.launcher.state_root).await
    }

    /// Starts a process in a container that is created or running; returns its pid.
    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &[u8],
        stdio: StdioRequest,
    ) -> Result<Pid> {
        // As for the first process.
        let streams = self.streams.take(stdio.ports).await?;
        let container = self.get(id)?;
        let mut process: ProcessSpec = parse("the process", process)?;
        container.must_take_processes()?;
        container.reserve(exec_id)?;
        let started = self
            .start_exec(&container, &mut process, stdio, streams)
            .await;
        let mut execs = container.execs();
        match started {
            Ok(process) => {
                let pid = process.pid();
                execs.insert(exec_id.to_owned(), Exec::Started(Arc::new(process)));
                Ok(pid)
            }
            Err(error) => {
                execs.remove(exec_id);
                Err(error)
            }
        }
    }

    async fn start_exec(
        &self,
        container: &Container,
        process: &mut ProcessSpec,
        request: StdioRequest,
        streams: Stdio,
    ) -> Result<Process> {
        let root = spec::root_of(container.init.pid());
        if !spec::has_folder(&root, process.cwd()) {
            return Err(Error::NoFolder {
                path: process.cwd().display().to_string(),
            });
        }
        let first = container.spec.process().as_ref();
        spec::check_user(&container.spec, process.user())?;
        spec::prepare_process(process, request.terminal, &root, first);
        let name = format!(
            "process-{}.json",
            self.names.fetch_add(1, Ordering::Relaxed)
        );
        let file = self.write(&container.id, &name, process)?;
        let work = Work::Exec {
            process: file.clone(),
            confinement: confinement(container, process).map(Box::new),
            sub_cgroup: container.sub_cgroup(),
        };
        let wiring = self.wire(&container.spec, Some(process), request, streams)?;
        let expectation = self.reaper.expect();
        let launched = wiring
            .launch(|console, ends| self.launch(&container.id, work, console, ends))
            .await;
        if let Err(error) = fs::remove_file(&file) {
            tracing::warn!(%error, file = %file.display(), "a file of an exec stays");
        }
        let (pid, _, terminal) = launched?;
        Ok(Process::new(pid, expectation.claim(pid), terminal))
    }

    /// Changes the container's limits.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let container = self.get(id)?;
        let mut resources: LinuxResources = parse("the resources", resources)?;
        container.must_exist()?;
        spec::translate_limits(&mut resources);
        // libcgroups always writes the device rules, and none would mean the default ones.
        let first = container
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        resources.set_devices(first.and_then(|resources| resources.devices().clone()));
        let name = format!(
            "resources-{}.json",
            self.names.fetch_add(1, Ordering::Relaxed)
        );
        let file = self.write(id, &name, &resources)?;
        let work = Work::Update {
            resources: file.clone(),
        };
        let mut launch = self.launch(id, work, None, ChildEnds::default())?;
        let updated = launch.reports.done().await;
        if let Err(error) = fs::remove_file(&file) {
            tracing::warn!(%error, file = %file.display(), "a file of an update stays");
        }
        updated.map(drop)
    }

    /// Kills what is left of a container and frees what it holds. An unknown one is no error.
    pub(crate) async fn remove(&self, id: &str) -> Result<()> {
        let container = match self.slots().get(id) {
            None => return Ok(()),
            Some(Slot::Creating) => {
                return Err(Error::WrongState {
                    id: id.to_owned(),
                    is: "being created",
                    wanted: "created",
                });
            }
            Some(Slot::Created(container)) => Arc::clone(container),
        };
        // Who asks again meanwhile waits for what he has asked for.
        let mut is_removed = container.is_removed.lock().await;
        if *is_removed {
            return Ok(());
        }
        container.clear().await?;
        disks::unmount_root(id).await;
        let volumes = Arc::clone(&self.volumes);
        blocking(move || volumes.sync()).await;
        let is_last = {
            let slots = self.slots();
            container.is_gone.store(true, Ordering::Relaxed);
            nobody_else(&slots, id)
        };
        // With its sandbox the pod is over, whatever a process may hold up.
        if is_last || container.is_sandbox {
            self.close_volumes().await;
        }
        self.forget(id);
        self.removed.add(id);
        self.slots().remove(id);
        *is_removed = true;
        Ok(())
    }

    async fn close_volumes(&self) {
        let volumes = Arc::clone(&self.volumes);
        blocking(move || volumes.close()).await;
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.slots().get(id) {
            Some(Slot::Created(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating) | None => Err(Error::NoContainer { id: id.to_owned() }),
        }
    }

    fn wire(
        &self,
        container: &Spec,
        process: Option<&ProcessSpec>,
        request: StdioRequest,
        streams: Stdio,
    ) -> Result<Wiring> {
        let uid = process.map_or(0, |process| process.user().uid());
        let uid = spec::uid_in_guest(container, uid)?;
        Wiring::new(streams, request, uid, || {
            let name = format!("console-{}", self.names.fetch_add(1, Ordering::Relaxed));
            ConsoleSocket::bind(PathBuf::from(RUN).join(name))
        })
    }

    fn launch(
        &self,
        id: &str,
        work: Work,
        console: Option<&ConsoleSocket>,
        ends: ChildEnds,
    ) -> Result<crate::launch::Launch> {
        self.launcher
            .launch(id, work, console.map(ConsoleSocket::path), ends)
    }

    fn bundle(id: &str) -> PathBuf {
        PathBuf::from(RUN).join("bundles").join(id)
    }

    fn write(&self, id: &str, name: &str, content: &impl serde::Serialize) -> Result<PathBuf> {
        let folder = Self::bundle(id);
        let file = folder.join(name);
        let write = || {
            fs::create_dir_all(&folder)?;
            fs::write(&file, serde_json::to_vec(content)?)
        };
        write().during(format!("writing {}", file.display()))?;
        Ok(file)
    }

    /// Removes the files of a container that is gone, or that has not come to be.
    fn forget(&self, id: &str) {
        for folder in [Self::bundle(id), self.launcher.state_root.join(id)] {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, folder = %folder.display(), "files of a container stay");
                }
                Ok(()) | Err(_) => {}
            }
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    async fn start(&self, state_root: &Path) -> Result<()> {
        let mut reports = {
            let mut state = self.state();
            if self.init.has_ended() || !matches!(*state, State::Created(_)) {
                return Err(self.wrong_state(&state, "created"));
            }
            match std::mem::replace(&mut *state, State::Starting) {
                State::Created(reports) => reports,
                other => {
                    *state = other;
                    return Err(self.wrong_state(&state, "created"));
                }
            }
        };
        let started = OciContainer::load(state_root.join(&self.id))
            .and_then(|mut container| container.set_status(ContainerStatus::Created).start())
            .map_err(|error| Error::Launch(crate::error::chain(&error)));
        let started = match started {
            Ok(()) => reports.executed().await,
            Err(error) => Err(error),
        };
        *self.state() = State::Running;
        started
    }

    /// The first process, or that of an exec.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        match self.execs().get(exec_id) {
            Some(Exec::Started(process)) => Ok(Arc::clone(process)),
            Some(Exec::Starting) | None => Err(self.no_process(exec_id)),
        }
    }

    /// Forgets an exec that has ended.
    pub(crate) fn remove_process(&self, exec_id: &str) -> Result<()> {
        match self.execs().entry(exec_id.to_owned()) {
            Entry::Occupied(entry) => match entry.get() {
                Exec::Started(process) if process.has_ended() => {
                    entry.remove();
                    Ok(())
                }
                Exec::Started(_) | Exec::Starting => Err(Error::StillRunning {
                    id: self.id.clone(),
                    exec_id: exec_id.to_owned(),
                }),
            },
            Entry::Vacant(_) => Err(self.no_process(exec_id)),
        }
    }

    /// Sends a signal to one process, or to all of the container.
    pub(crate) fn signal(&self, exec_id: &str, signal: Signal, all: bool) -> Result<()> {
        if all {
            return self.cgroup.signal(signal);
        }
        let process = self.process(exec_id)?;
        // The kernel drops these for the first process of a PID namespace that has no handler, as before its program runs.
        let dropped = exec_id.is_empty()
            && matches!(*self.state(), State::Created(_))
            && spec::has_pid_namespace(&self.spec);
        process.signal(if dropped && signal.asks_to_end() {
            Signal::KILL
        } else {
            signal
        })
    }

    /// Every process, with the exec that it is, if it is one. None, once the container is stopped.
    pub(crate) fn processes(&self) -> Result<Vec<(Pid, String)>> {
        let pids = self.cgroup.processes()?;
        let execs = self.execs();
        let exec_of = |pid| {
            execs.iter().find_map(|(exec_id, exec)| match exec {
                Exec::Started(process) if process.pid() == pid && !process.has_ended() => {
                    Some(exec_id.clone())
                }
                Exec::Started(_) | Exec::Starting => None,
            })
        };
        Ok(pids
            .into_iter()
            .map(|pid| (pid, exec_of(pid).unwrap_or_default()))
            .collect())
    }

    /// Stops every process where it is.
    pub(crate) async fn pause(&self) -> Result<()> {
        self.turn("running", true, |state| matches!(state, State::Running))
            .await
    }

    /// Lets every process go on.
    pub(crate) async fn resume(&self) -> Result<()> {
        self.turn("paused", false, |state| matches!(state, State::Paused))
            .await
    }

    async fn turn(
        &self,
        from: &'static str,
        frozen: bool,
        may: impl FnOnce(&State) -> bool,
    ) -> Result<()> {
        let before = {
            let mut state = self.state();
            if self.init.has_ended() || !may(&state) {
                return Err(self.wrong_state(&state, from));
            }
            std::mem::replace(&mut *state, State::Turning)
        };
        let turned = async {
            self.cgroup.set_frozen(frozen)?;
            let what = if frozen { "stop" } else { "go on" };
            self.in_time(what, self.cgroup.frozen(frozen)).await
        };
        match turned.await {
            Ok(()) => {
                *self.state() = if frozen {
                    State::Paused
                } else {
                    State::Running
                };
                Ok(())
            }
            Err(error) => {
                // As it was: the freezer takes back an order that it has not carried out.
                if let Err(error) = self.cgroup.set_frozen(!frozen) {
                    tracing::error!(error = crate::error::chain(&error), "the freezer is stuck");
                }
                *self.state() = before;
                Err(error)
            }
        }
    }

    /// Counters of the container's cgroup.
    pub(crate) fn stats(&self) -> agent::StatsContainerResponse {
        crate::stats::of(&self.cgroup)
    }

    /// The count of OOM kills; ends with the container.
    pub(crate) fn oom_kills(&self) -> watch::Receiver<u64> {
        self.oom_kills.subscribe()
    }

    /// Brings the count of OOM kills up to date. To be called before the end of a process is told, so that the host
    /// hears of its cause as well.
    pub(crate) fn count_oom_kills(&self) {
        self.cgroup.report_oom_kills_now(&self.oom_kills);
    }

    /// Ends every process and removes the cgroup.
    async fn clear(&self) -> Result<()> {
        if self.cgroup.path().exists() {
            self.cgroup.kill()?;
            self.in_time("end", self.cgroup.empty()).await?;
        }
        self.oom_watch.abort();
        self.cgroup.remove()
    }

    /// The group of the first process below the container's, if processes may only be there.
    fn sub_cgroup(&self) -> Option<String> {
        if !self.cgroup.is_inner() {
            return None;
        }
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.init.pid())).ok()?;
        let path = text.trim().strip_prefix("0::")?;
        let below = path.strip_prefix(&Cgroup::name(&self.id))?;
        Some(below.trim_start_matches('/').to_owned()).filter(|below| !below.is_empty())
    }

    fn reserve(&self, exec_id: &str) -> Result<()> {
        match self.execs().entry(exec_id.to_owned()) {
            Entry::Occupied(_) => Err(Error::ProcessExists {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            }),
            Entry::Vacant(entry) => {
                entry.insert(Exec::Starting);
                Ok(())
            }
        }
    }

    fn must_take_processes(&self) -> Result<()> {
        let state = self.state();
        match *state {
            State::Created(_) | State::Starting | State::Running if !self.init.has_ended() => {
                Ok(())
            }
            _ => Err(self.wrong_state(&state, "running")),
        }
    }

    fn must_exist(&self) -> Result<()> {
        if self.init.has_ended() {
            return Err(self.wrong_state(&self.state(), "running"));
        }
        Ok(())
    }

    fn wrong_state(&self, state: &State, wanted: &'static str) -> Error {
        let is = match state {
            _ if self.init.has_ended() => "stopped",
            State::Created(_) => "created",
            State::Starting => "starting",
            State::Running => "running",
            State::Turning => "being paused or resumed",
            State::Paused => "paused",
        };
        Error::WrongState {
            id: self.id.clone(),
            is,
            wanted,
        }
    }

    fn no_process(&self, exec_id: &str) -> Error {
        Error::NoProcess {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        }
    }

    async fn in_time(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::TooSlow {
                id: self.id.clone(),
                what,
                seconds: PATIENCE.as_secs(),
            }),
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.oom_watch.abort();
    }
}

/// Waits until more OOM kills have happened than `seen`, and holds nothing of the container meanwhile.
pub(crate) async fn beyond(mut kills: watch::Receiver<u64>, seen: u64, id: &str) -> Result<u64> {
    let kills = kills.wait_for(|kills| *kills > seen).await;
    kills
        .map(|kills| *kills)
        .map_err(|_| Error::Removed { id: id.to_owned() })
}

/// Ends the other processes of a container with its first one, where no PID namespace does.
async fn end_with(init: Arc<Process>, cgroup: Cgroup) {
    if crate::process::wait(init.watch()).await.is_ok()
        && let Err(error) = cgroup.kill()
    {
        tracing::debug!(
            error = crate::error::chain(&error),
            "nothing was left to kill"
        );
    }
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|source| Error::Malformed { what, source })
}

/// Makes the folder that is the sandbox's root, with the points where it mounts: as another user of the guest, it could
/// not make them.
fn make_sandbox_root(spec: &Spec) -> Result<()> {
    const FAILED: &str = "making the root of the sandbox";
    let (uid, gid) = (spec::uid_in_guest(spec, 0)?, spec::gid_in_guest(spec, 0)?);
    for point in ["proc", "dev"] {
        fs::create_dir_all(Path::new(SANDBOX_ROOT).join(point)).during(FAILED)?;
    }
    chown(SANDBOX_ROOT, Some(uid), Some(gid)).during(FAILED)
}

fn uses_share(spec: &Spec) -> bool {
    let sources = spec
        .mounts()
        .iter()
        .flatten()
        .filter_map(|mount| mount.source().as_deref());
    let root = spec.root().as_ref().map(|root| root.path().as_path());
    sources
        .chain(root)
        .any(|path| path.starts_with(SHARE_MOUNT_POINT))
}

/// What exec must do itself: see [`Confinement`].
fn confinement(container: &Container, process: &ProcessSpec) -> Option<Confinement> {
    let seccomp = container.spec.linux().as_ref()?.seccomp().clone();
    let identity = spec::has_user_namespace(&container.spec).then(|| Identity {
        with: container.init.pid().as_raw(),
        user: process.user().clone(),
    });
    if seccomp.is_none() && identity.is_none() {
        return None;
    }
    let late_capabilities = match process.no_new_privileges() {
        Some(true) if identity.is_none() => None,
        _ => process.capabilities().clone(),
    };
    Some(Confinement {
        identity,
        seccomp,
        late_capabilities,
    })
}

/// Sets a parameter of the guest's network; `name` is separated by dots or slashes.
fn set_sysctl(name: &str, value: &str) -> Result<()> {
    // Without dots there is no `..`, so the path stays where it begins.
    let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
    fs::write(&path, value).during(format!("setting {name} to {value}"))
}
