//! The role of the agent's program in which it builds one container or process with libcontainer, or changes a
//! container's limits, and ends. It has one thread, as libcontainer's forks require, and no runtime.
//!
//! Standard streams are the container's, so the log goes to the guest's console by a descriptor of its own.

mod program;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt};
use libcontainer::capabilities::CapabilityExt;
use libcontainer::container::ContainerStatus;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, LinuxResources, Process, User,
};
use rustix::io::FdFlags;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::cgroup::Cgroup;
use crate::launch::{Order, Report, Work};
use program::Program;

/// Follows the order in `argument`; tells the agent how it went.
pub(crate) fn main(argument: &str) -> ExitCode {
    let order: Order = match serde_json::from_str(argument) {
        Ok(order) => order,
        Err(error) => {
            eprintln!("husk-agent: the order cannot be understood: {error}");
            return ExitCode::FAILURE;
        }
    };
    let reporter = Reporter::new(inherit(order.reports));
    let gate = order.gate.map(inherit);
    if let Ok(console) = OpenOptions::new().write(true).open(crate::logging::CONSOLE) {
        crate::logging::start(&order.log_level, console, Troubles(reporter.clone()));
    }
    match follow(order, &reporter, gate) {
        Ok(pid) => {
            reporter.tell(&Report::Done { pid });
            ExitCode::SUCCESS
        }
        Err(error) => {
            reporter.tell(&Report::Failed {
                message: crate::error::chain(error.as_ref()),
            });
            ExitCode::FAILURE
        }
    }
}

/// Takes a descriptor that the agent has left open for this process, and for no program after it.
fn inherit(descriptor: i32) -> OwnedFd {
    // SAFETY: the agent names in the order only descriptors that it has made for this process; nothing else here
    // knows their numbers.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
    if let Err(error) = rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC) {
        eprintln!("husk-agent: a descriptor of the order is not open: {error}");
    }
    descriptor
}

/// Tells the agent what happens; the process of the container holds it too, until it executes its program.
#[derive(Clone, Debug)]
struct Reporter {
    pipe: Arc<Mutex<File>>,
}

impl Reporter {
    fn new(pipe: OwnedFd) -> Self {
        Self {
            pipe: Arc::new(Mutex::new(pipe.into())),
        }
    }

    fn tell(&self, report: &Report) {
        let mut line = serde_json::to_vec(report).unwrap_or_default();
        line.push(b'\n');
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        // One write: two processes share the pipe. An agent that has stopped listening needs no report.
        let _unheard = pipe.write_all(&line);
    }
}

/// Hands libcontainer's errors to the agent. What it returns in the end says that a step failed; why, it only logs.
struct Troubles(Reporter);

impl<S: Subscriber> Layer<S> for Troubles {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        if *event.metadata().level() == Level::ERROR {
            let mut words = Words::default();
            event.record(&mut words);
            self.0.tell(&Report::Trouble {
                message: words.into_sentence(),
            });
        }
    }
}

/// An event's message, and its fields as `name: value`.
#[derive(Default)]
struct Words {
    message: String,
    fields: Vec<String>,
}

impl Words {
    fn into_sentence(self) -> String {
        match self.fields.as_slice() {
            [] => self.message,
            fields => format!("{} ({})", self.message, fields.join(", ")),
        }
    }
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self.fields.push(format!("{name}: {value:?}")),
        }
    }
}

fn follow(order: Order, reporter: &Reporter, gate: Option<OwnedFd>) -> anyhow::Result<Option<i32>> {
    let confinement = match &order.work {
        Work::Exec { confinement, .. } => confinement.as_deref().cloned(),
        Work::Create { .. } | Work::Update { .. } => None,
    };
    let late_capabilities = confinement
        .as_ref()
        .is_some_and(|confinement| confinement.late_capabilities.is_some());
    let changes_identity = confinement
        .as_ref()
        .is_some_and(|confinement| confinement.identity.is_some());
    let program = match &order.work {
        Work::Create { sandbox: true, .. } => Program::pause(reporter.clone())?,
        Work::Create { .. } | Work::Exec { .. } | Work::Update { .. } => {
            Program::new(reporter.clone(), gate, confinement)
                .context("finding the container's user namespace")?
        }
    };
    let builder = ContainerBuilder::new(order.container_id.clone(), SyscallType::default())
        .with_executor(program)
        .with_root_path(&order.state_root)?
        .with_console_socket(order.console);
    match order.work {
        Work::Create { bundle, .. } => {
            let mut container = builder.as_init(bundle).with_systemd(false).build()?;
            // What libcontainer asks of one that is to take further processes. Whether it is started is for the agent
            // to know.
            container.set_status(ContainerStatus::Running).save()?;
            Ok(container.pid().map(i32::from))
        }
        Work::Exec {
            process,
            sub_cgroup,
            ..
        } => {
            if late_capabilities || changes_identity {
                keep_rights(&process, changes_identity)?;
            }
            let pid = builder
                .as_tenant()
                .with_process(Some(process))
                .with_sub_cgroup(sub_cgroup)
                .with_detach(true)
                .build()?;
            Ok(Some(pid.into()))
        }
        Work::Update { resources } => {
            update(&order.container_id, &resources)?;
            Ok(None)
        }
    }
}

/// Gives the process every capability for the time until it confines itself: installing a filter without the
/// `no_new_privs` bit takes `CAP_SYS_ADMIN`, as entering a user namespace does, and giving the others up takes
/// `CAP_SETPCAP`. Whoever is to change its identity is root until then.
fn keep_rights(process: &Path, changes_identity: bool) -> anyhow::Result<()> {
    let text = fs::read(process).context("reading the process")?;
    let mut spec: Process = serde_json::from_slice(&text).context("reading the process")?;
    spec.set_capabilities(Some(all_capabilities()));
    if changes_identity {
        let mut root = User::default();
        root.set_uid(0).set_gid(0).set_umask(spec.user().umask());
        spec.set_user(root);
    }
    let text = serde_json::to_vec(&spec).context("writing the process")?;
    fs::write(process, text).context("writing the process")
}

fn all_capabilities() -> LinuxCapabilities {
    let all: Capabilities = caps::runtime::thread_all_supported()
        .into_iter()
        .map(Capability::from_cap)
        .collect();
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(all.clone()))
        .set_effective(Some(all.clone()))
        .set_permitted(Some(all))
        .set_inheritable(None)
        .set_ambient(None);
    capabilities
}

/// Writes new limits to the container's cgroup.
fn update(container_id: &str, resources: &Path) -> anyhow::Result<()> {
    let text = fs::read(resources).context("reading the resources")?;
    let resources: LinuxResources =
        serde_json::from_slice(&text).context("reading the resources")?;
    let cgroup = libcgroups::common::create_cgroup_manager(CgroupConfig {
        cgroup_path: Cgroup::name(container_id).into(),
        systemd_cgroup: false,
        container_name: container_id.to_owned(),
    })?;
    cgroup.apply(&ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_with_its_fields() {
        let words = Words {
            message: "failed to chdir".to_owned(),
            fields: vec!["err: ENOENT".to_owned()],
        };
        assert_eq!(words.into_sentence(), "failed to chdir (err: ENOENT)");
    }
}
