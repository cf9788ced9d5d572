//! How containerd calls the program: the actions `start` and `delete`, the flags `-info` and `-v`, and the server that
//! `start` leaves behind.
//!
//! ```text
//! containerd ─► shim … start     binds the socket, spawns the server, waits for its word, prints the address, ends
//!                   └─► shim     (no action) the server: descriptor 3 is the socket, standard output its word to `start`
//! containerd ─► shim … delete    after the server has gone: frees what could be left, prints how the task ended
//! ```

use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};
use std::{fs, io};

use command_fds::{CommandFdExt, FdMapping};
use containerd_shim::api::{DeleteResponse, Options};
use containerd_shim::bootstrap::any_is;
use containerd_shim::logger::FifoLogger;
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::ttrpc::r#async::Server;
use containerd_shim::protos::ttrpc::r#async::transport::Listener;
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use containerd_shim::{Flags, StartOpts};
use log::{LevelFilter, error, info, warn};
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::cgroup;
use crate::events::Events;
use crate::network;
use crate::pod::{CONTAINER_TYPE, SANDBOX_ID};
use crate::process::KILLED;
use crate::sandbox::Sandbox;
use crate::service::TaskService;
use crate::service::sandbox::SandboxService;
use crate::storage::Share;
use crate::task::create::{NETWORK_FILE, WORKER_PID_FILE};

/// The name by which containerd selects this runtime.
const RUNTIME_NAME: &str = "io.containerd.husk.v2";

/// Where the shim mounts its tree, in its own mount namespace.
const RUN_FOLDER: &str = "/run/husk";

/// Annotations whose value names the group of a container; one shim serves a group. In the order of runc's shim.
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", SANDBOX_ID];

/// The file of a bundle in which containerd 1 looks for the shim's address after a restart.
const ADDRESS_FILE: &str = "address";

/// The fifo of a bundle that containerd reads the shim's log from.
const LOG_FIFO: &str = "log";

/// Where containerd's ttrpc server for events is.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// In the server's environment: when `start` began, in milliseconds since the epoch.
const STARTED: &str = "HUSK_SHIM_STARTED_MS";

/// The name that containerd knows the features of an OCI runtime by; JSON, as all of OCI's.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What a mount may be given beside what its file system knows. `rro` is what containerd looks for.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "rbind",
    "relatime",
    "ridmap",
    "ro",
    "rprivate",
    "rro",
    "rshared",
    "rslave",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "unbindable",
];

/// The descriptor on which the server finds its socket.
const SERVER_SOCKET: i32 = 3;

/// The server's word to `start` that it serves; anything else is an error message.
const READY: &[u8] = b"ready\n";

/// Longest options on standard input, in bytes, as in containerd.
const MAX_OPTIONS: u64 = 10 << 20;

/// How long containerd may take for the last events.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// How long requests may take to be answered when the shim ends.
const SERVER_LIMIT: Duration = Duration::from_secs(1);

/// An error of an action: printed once, by `main`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot understand the arguments")]
    Arguments(#[source] containerd_shim::Error),
    #[error("{0} is no action of a shim")]
    Action(String),
    #[error("cannot read the OCI configuration of the bundle")]
    ReadSpec(#[source] serde_json::Error),
    #[error("cannot {operation} {path}")]
    File {
        operation: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot understand the runtime options")]
    Options(#[source] containerd_shim::protos::protobuf::Error),
    #[error("the shim of sandbox {sandbox} does not run")]
    NoSandbox {
        sandbox: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot spawn the shim's server")]
    Spawn(#[source] io::Error),
    #[error("cannot put the shim into its cgroup, or set its OOM score")]
    Confine(#[source] containerd_shim::Error),
    #[error("the shim's server does not come up: {0}")]
    Server(String),
    #[error("cannot write the answer")]
    Answer(#[source] io::Error),
    #[error("the environment has no {TTRPC_ADDRESS}")]
    NoEventsAddress,
    #[error("cannot set up the mount namespace at {RUN_FOLDER}")]
    Mounts(#[source] io::Error),
    #[error("cannot set up the asynchronous runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot serve the task service")]
    Serve(#[source] containerd_shim::protos::ttrpc::Error),
}

/// Does what the command line says. Has to be called on the main thread while it is the only one.
pub(crate) fn main(arguments: &[std::ffi::OsString]) -> Result<(), StartError> {
    let flags = containerd_shim::parse(arguments).map_err(StartError::Arguments)?;
    if flags.version {
        return print(version().as_bytes());
    }
    if flags.info {
        return print(&encoded(&runtime_info()));
    }
    match flags.action.as_str() {
        "start" => print(start(&flags)?.as_bytes()),
        "delete" => print(&encoded(&delete(&flags)?)),
        "" => serve(&flags),
        other => Err(StartError::Action(other.to_owned())),
    }
}

fn version() -> String {
    format!(
        "{}:\n  Version:  {}\n  Revision: {}\n",
        env!("CARGO_BIN_NAME"),
        env!("CARGO_PKG_VERSION"),
        revision()
    )
}

fn revision() -> &'static str {
    option_env!("HUSK_REVISION").unwrap_or("unknown")
}

fn runtime_info() -> RuntimeInfo {
    RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: revision().to_owned(),
            ..Default::default()
        })
        .into(),
        features: Some(features()).into(),
        ..Default::default()
    }
}

/// What of an OCI configuration is understood (features.md of the runtime specification): clients refuse to ask for what
/// is not.
fn features() -> Any {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    });
    Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: features.to_string().into_bytes(),
        ..Any::default()
    }
}

fn encoded(message: &impl Message) -> Vec<u8> {
    message
        .write_to_bytes()
        .expect("a message in memory can be encoded")
}

fn print(bytes: &[u8]) -> Result<(), StartError> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(StartError::Answer)
}

/// The action `start`, in the bundle's folder: makes sure that a server for the container's group runs, and returns its
/// address.
fn start(flags: &Flags) -> Result<String, StartError> {
    let begin = epoch_ms();
    let options = read_options()?;
    let spec: Value = match fs::read("config.json") {
        Ok(spec) => serde_json::from_slice(&spec).map_err(StartError::ReadSpec)?,
        // The sandbox service starts a shim before there is a container.
        Err(err) if err.kind() == ErrorKind::NotFound => Value::Null,
        Err(err) => return Err(file_error("read", "config.json")(err)),
    };
    let group = group(&spec).unwrap_or(&flags.id);
    let address = address(flags, group);
    if is_member(&spec) {
        // Its machine is gone with the sandbox's shim. Another shim could not create it, and by answering in place of the
        // first would keep `delete` of the sandbox from freeing what that has left.
        UnixStream::connect(socket_path(&address)).map_err(|source| StartError::NoSandbox {
            sandbox: group.to_owned(),
            source,
        })?;
    } else if let Some(socket) = bind(&address)?
        && let Err(err) = spawn_server(flags, socket, &options, begin)
    {
        remove_file(socket_path(&address));
        return Err(err);
    }
    fs::write(ADDRESS_FILE, &address).map_err(file_error("write", ADDRESS_FILE))?;
    Ok(address)
}

/// The group of the container with this OCI configuration.
fn group(spec: &Value) -> Option<&str> {
    GROUP_ANNOTATIONS
        .iter()
        .find_map(|name| annotation(spec, name))
}

/// Whether this is the OCI configuration of a container that joins a sandbox.
fn is_member(spec: &Value) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some("container")
}

fn annotation<'a>(spec: &'a Value, name: &str) -> Option<&'a str> {
    spec.get("annotations")?.get(name)?.as_str()
}

fn address(flags: &Flags, group: &str) -> String {
    let opts = StartOpts {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        address: flags.address.clone(),
        ..StartOpts::default()
    };
    opts.socket_address(group)
}

fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// Binds the socket of a group; `None` if a server already answers there.
fn bind(address: &str) -> Result<Option<UnixListener>, StartError> {
    let path = socket_path(address);
    let error = |operation| file_error(operation, address);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(error("create the folder of"))?;
    }
    match UnixListener::bind(path) {
        Ok(listener) => Ok(Some(listener)),
        Err(err) if err.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Of a server that was killed.
            fs::remove_file(path).map_err(error("remove the stale"))?;
            UnixListener::bind(path).map(Some).map_err(error("bind"))
        }
        Err(err) => Err(error("bind")(err)),
    }
}

/// Spawns the server and returns when it serves.
fn spawn_server(
    flags: &Flags,
    socket: UnixListener,
    options: &Options,
    begin: u128,
) -> Result<(), StartError> {
    let (mut word, child_word) = io::pipe().map_err(StartError::Spawn)?;
    let mut child = {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(std::env::args_os().next().unwrap_or_default())
            .args(["-namespace", &flags.namespace])
            .args(["-id", &flags.id])
            .args(["-address", &flags.address])
            .args(flags.debug.then_some("-debug"))
            .env(STARTED, begin.to_string())
            .envs((!options.shim_cgroup.is_empty()).then_some((cgroup::CHOSEN, "1")))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(child_word.try_clone().map_err(StartError::Spawn)?)
            .stderr(child_word)
            .fd_mappings(vec![FdMapping {
                parent_fd: socket.into(),
                child_fd: SERVER_SOCKET,
            }])
            .expect("one descriptor cannot collide");
        command.spawn().map_err(StartError::Spawn)?
    };
    let confined =
        containerd_shim::cgroup::set_cgroup_and_oom_score(child.id(), &options.shim_cgroup)
            .map_err(StartError::Confine);
    let served = confined.and_then(|()| {
        let mut said = Vec::new();
        word.read_to_end(&mut said).map_err(StartError::Spawn)?;
        match said.as_slice() {
            READY => Ok(()),
            other => Err(StartError::Server(
                String::from_utf8_lossy(other).trim().to_owned(),
            )),
        }
    });
    if served.is_err() {
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
    served
}

/// The options that containerd since 1.7 passes on standard input; those of runc carry the shim's cgroup.
fn read_options() -> Result<Options, StartError> {
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(MAX_OPTIONS)
            .read_to_end(&mut bytes)
            .map_err(file_error("read", "standard input"))?;
    }
    let any = Any::parse_from_bytes(&bytes).map_err(StartError::Options)?;
    if any_is::<Options>(&any) {
        return Options::parse_from_bytes(&any.value).map_err(StartError::Options);
    }
    Ok(Options::default())
}

/// The action `delete`: containerd calls it when the server is gone, be it in good order or by `kill -9`, and as often
/// as it likes. The worker of a killed server has died with it, and its mounts went with its mount namespace; looked
/// after here is what could be left if that failed, and the socket's file.
fn delete(flags: &Flags) -> Result<DeleteResponse, StartError> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().map_err(file_error("find", "the bundle"))?
    } else {
        PathBuf::from(&flags.bundle)
    };
    let pid = fs::read_to_string(bundle.join(WORKER_PID_FILE))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).unwrap_or_default();
    // In a group the server lives on with the other containers, and so does the worker.
    let served = !address.is_empty() && UnixStream::connect(socket_path(&address)).is_ok();
    if !served {
        if let Some(pid) = pid.filter(|&pid| is_worker(pid)) {
            // It may end between the check and the signal; a pid is not reused so fast.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if !address.is_empty() {
            remove_file(socket_path(&address));
        }
        if let Some(path) = cgroups_path(&bundle) {
            cgroup::remove_left(&path);
        }
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?
            .block_on(network::remove_recorded(&bundle.join(NETWORK_FILE)));
    }
    // Nothing of ours is mounted in the host's namespace. If somebody else did, the bundle must still be removable.
    let _ = umount2(
        &bundle.join(crate::spec::ROOTFS),
        MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
    );
    Ok(DeleteResponse {
        pid: pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0),
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()).into(),
        ..Default::default()
    })
}

/// The cgroup of a bundle's specification. One that cannot be read has none.
fn cgroups_path(bundle: &Path) -> Option<PathBuf> {
    let spec = fs::read(bundle.join("config.json")).ok()?;
    let spec: Value = serde_json::from_slice(&spec).ok()?;
    spec.pointer("/linux/cgroupsPath")?
        .as_str()
        .map(PathBuf::from)
}

/// Whether process `pid` is a worker of this program.
fn is_worker(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|cmdline| {
        let mut arguments = cmdline.split(|&byte| byte == 0);
        arguments.next() == Some(env!("CARGO_BIN_NAME").as_bytes())
            && arguments.next() == Some(husk_vmm::worker::ROLE.as_bytes())
    })
}

fn remove_file(path: &Path) {
    match fs::remove_file(path) {
        Err(err) if err.kind() != ErrorKind::NotFound => {
            warn!("cannot remove {}: {err}", path.display());
        }
        _ => {}
    }
}

fn file_error(operation: &'static str, path: &str) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::File {
        operation,
        path,
        source,
    }
}

/// The server: serves the task and the sandbox service until containerd shuts it down.
fn serve(flags: &Flags) -> Result<(), StartError> {
    // SAFETY: `start` passes the socket as this descriptor, and nothing in this process has taken it before: this runs
    // first, on the only thread.
    let socket = unsafe { OwnedFd::from_raw_fd(SERVER_SOCKET) };
    let events_address = std::env::var(TTRPC_ADDRESS).map_err(|_| StartError::NoEventsAddress)?;
    init_logger(flags.debug);
    let folder = Path::new(RUN_FOLDER);
    fs::create_dir_all(folder).map_err(StartError::Mounts)?;
    let share = Share::set_up(folder).map_err(StartError::Mounts)?;

    // One thread: the shim waits and copies. It also has to be the main one that spawns the worker, see `vmm::spawn`.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    let socket = UnixListener::from(socket);
    // Not from the bundle's file, which containerd may remove before the shim has ended.
    let path = socket.local_addr().map_err(StartError::Runtime)?;
    let served = runtime.block_on(async {
        let events = Events::new(&events_address, &flags.namespace);
        let sandbox = Sandbox::new(&flags.namespace, share, events);
        serve_until_shutdown(socket, sandbox).await
    });
    // A file that is being opened or unmounted must not keep the process.
    runtime.shutdown_background();
    if let Some(path) = path.as_pathname() {
        remove_file(path);
    }
    served
}

async fn serve_until_shutdown(
    socket: UnixListener,
    sandbox: std::sync::Arc<Sandbox>,
) -> Result<(), StartError> {
    socket.set_nonblocking(true).map_err(StartError::Runtime)?;
    let listener = Listener::try_from(socket).map_err(StartError::Runtime)?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(TaskService::new(sandbox.clone()).services())
        .register_service(SandboxService::new(sandbox.clone()).services());
    server.start().await.map_err(StartError::Serve)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Runtime)?;
    report_ready()?;
    info!(
        "husk {} serves: start={}ms",
        env!("CARGO_PKG_VERSION"),
        start_took()
    );

    tokio::select! {
        () = sandbox.wait_shut_down() => {}
        _ = terminate.recv() => info!("terminated by a signal"),
    }
    if let Some(vm) = sandbox.running_vm() {
        vm.stop().await;
    }
    if let Some(group) = sandbox.cgroup().cloned() {
        // Failing to join means that it panicked, which is in the log.
        let _ = tokio::task::spawn_blocking(move || group.leave()).await;
    }
    sandbox.events().flush(FLUSH_LIMIT).await;
    // It waits for every request, and one of `Wait` may be for an exec that was never started.
    match tokio::time::timeout(SERVER_LIMIT, server.shutdown()).await {
        Ok(Ok(())) => {}
        Ok(Err(err)) => warn!("the server does not end in order: {err}"),
        Err(_) => info!("requests are left without an answer"),
    }
    Ok(())
}

fn epoch_ms() -> u128 {
    SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_millis())
}

/// Milliseconds from the beginning of `start`; 0 if nobody says when that was.
fn start_took() -> u128 {
    std::env::var(STARTED)
        .ok()
        .and_then(|begin| begin.parse().ok())
        .map_or(0, |begin: u128| epoch_ms().saturating_sub(begin))
}

/// Tells `start` that the socket is served, and lets go of its pipe.
fn report_ready() -> Result<(), StartError> {
    print(READY)?;
    let null = fs::File::options()
        .write(true)
        .open("/dev/null")
        .map_err(StartError::Answer)?;
    nix::unistd::dup2_stdout(&null)
        .and_then(|()| nix::unistd::dup2_stderr(&null))
        .map_err(|errno| StartError::Answer(errno.into()))
}

/// Logs to containerd's fifo. It is opened so that neither the open nor a write can wait: a log that nobody reads loses
/// lines, and does not stop the shim.
fn init_logger(debug: bool) {
    log::set_max_level(if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    });
    let fifo = {
        use std::os::unix::fs::OpenOptionsExt;
        fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(LOG_FIFO)
    };
    // Without a fifo (a shim started by hand) there is no log.
    if let Ok(fifo) = fifo {
        // The first and only logger.
        let _ = log::set_boxed_logger(Box::new(FifoLogger::with_file(fifo)));
    }
    std::panic::set_hook(Box::new(|panic| error!("{panic}")));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(annotations: &Value) -> Value {
        json!({"ociVersion": "1.1.0", "annotations": annotations})
    }

    #[test]
    fn group_is_the_sandbox_and_runcs_label_comes_first() {
        assert_eq!(group(&spec(&json!({}))), None);
        let pod = spec(&json!({"io.kubernetes.cri.sandbox-id": "pod"}));
        assert_eq!(group(&pod), Some("pod"));
        let both = spec(&json!({
            "io.kubernetes.cri.sandbox-id": "pod", "io.containerd.runc.v2.group": "g"
        }));
        assert_eq!(group(&both), Some("g"));
    }

    #[test]
    fn only_containers_of_a_pod_need_a_server_that_is_there() {
        let is_member =
            |kind: &str| is_member(&spec(&json!({"io.kubernetes.cri.container-type": kind})));
        assert!(is_member("container"));
        assert!(!is_member("sandbox"));
        assert!(!super::is_member(&spec(&json!({}))));
        assert!(!super::is_member(&Value::Null));
    }

    #[test]
    fn live_server_is_found_and_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/s/socket", dir.path().display());
        let first = bind(&address).unwrap().unwrap();
        assert!(bind(&address).unwrap().is_none());
        drop(first);
        assert!(bind(&address).unwrap().is_some());
    }

    #[test]
    fn delete_works_from_the_bundle_alone_and_twice() {
        let bundle = tempfile::tempdir().unwrap();
        let socket = bundle.path().join("socket");
        drop(UnixListener::bind(&socket).unwrap());
        fs::write(
            bundle.path().join(ADDRESS_FILE),
            format!("unix://{}", socket.display()),
        )
        .unwrap();
        // Ours, and no worker: must survive.
        fs::write(
            bundle.path().join(WORKER_PID_FILE),
            std::process::id().to_string(),
        )
        .unwrap();
        let flags = Flags {
            bundle: bundle.path().display().to_string(),
            ..Flags::default()
        };
        for _ in 0..2 {
            let deleted = delete(&flags).unwrap();
            assert_eq!(deleted.pid, std::process::id());
            assert_eq!(deleted.exit_status, 137);
            assert!(deleted.exited_at.seconds > 0);
            assert!(!socket.exists());
        }
    }

    #[test]
    fn delete_without_a_bundle_is_no_error() {
        let flags = Flags {
            bundle: "/absent/bundle".to_owned(),
            ..Flags::default()
        };
        let deleted = delete(&flags).unwrap();
        assert_eq!((deleted.pid, deleted.exit_status), (0, 137));
    }

    #[test]
    fn version_names_the_program() {
        assert!(version().starts_with("containerd-shim-husk-v2:\n  Version:  "));
    }
}
