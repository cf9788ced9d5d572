//! husk-agent, the init of the guest: process 1 of the initramfs, which mounts what a guest needs, reaps, and runs
//! containers for the shim on the host. See `proto/agent.proto` for the service.
//!
//! The program has four roles. Process 1 is the agent. It starts itself again as a *creator* for each container or process
//! that libcontainer is to build, since libcontainer forks and the agent must not. libcontainer runs it as a *finisher* in
//! the namespaces of a container that asks for what libcontainer cannot do. And the first process of a pod's sandbox is
//! this program too: the *pause* that holds the pod's namespaces.

mod cgroup;
mod changes;
mod container;
mod creator;
mod devices;
mod disks;
mod error;
mod finish;
mod forward;
mod fs_group;
mod hotplug;
mod init;
mod launch;
mod logging;
mod network;
mod pause;
mod pod;
mod process;
mod reaper;
mod service;
mod signals;
mod spec;
mod stats;
mod storage;
mod streams;
mod terminal;

use std::fs::{self, OpenOptions};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use husk_protocol::{AGENT_PORT, FORWARD_PORT, STREAM_PORT};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use container::Containers;
use disks::Disks;
use reaper::Reaper;
use streams::Streams;

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    if arguments.next().as_deref().map(str::as_bytes) == Some(pause::NAME.to_bytes()) {
        return pause::main();
    }
    let role = arguments.next();
    let order = arguments.next().unwrap_or_default();
    match role.as_deref() {
        Some(launch::CREATOR) => return creator::main(&order),
        Some(finish::FINISHER) => return finish::main(&order),
        _ => {}
    }
    if std::process::id() != 1 {
        eprintln!(
            "husk-agent is the init of a Husk guest: it runs as process 1 of a virtual machine"
        );
        return ExitCode::FAILURE;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The kernel panics when process 1 ends, and the host reports its last lines.
            eprintln!("husk-agent: {}", error::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let started = Instant::now();
    init::prepare()?;
    let cmdline =
        fs::read_to_string("/proc/cmdline").context("reading the kernel's command line")?;
    let level = logging::level_of(&cmdline);
    let console = OpenOptions::new()
        .write(true)
        .open(logging::CONSOLE)
        .context("opening the console")?;
    logging::start(level, console, logging::nobody());
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(serve(level, started))
}

/// Serves until the virtual machine ends. `started` is when this process did.
async fn serve(level: &str, started: Instant) -> Result<()> {
    let signals = Reaper::signals().context("catching SIGCHLD")?;
    let reaper = Arc::new(Reaper::default());
    let streams = Arc::new(Streams::default());
    let disks = Arc::new(Disks::default());
    let containers = Containers::new(
        Arc::clone(&reaper),
        Arc::clone(&streams),
        Arc::clone(&disks),
        level.to_owned(),
    );

    let _server = service::serve(Arc::new(containers), listen(AGENT_PORT)?)
        .await
        .context("starting the service")?;
    tokio::spawn(streams.serve(listen(STREAM_PORT)?));
    tokio::spawn(forward::serve(listen(FORWARD_PORT)?));
    let reaping = tokio::spawn(reaper.run(signals));
    let events = hotplug::Events::listen().context("listening to the kernel's events")?;
    tokio::spawn(events.serve(disks));
    // From its first packet on, the host may ask for anything, whenever it finishes the handshake.
    streams::announce()
        .await
        .context("telling the host that the agent is ready")?;
    let took_ms = started.elapsed().as_millis();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        took_ms,
        "husk-agent is ready"
    );
    reaping.await.context("reaping")
}

fn listen(port: u32) -> Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("listening on vsock port {port}"))
}
