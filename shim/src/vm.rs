//! One virtual machine: its worker process, its console, its agent, and how it ends.
//!
//! ```text
//! boot ──► worker spawned ──Boot──► vCPUs run ──Event::Ready──► agent connected (a `Vm` exists) ──► ended
//!              └──────────────────────────┴────────────── any failure: the worker is killed ───────────┘
//! ```
//!
//! A task of its own watches the worker to its end, whoever else is gone, and announces the end with a reason in
//! [`End`].

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use husk_config::{Cache, Config, Sharing, Storage};
use husk_protocol::agent::Folder;
use husk_protocol::{AGENT_PORT, GUEST_CID, READY_PORT, SHARE_TAG, notice};
use husk_vmm::config::{
    CachePolicy, DiskConfig, FileServerConfig, NoticeGids, ShareConfig, ShareProtocol, VmConfig,
    WatchConfig,
};
use husk_vmm::control::{Event, ExitReason};
use log::{info, warn};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::sync::{Notify, OnceCell, OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinHandle;

use crate::agent::Agent;
use crate::changes;
use crate::console::{LastLines, follow};
use crate::error::Error;
use crate::file_server::FileServer;
use crate::network::Network;
use crate::size::{VmSize, VmSizes};
use crate::storage::{Disk, VOLUME_PREFIX, VolumeDisk};
use crate::vmm::{self, Worker};

/// How long the console may take to end once its only writer is dead.
const CONSOLE_END_LIMIT: Duration = Duration::from_secs(1);

/// The end of a VM, to be awaited by any number of tasks.
#[derive(Debug, Clone)]
pub(crate) struct End(watch::Receiver<Option<Arc<str>>>);

impl End {
    /// An end that is announced through the sender.
    pub(crate) fn channel() -> (watch::Sender<Option<Arc<str>>>, Self) {
        let (sender, receiver) = watch::channel(None);
        (sender, Self(receiver))
    }

    /// The reason, if the VM has ended.
    pub(crate) fn reason(&self) -> Option<Arc<str>> {
        self.0.borrow().clone()
    }

    /// Waits for the VM's end; returns the reason.
    pub(crate) async fn wait(&self) -> Arc<str> {
        let mut receiver = self.0.clone();
        let reason = receiver.wait_for(Option::is_some).await;
        match reason {
            Ok(reason) => reason.clone().expect("waited for Some"),
            Err(_) => Arc::from("nobody watches it any more"),
        }
    }
}

/// A VM that runs, or ran; see [`Vm::end`]. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Vm {
    worker: OwnedWorker,
    pid: u32,
    agent: Agent,
    end: End,
    stopped: Arc<AtomicBool>,
    sizes: VmSizes,
    /// What was asked for last.
    size: Mutex<VmSize>,
    oom_score_adj: AtomicI32,
    /// How many it has ever been given.
    disks: AtomicU64,
    /// The serials of those that are volumes.
    volumes: Mutex<HashMap<VolumeDisk, Arc<OnceCell<String>>>>,
    /// Of layers that the guest has not let go of.
    slots: Mutex<Vec<Arc<OwnedSemaphorePermit>>>,
    network: Network,
    storage: Storage,
    phases: Phases,
}

/// Each user's files are made as that user, and his rights are checked by the guest's kernel, ACLs too. Linux's transport by
/// virtio takes no longer messages.
const NINEP_OPTIONS: &str = "trans=virtio,version=9p2000.L,access=client,posixacl,msize=512000";

/// Where the time of a boot went.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Phases {
    network: Duration,
    worker_spawn: Duration,
    vm_boot: Duration,
    ready: Duration,
    connect: Duration,
    configure: Duration,
}

impl std::fmt::Display for Phases {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "network={}ms worker_spawn={}ms vm_boot={}ms ready={}ms connect={}ms configure={}ms",
            self.network.as_millis(),
            self.worker_spawn.as_millis(),
            self.vm_boot.as_millis(),
            self.ready.as_millis(),
            self.connect.as_millis(),
            self.configure.as_millis()
        )
    }
}

impl Vm {
    /// Boots a VM that sees the folder `share`, connects to its agent, and gives it the network.
    ///
    /// Has to be called on the main thread, see [`vmm::spawn`]. On failure nothing is left, nor of the network. `give_up` ends it early: then
    /// nothing is left but the worker, for as long as it takes to end.
    pub(crate) async fn boot(
        config: &Config,
        sizes: VmSizes,
        share: &Path,
        mut network: Network,
        give_up: &Notify,
    ) -> Result<Self, Error> {
        let started = tokio::select! {
            started = Self::start(config, sizes, share, &mut network) => started,
            () = give_up.notified() => Err(Error::Abandoned),
        };
        match started {
            Ok((starting, agent, phases)) => {
                Ok(starting.into_vm(agent, network, sizes, config.storage().clone(), phases))
            }
            Err(err) => {
                network.remove().await;
                Err(err)
            }
        }
    }

    async fn start(
        config: &Config,
        sizes: VmSizes,
        share: &Path,
        network: &mut Network,
    ) -> Result<(Starting, Agent, Phases), Error> {
        let storage = config.storage();
        let config = config.vm();
        let kernel = open_guest_file("kernel", config.kernel())?;
        let initramfs = open_guest_file("initramfs", config.initramfs())?;

        let begin = Instant::now();
        let (console_writer, console) = console_pipe().map_err(Error::SpawnWorker)?;
        let (server, server_socket) = match storage.server() {
            Some(program) => FileServer::spawn(program, share, storage).map(Some)?,
            None => None,
        }
        .unzip();
        let (child, socket) = vmm::spawn()?;
        let (worker, events) = Worker::connect(socket).map_err(Error::SpawnWorker)?;
        let mut starting = Starting::watch(child, worker, events, console, server);
        let spawned = Instant::now();

        let vm_config = VmConfig {
            vcpus: sizes.start.vcpus,
            max_vcpus: sizes.most.vcpus,
            memory_mib: sizes.start.memory_mib,
            max_memory_mib: sizes.most.memory_mib,
            kernel_params: config.kernel_params().to_owned(),
            shares: match &server_socket {
                Some(_) => Vec::new(),
                None => vec![ShareConfig {
                    tag: SHARE_TAG.to_owned(),
                    path: share.to_owned(),
                    cache: cache_policy(storage),
                    protocol: protocol(storage),
                    watch: watch(storage),
                }],
            },
            disks: Vec::new(),
            nics: network.nics(),
            file_servers: server_socket
                .iter()
                .map(|_| FileServerConfig {
                    tag: SHARE_TAG.to_owned(),
                })
                .collect(),
            guest_cid: GUEST_CID,
            ready_port: READY_PORT,
        };
        let limit = config.boot_timeout();
        let started = async {
            let agent = async {
                let mut files = vec![kernel.as_fd(), initramfs.as_fd(), console_writer.as_fd()];
                files.extend(network.descriptors());
                files.extend(server_socket.as_ref().map(AsFd::as_fd));
                starting.boot(vm_config, &files).await?;
                // The worker has its copies.
                drop((kernel, initramfs, console_writer, server_socket));
                network.close();
                let booted = Instant::now();
                starting.ready().await?;
                let ready = Instant::now();
                let stream = starting.connect_agent().await?;
                Ok((Agent::new(stream, starting.end.clone()), booted, ready))
            };
            let agent = tokio::time::timeout(limit, agent).await;
            let (agent, booted, ready) = agent.map_err(|_| starting.too_late(limit))??;
            let connected = Instant::now();
            if let Some(request) = network.guest() {
                agent.update_network(request).await?;
            }
            let phases = Phases {
                network: network.took(),
                worker_spawn: spawned - begin,
                vm_boot: booted - spawned,
                ready: ready - booted,
                connect: connected - ready,
                configure: connected.elapsed(),
            };
            Ok((agent, phases))
        };
        match started.await {
            Ok((agent, phases)) => Ok((starting, agent, phases)),
            Err(err) => {
                starting.stop().await;
                Err(err)
            }
        }
    }

    /// A VM whose worker and agent are played by a test.
    #[cfg(test)]
    pub(crate) fn fake(worker: Worker, agent: Agent, end: End, pid: u32) -> Self {
        let start = VmSize {
            vcpus: 1,
            memory_mib: 512,
        };
        let most = VmSize {
            vcpus: 4,
            memory_mib: 4096,
        };
        Self {
            worker: OwnedWorker(worker),
            pid,
            agent,
            end,
            stopped: Arc::default(),
            sizes: VmSizes { start, most },
            size: Mutex::new(start),
            oom_score_adj: AtomicI32::new(0),
            disks: AtomicU64::new(0),
            volumes: Mutex::default(),
            slots: Mutex::default(),
            network: Network::default(),
            storage: Storage::default(),
            phases: Phases {
                network: Duration::ZERO,
                worker_spawn: Duration::ZERO,
                vm_boot: Duration::ZERO,
                ready: Duration::ZERO,
                connect: Duration::ZERO,
                configure: Duration::ZERO,
            },
        }
    }

    /// The worker's process id on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// How the pod has its files.
    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(crate) fn end(&self) -> &End {
        &self.end
    }

    pub(crate) fn phases(&self) -> Phases {
        self.phases
    }

    /// What it may be resized to.
    pub(crate) fn sizes(&self) -> &VmSizes {
        &self.sizes
    }

    /// Tells the guest how large it shall be, one of [`Vm::sizes`]; it follows when it can. Not to be called while another
    /// call is under way.
    pub(crate) async fn resize(&self, size: VmSize) -> Result<(), Error> {
        let now = || self.size.lock().unwrap_or_else(PoisonError::into_inner);
        if *now() == size {
            return Ok(());
        }
        or_end(self.worker.0.resize(size).await, &self.end).await?;
        info!(
            "the VM has {} vCPUs and {} MiB from now on",
            size.vcpus, size.memory_mib
        );
        *now() = size;
        Ok(())
    }

    /// Says how much the host's OOM killer shall spare the VM, as oom_score_adj of proc(5).
    pub(crate) fn set_oom_score_adj(&self, score: i32) -> Result<(), Error> {
        if let Some(reason) = self.end.reason() {
            return Err(Error::VmEnded(reason.to_string()));
        }
        if self.oom_score_adj.swap(score, Ordering::Relaxed) == score {
            return Ok(());
        }
        vmm::set_oom_score_adj(self.pid, score)
    }

    /// Gives the VM a disk, and returns the serial by which the guest finds it.
    pub(crate) async fn plug(&self, disk: Disk) -> Result<String, Error> {
        // Never used again: the guest may not have forgotten the last one.
        let serial = format!("disk-{}", self.disks.fetch_add(1, Ordering::Relaxed));
        let config = DiskConfig {
            serial: serial.clone(),
            read_only: disk.is_read_only(),
        };
        or_end(
            self.worker.0.add_disk(config, disk.as_fd()).await,
            &self.end,
        )
        .await?;
        Ok(serial)
    }

    /// The serial of the disk of a volume: the VM gets it when it is asked for first, and keeps it.
    pub(crate) async fn volume(&self, disk: &VolumeDisk) -> Result<String, Error> {
        let volume = self
            .volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(disk.clone())
            .or_default()
            .clone();
        let serial = volume
            .get_or_try_init(async || self.plug(disk.open().await?).await)
            .await?;
        Ok(serial.clone())
    }

    /// Takes the disks of volumes away, which nobody has any more. Those that the guest does not let go of stay.
    pub(crate) async fn unplug_volumes(&self) {
        let volumes = self
            .volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        join_all(volumes.iter().map(async |(disk, volume)| {
            let Some(serial) = volume.get() else { return };
            if self.unplug(serial).await {
                let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
                volumes.remove(disk);
            }
        }))
        .await;
    }

    /// Takes a disk away, and returns when it is closed; false if the guest does not let go of it.
    pub(crate) async fn unplug(&self, serial: &str) -> bool {
        let removed = self.worker.0.remove_disk(serial.to_owned()).await;
        match or_end(removed, &self.end).await {
            // With the VM its disks are closed.
            Ok(()) | Err(Error::VmEnded(_)) => true,
            Err(err) => {
                warn!("the guest keeps {serial}: {}", err.chain());
                false
            }
        }
    }

    /// Keeps slots taken for as long as there is the VM.
    pub(crate) fn keep_slots(&self, slots: Arc<OwnedSemaphorePermit>) {
        let mut kept = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(slots);
    }

    /// Opens a vsock connection; also returns the host's port of it.
    pub(crate) async fn connect(&self, port: u32) -> Result<(u32, UnixStream), Error> {
        let connected = self.worker.0.connect_vsock(port).await;
        or_end(connected, &self.end).await
    }

    /// Logs how often the vCPUs have left the guest so far, by kind.
    pub(crate) async fn log_exits(&self) {
        match self.worker.0.metrics().await {
            Ok(counters) => {
                let exits: Vec<_> = counters
                    .iter()
                    .filter(|(name, _)| name.starts_with("vcpu_exits"))
                    .map(|(name, count)| format!("{name}={count}"))
                    .collect();
                info!("vCPU exits: {}", exits.join(" "));
            }
            Err(err) => warn!("no counters of the VM: {}", err.chain()),
        }
    }

    /// Ends the VM and returns when its worker is gone and its network given back. May be called more than once.
    pub(crate) async fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.worker.0.close();
        self.end.wait().await;
        self.network.remove().await;
    }
}

/// A worker that is told to end when its owner is dropped, as that of a boot that is given up.
#[derive(Debug)]
struct OwnedWorker(Worker);

impl Drop for OwnedWorker {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A VM whose agent is not connected yet. Dropping it ends it.
struct Starting {
    worker: OwnedWorker,
    pid: u32,
    end: End,
    ready: watch::Receiver<bool>,
    changed: Arc<Notify>,
    stopped: Arc<AtomicBool>,
    console: LastLines,
    has_server: bool,
}

impl Starting {
    fn watch(
        mut child: Child,
        worker: Worker,
        events: mpsc::UnboundedReceiver<Event>,
        console: pipe::Receiver,
        server: Option<FileServer>,
    ) -> Self {
        let pid = child.id().expect("not yet waited for");
        let console_lines = LastLines::default();
        let stderr_lines = LastLines::default();
        let stderr = child.stderr.take().expect("stderr is piped");
        let console_task = {
            let lines = console_lines.clone();
            tokio::spawn(async move { follow(console, "guest", lines).await })
        };
        let stderr_task = {
            let lines = stderr_lines.clone();
            tokio::spawn(async move { follow(stderr, "worker", lines).await })
        };
        let (end_sender, end) = End::channel();
        let (ready_sender, ready) = watch::channel(false);
        let stopped = Arc::new(AtomicBool::new(false));
        let changed = Arc::new(Notify::new());
        let has_server = server.is_some();
        let watcher = Watcher {
            child,
            server,
            events,
            ready: ready_sender,
            changed: changed.clone(),
            end: end_sender,
            stopped: stopped.clone(),
            console: (console_task, console_lines.clone()),
            stderr: (stderr_task, stderr_lines),
        };
        tokio::spawn(watcher.run());
        Self {
            worker: OwnedWorker(worker),
            pid,
            end,
            ready,
            changed,
            stopped,
            console: console_lines,
            has_server,
        }
    }

    async fn boot(&self, config: VmConfig, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        match self.worker.0.boot(config, files).await {
            // The worker died of it. Its exit status says more than the socket's.
            Err(Error::WorkerSocket(_)) => Err(Error::VmEnded(self.end.wait().await.to_string())),
            // It may have been the server, whose words are more yet.
            Err(Error::BootRefused(_)) if self.has_server => {
                Err(Error::BootRefused(self.end.wait().await.to_string()))
            }
            result => result,
        }
    }

    fn too_late(&self, limit: Duration) -> Error {
        Error::BootTimeout {
            limit,
            console: self.console.epilogue("the guest's console"),
        }
    }

    async fn ready(&mut self) -> Result<(), Error> {
        if self.ready.wait_for(|&ready| ready).await.is_ok() {
            return Ok(());
        }
        Err(Error::VmEnded(self.end.wait().await.to_string()))
    }

    async fn connect_agent(&self) -> Result<UnixStream, Error> {
        let connected = self.worker.0.connect_vsock(AGENT_PORT).await;
        or_end(connected, &self.end).await.map(|(_, stream)| stream)
    }

    async fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.worker.0.close();
        self.end.wait().await;
    }

    fn into_vm(
        self,
        agent: Agent,
        mut network: Network,
        sizes: VmSizes,
        storage: Storage,
        phases: Phases,
    ) -> Vm {
        network.serve(&self.worker.0, &agent, &self.end);
        let raising = changes::raise(
            self.worker.0.clone(),
            agent.clone(),
            self.end.clone(),
            self.changed,
        );
        tokio::spawn(raising);
        Vm {
            agent,
            worker: self.worker,
            pid: self.pid,
            end: self.end,
            stopped: self.stopped,
            sizes,
            size: Mutex::new(sizes.start),
            oom_score_adj: AtomicI32::new(0),
            disks: AtomicU64::new(0),
            volumes: Mutex::default(),
            slots: Mutex::default(),
            network,
            storage,
            phases,
        }
    }
}

/// What the worker speaks with the guest of the folder that they share.
fn protocol(storage: &Storage) -> ShareProtocol {
    match storage.sharing() {
        Sharing::VirtioFs => ShareProtocol::Fuse {
            writeback: storage.writeback(),
            dax_window_mib: storage.dax_window_mib(),
        },
        Sharing::NineP => ShareProtocol::P9,
    }
}

/// What is watched of it: what kubelet and others may change. A container's root file system is the container's alone.
fn watch(storage: &Storage) -> Option<WatchConfig> {
    match storage.sharing() {
        Sharing::VirtioFs => Some(WatchConfig {
            prefix: VOLUME_PREFIX.to_owned(),
            gids: NoticeGids {
                changed: notice::CHANGED,
                created: notice::CREATED,
                gone_file: notice::GONE_FILE,
                gone_folder: notice::GONE_FOLDER,
                moved_file: notice::MOVED_FILE,
                moved_folder: notice::MOVED_FOLDER,
            },
        }),
        Sharing::NineP => None,
    }
}

fn cache_policy(storage: &Storage) -> CachePolicy {
    match storage.cache() {
        Cache::Auto => CachePolicy::Auto,
        Cache::None => CachePolicy::None,
        Cache::Always => CachePolicy::Always,
    }
}

/// How the guest mounts the folder that it shares with the host.
pub(crate) fn folder(storage: &Storage) -> Folder {
    let (fstype, options) = match storage.sharing() {
        Sharing::VirtioFs => ("virtiofs", String::new()),
        Sharing::NineP => {
            let cache = match storage.cache() {
                // With the least that lets files be mapped to be written.
                Cache::Auto => "mmap",
                Cache::None => "none",
                Cache::Always => "loose",
            };
            let options = format!("{NINEP_OPTIONS},cache={cache}");
            ("9p", options)
        }
    };
    Folder {
        fstype: fstype.to_owned(),
        options,
        ..Folder::default()
    }
}

/// Where a call to the worker failed because the VM has ended, that is the error.
async fn or_end<T>(result: Result<T, Error>, end: &End) -> Result<T, Error> {
    match (result, end.reason()) {
        (Err(_), Some(reason)) => Err(Error::VmEnded(reason.to_string())),
        // The worker is ending, and how is about to be known.
        (Err(Error::WorkerSocket(_)), None) => Err(Error::VmEnded(end.wait().await.to_string())),
        (result, _) => result,
    }
}

/// Watches a worker to its end.
struct Watcher {
    child: Child,
    server: Option<FileServer>,
    events: mpsc::UnboundedReceiver<Event>,
    ready: watch::Sender<bool>,
    /// Told when others have changed files of the guest.
    changed: Arc<Notify>,
    end: watch::Sender<Option<Arc<str>>>,
    stopped: Arc<AtomicBool>,
    console: (JoinHandle<()>, LastLines),
    stderr: (JoinHandle<()>, LastLines),
}

impl Watcher {
    async fn run(mut self) {
        let mut exit = None;
        let mut server_ended = false;
        while !server_ended {
            tokio::select! {
                // What the worker said before its end closed the server's socket is read first.
                biased;
                event = self.events.recv() => match event {
                    Some(Event::Ready) => drop(self.ready.send_replace(true)),
                    Some(Event::FilesChanged) => self.changed.notify_one(),
                    Some(Event::Exited(reason)) => exit = Some(reason),
                    None => break,
                },
                () = end_of(&mut self.server) => server_ended = true,
            }
        }
        // The control socket has closed, so the worker is ending, or its file server has ended; it gets no chance not to.
        if let Err(err) = self.child.start_kill() {
            warn!("cannot kill the worker: {err}");
        }
        let status = self.child.wait().await;
        let server = match self.server {
            Some(server) => Some(server.finish().await),
            None => None,
        };
        // What the guest or the worker said last is still in the pipes.
        let last_words = async { tokio::join!(self.console.0, self.stderr.0) };
        if tokio::time::timeout(CONSOLE_END_LIMIT, last_words)
            .await
            .is_err()
        {
            warn!("the console outlives its worker");
        }
        let reason = if self.stopped.load(Ordering::Relaxed) {
            "it was shut down".to_owned()
        } else {
            let of_server = server_ended || matches!(exit, Some(ExitReason::FileServer { .. }));
            let reason = match (exit, server) {
                (None, Some(server)) if of_server => server,
                (Some(reason), Some(server)) if of_server => format!("{reason}; {server}"),
                (Some(reason), _) => reason.to_string(),
                // It may have been what killed the worker.
                (None, Some(server)) => format!("{}; {server}", worker_death(status)),
                (None, None) => worker_death(status),
            };
            format!(
                "{reason}{}{}",
                self.console.1.epilogue("the guest's console"),
                self.stderr.1.epilogue("the worker's standard error")
            )
        };
        info!("the VM has ended: {reason}");
        // `ready` is dropped after `end` has its value, so that who waits for either finds a reason.
        self.end.send_replace(Some(reason.into()));
    }
}

/// Waits for the end of a server, if there is one. How it ended is told when it is finished.
async fn end_of(server: &mut Option<FileServer>) {
    match server {
        Some(server) => drop(server.ended().await),
        None => std::future::pending().await,
    }
}

fn worker_death(status: std::io::Result<ExitStatus>) -> String {
    match status {
        // "exit status: 1", "signal: 9 (SIGKILL)"
        Ok(status) => format!("its worker process ended ({status})"),
        Err(err) => format!("its worker process cannot be waited for: {err}"),
    }
}

fn open_guest_file(what: &'static str, path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::GuestFile {
        what,
        path: path.to_owned(),
        source,
    })
}

/// The writer's end is non-blocking: a worker must never wait for the log.
fn console_pipe() -> std::io::Result<(pipe::Sender, pipe::Receiver)> {
    pipe::pipe()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn missing_kernel_names_the_file() {
        let config =
            husk_config::Config::from_toml("[vm]\nkernel = \"/absent/vmlinux\"", "test").unwrap();
        let start = VmSize {
            vcpus: 1,
            memory_mib: 512,
        };
        let sizes = VmSizes { start, most: start };
        let (network, give_up) = (Network::default(), Notify::new());
        let err = Vm::boot(&config, sizes, Path::new("/"), network, &give_up)
            .await
            .unwrap_err();
        assert_eq!(
            err.chain(),
            "cannot open the guest's kernel /absent/vmlinux, the one of vm.kernel in husk.toml: no such file or directory"
        );
    }

    #[tokio::test]
    async fn end_is_seen_by_all_who_wait_and_by_those_who_come_late() {
        let (sender, end) = End::channel();
        assert!(end.reason().is_none());
        let early = tokio::spawn({
            let end = end.clone();
            async move { end.wait().await }
        });
        tokio::task::yield_now().await;
        sender.send_replace(Some(Arc::from("panic")));
        assert_eq!(&*early.await.unwrap(), "panic");
        assert_eq!(&*end.wait().await, "panic");
        drop(sender);
        assert_eq!(&*end.wait().await, "panic");
    }
}
