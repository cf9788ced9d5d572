//! One container: its processes, its state, and what it holds on the host.
//!
//! The state is that of its first process, with pausing laid over it:
//!
//! ```text
//! created ──► running ◄──► paused        any ──exit──► stopped
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

use crate::agent::Target;
use crate::disks::Disks;
use crate::error::Error;
use crate::hooks::HookState;
use crate::process::{Exit, Process, ProcessState};
use crate::spec::HostHooks;
use crate::storage::ContainerStorage;
use crate::vm::Vm;

/// Pausing, as far as it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    Off,
    Pausing,
    Paused,
    Resuming,
}

/// What `State` reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Pausing,
    Paused,
    Stopped,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Pausing | Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What makes a container; see [`Container`] for the meaning.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) oci_version: String,
    pub(crate) guest_pid: u32,
    pub(crate) own_pid_namespace: bool,
    pub(crate) is_sandbox: bool,
    pub(crate) hooks: HostHooks,
    pub(crate) init: Process,
    pub(crate) vm: Arc<Vm>,
    /// None for a sandbox, which has no files.
    pub(crate) storage: Option<ContainerStorage>,
    pub(crate) disks: Disks,
}

#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    bundle: PathBuf,
    oci_version: String,
    /// Of its first process, as the guest's root namespace numbers it.
    guest_pid: u32,
    /// Whether the kernel kills every process of the container with the first one.
    own_pid_namespace: bool,
    /// Whether it stands for its pod.
    is_sandbox: bool,
    hooks: HostHooks,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    pause: Mutex<Pause>,
    vm: Arc<Vm>,
    storage: Mutex<Option<ContainerStorage>>,
    disks: Disks,
    outlives_kill: AtomicBool,
    deleted: OnceCell<Exit>,
}

/// A process of `Exec`.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) process: Arc<Process>,
    /// OCI process, JSON.
    pub(crate) spec: Vec<u8>,
}

impl Container {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            id: parts.id,
            bundle: parts.bundle,
            oci_version: parts.oci_version,
            guest_pid: parts.guest_pid,
            own_pid_namespace: parts.own_pid_namespace,
            is_sandbox: parts.is_sandbox,
            hooks: parts.hooks,
            init: Arc::new(parts.init),
            execs: Mutex::new(HashMap::new()),
            pause: Mutex::new(Pause::Off),
            vm: parts.vm,
            storage: Mutex::new(parts.storage),
            disks: parts.disks,
            outlives_kill: AtomicBool::new(false),
            deleted: OnceCell::new(),
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn bundle(&self) -> &std::path::Path {
        &self.bundle
    }

    pub(crate) fn guest_pid(&self) -> u32 {
        self.guest_pid
    }

    pub(crate) fn own_pid_namespace(&self) -> bool {
        self.own_pid_namespace
    }

    pub(crate) fn is_sandbox(&self) -> bool {
        self.is_sandbox
    }

    /// Whether it was sent SIGKILL and had not ended after the time that it may take.
    pub(crate) fn outlives_kill(&self) -> bool {
        self.outlives_kill.load(Ordering::Relaxed)
    }

    pub(crate) fn set_outlives_kill(&self) {
        self.outlives_kill.store(true, Ordering::Relaxed);
    }

    pub(crate) fn hooks(&self) -> &HostHooks {
        &self.hooks
    }

    pub(crate) fn hook_state(&self) -> HookState<'_> {
        HookState {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: self.vm.pid(),
            bundle: &self.bundle,
        }
    }

    pub(crate) fn disks(&self) -> &Disks {
        &self.disks
    }

    pub(crate) fn init(&self) -> &Arc<Process> {
        &self.init
    }

    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Names a process of the container to the agent.
    pub(crate) fn target(&self, process: &Process) -> Target {
        Target {
            id: self.id.clone(),
            exec_id: process.exec_id().to_owned(),
        }
    }

    /// The process that `exec_id` names; the first one if it is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.exec(exec_id).map(|exec| exec.process.clone())
    }

    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, Error> {
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::ProcessNotFound {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            })
    }

    pub(crate) fn execs(&self) -> Vec<Arc<Exec>> {
        lock(&self.execs).values().cloned().collect()
    }

    /// Adds a process that is to be started later.
    pub(crate) fn add_exec(&self, exec: Exec) -> Result<(), Error> {
        match self.status() {
            Status::Created | Status::Running => {}
            status @ (Status::Pausing | Status::Paused | Status::Stopped) => {
                return Err(Error::ExecInState {
                    state: status.name(),
                });
            }
        }
        let mut execs = lock(&self.execs);
        let exec_id = exec.process.exec_id().to_owned();
        if execs.contains_key(&exec_id) {
            return Err(Error::ProcessExists { exec_id });
        }
        execs.insert(exec_id, Arc::new(exec));
        Ok(())
    }

    /// Claims the start of an added process, as [`Process::begin_start`]. Refused unless the container may go on: what joins
    /// a frozen cgroup never gets to its program.
    pub(crate) fn begin_exec(&self, exec: &Exec) -> Result<(), Error> {
        let pause = lock(&self.pause);
        match *pause {
            Pause::Off => exec.process.begin_start(),
            Pause::Pausing | Pause::Paused | Pause::Resuming => Err(Error::ExecInState {
                state: Status::Paused.name(),
            }),
        }
    }

    /// Waits for the processes that are being started.
    pub(crate) async fn settle_execs(&self) {
        for exec in self.execs() {
            exec.process.settled().await;
        }
    }

    pub(crate) fn remove_exec(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    pub(crate) fn status(&self) -> Status {
        self.status_of(&self.init)
    }

    /// The status of one process: paused if the container is.
    pub(crate) fn status_of(&self, process: &Process) -> Status {
        match process.state() {
            ProcessState::Stopped(_) => Status::Stopped,
            ProcessState::Created | ProcessState::Starting => Status::Created,
            ProcessState::Running => match *lock(&self.pause) {
                Pause::Off | Pause::Resuming => Status::Running,
                Pause::Pausing => Status::Pausing,
                Pause::Paused => Status::Paused,
            },
        }
    }

    /// Claims the right to pause; to be followed by [`Container::end_pause`].
    pub(crate) fn begin_pause(&self) -> Result<(), Error> {
        let mut pause = lock(&self.pause);
        match self.init.state() {
            ProcessState::Running if *pause == Pause::Off => {
                *pause = Pause::Pausing;
                Ok(())
            }
            ProcessState::Running => Err(wrong_state("pause", "paused")),
            state => Err(wrong_state("pause", state.name())),
        }
    }

    pub(crate) fn end_pause(&self, paused: bool) {
        *lock(&self.pause) = if paused { Pause::Paused } else { Pause::Off };
    }

    /// Claims the right to resume; to be followed by [`Container::end_pause`].
    pub(crate) fn begin_resume(&self) -> Result<(), Error> {
        let mut pause = lock(&self.pause);
        match self.init.state() {
            ProcessState::Running if *pause == Pause::Paused => {
                *pause = Pause::Resuming;
                Ok(())
            }
            state => Err(wrong_state("resume", state.name())),
        }
    }

    /// Set by who deletes it, for whom others wait.
    pub(crate) fn deleted(&self) -> &OnceCell<Exit> {
        &self.deleted
    }

    pub(crate) fn take_storage(&self) -> Option<ContainerStorage> {
        lock(&self.storage).take()
    }
}

fn wrong_state(verb: &'static str, state: &'static str) -> Error {
    Error::WrongState {
        verb,
        state,
        subject: "container",
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
