//! What can go wrong in the shim, and what containerd is told about it.
//!
//! Codes are those that runc's shim answers in the same situation, because containerd and its clients were written
//! against them. A wrong state, a mount or a runtime that fails are `Unknown` there, and therefore here.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use containerd_shim::protos::ttrpc::{self, Code, error::get_rpc_status};
use husk_config::ConfigError;
use nix::errno::Errno;

use crate::network::NetworkError;

/// An error of the task service.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container {id} does not exist")]
    ContainerNotFound { id: String },
    #[error("process {exec_id} does not exist in container {id}")]
    ProcessNotFound { id: String, exec_id: String },
    #[error("process already finished")]
    ProcessFinished,
    #[error("container {id}")]
    ContainerExists { id: String },
    #[error("id {exec_id}")]
    ProcessExists { exec_id: String },
    #[error("container {id} init process is not running")]
    InitNotRunning { id: String },
    #[error(
        "the cgroup of the pod allows {allowed_mib} MiB of memory, and a VM needs {needed_mib} MiB at least: raise the \
         limits of its containers, or the overhead of its RuntimeClass"
    )]
    TooLittleMemory { allowed_mib: u64, needed_mib: u64 },
    #[error("sandbox {id} does not run")]
    NoSandbox { id: String },
    #[error("process not created")]
    ProcessNotStarted,
    #[error("cannot {verb} a {state} {subject}")]
    WrongState {
        verb: &'static str,
        state: &'static str,
        subject: &'static str,
    },
    #[error("cannot exec in a {state} state")]
    ExecInState { state: &'static str },
    #[error("{0} is not an id: it must not be empty, nor contain a slash, nor begin with a dot")]
    InvalidId(String),
    #[error("cannot understand the {what} of the request")]
    InvalidRequest {
        what: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{0} is no type of runtime options that this runtime knows")]
    UnknownOptions(String),
    #[error("the configuration is not usable")]
    Config(#[source] ConfigError),
    #[error("cannot read the OCI configuration {}", path.display())]
    ReadSpec {
        path: PathBuf,
        #[source]
        source: oci_spec::OciSpecError,
    },
    #[error("the OCI configuration {0}")]
    UnsupportedSpec(String),
    #[error("cannot {operation} {}", path.display())]
    Storage {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to mount rootfs component {component} ({kind} of {device})")]
    MountRootfs {
        component: usize,
        kind: String,
        device: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cannot bind {} of the host to {destination} in the container", source_path.display())]
    Bind {
        source_path: PathBuf,
        destination: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot open {}, the block device {major}:{minor} of the host", path.display())]
    BlockDevice {
        /// In the container.
        path: PathBuf,
        major: u64,
        minor: u64,
        #[source]
        source: io::Error,
    },
    #[error("unknown scheme {scheme} of standard stream {uri}")]
    UnknownScheme { scheme: String, uri: String },
    #[error("cannot open standard stream {uri}")]
    OpenStream {
        uri: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot run the logging binary {}", path.display())]
    Logger {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{hook} hook {} failed", path.display())]
    Hook {
        hook: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot open the guest's {what} {}, the one of vm.{what} in husk.toml", path.display())]
    GuestFile {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("network namespace {} cannot be given to a VM", namespace.display())]
    Network {
        namespace: PathBuf,
        #[source]
        source: NetworkError,
    },
    #[error("port forwarding")]
    Forward(#[source] io::Error),
    #[error("cannot start the VM's worker process")]
    SpawnWorker(#[source] io::Error),
    #[error("cannot start the file server {}, the one of storage.server in husk.toml", path.display())]
    FileServer {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot speak with the VM's worker process")]
    WorkerSocket(#[source] io::Error),
    #[error("the VM's worker process answered {answer} to {question}")]
    WorkerProtocol {
        question: &'static str,
        answer: String,
    },
    #[error("the VM cannot be started: {0}")]
    BootRefused(String),
    #[error("the guest did not come up within the {} s of vm.boot_timeout_s in husk.toml{console}", limit.as_secs())]
    BootTimeout { limit: Duration, console: String },
    #[error("cannot connect to port {port} of the guest: {message}")]
    Connect { port: u32, message: String },
    #[error("the VM has ended: {0}")]
    VmEnded(String),
    #[error("{verb}: {message}")]
    Agent {
        verb: &'static str,
        code: Code,
        message: String,
    },
    #[error("the guest's agent did not answer {verb} within {} s", limit.as_secs())]
    AgentTimeout { verb: &'static str, limit: Duration },
    #[error("the connection to the guest's agent failed during {verb}")]
    AgentGone {
        verb: &'static str,
        #[source]
        source: ttrpc::Error,
    },
    #[error("the sandbox is shutting down")]
    Abandoned,
    #[error("cannot {0}")]
    Unimplemented(&'static str),
}

impl Error {
    /// The error and its causes in one line.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }

    fn code(&self) -> Code {
        match self {
            Self::ContainerNotFound { .. }
            | Self::ProcessNotFound { .. }
            | Self::ProcessFinished => Code::NOT_FOUND,
            Self::ContainerExists { .. } | Self::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Self::InitNotRunning { .. } | Self::NoSandbox { .. } | Self::ProcessNotStarted => {
                Code::FAILED_PRECONDITION
            }
            Self::InvalidId(_)
            | Self::InvalidRequest { .. }
            | Self::UnknownOptions(_)
            | Self::Config(_)
            | Self::UnsupportedSpec(_)
            | Self::TooLittleMemory { .. }
            | Self::UnknownScheme { .. } => Code::INVALID_ARGUMENT,
            Self::WrongState { .. }
            | Self::ReadSpec { .. }
            | Self::ExecInState { .. }
            | Self::Storage { .. }
            | Self::MountRootfs { .. }
            | Self::Bind { .. }
            | Self::BlockDevice { .. }
            | Self::OpenStream { .. }
            | Self::Logger { .. }
            | Self::Hook { .. }
            | Self::GuestFile { .. }
            | Self::Network { .. }
            | Self::Forward(_)
            | Self::SpawnWorker(_)
            | Self::FileServer { .. }
            | Self::WorkerSocket(_)
            | Self::WorkerProtocol { .. }
            | Self::BootRefused(_)
            | Self::Connect { .. } => Code::UNKNOWN,
            Self::BootTimeout { .. } | Self::AgentTimeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::VmEnded(_) | Self::AgentGone { .. } | Self::Abandoned => Code::UNAVAILABLE,
            // A runtime that fails, whatever it was that it did not like, as runc's shim tells it.
            Self::Agent {
                code: Code::INTERNAL | Code::INVALID_ARGUMENT,
                ..
            } => Code::UNKNOWN,
            Self::Agent { code, .. } => *code,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(err: &(dyn std::error::Error + 'static)) -> String {
    let mut text = describe(err);
    let mut cause = err.source();
    while let Some(err) = cause {
        text.push_str(": ");
        text.push_str(&describe(err));
        cause = err.source();
    }
    text
}

/// An error of the system in its own words and without its number, as every program of containerd's world writes it.
fn describe(err: &(dyn std::error::Error + 'static)) -> String {
    let errno = err
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error)
        .map(Errno::from_raw);
    match errno {
        Some(errno) => errno.desc().to_lowercase(),
        None => err.to_string(),
    }
}

impl From<Error> for ttrpc::Error {
    fn from(err: Error) -> Self {
        let code = err.code();
        get_rpc_status(code, format!("{}{}", err.chain(), class(code)))
    }
}

/// How the message of an error of this class ends where Go made it: clients of containerd 2 print no more than the
/// message, and those of containerd 1 take it off before they add their own.
fn class(code: Code) -> &'static str {
    match code {
        Code::NOT_FOUND => ": not found",
        Code::ALREADY_EXISTS => ": already exists",
        Code::FAILED_PRECONDITION => ": failed precondition",
        Code::INVALID_ARGUMENT => ": invalid argument",
        Code::UNIMPLEMENTED => ": not implemented",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(err: Error) -> (Code, String) {
        match ttrpc::Error::from(err) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("not a status: {other}"),
        }
    }

    #[test]
    fn unknown_container_is_not_found() {
        let (code, message) = status(Error::ContainerNotFound { id: "x".into() });
        assert_eq!(code, Code::NOT_FOUND);
        assert_eq!(message, "container x does not exist: not found");
    }

    #[test]
    fn message_carries_every_cause_once() {
        let (code, message) = status(Error::Bind {
            source_path: "/absent".into(),
            destination: "/data".into(),
            source: io::Error::from_raw_os_error(2),
        });
        assert_eq!(code, Code::UNKNOWN);
        assert_eq!(
            message,
            "cannot bind /absent of the host to /data in the container: no such file or directory"
        );
    }

    #[test]
    fn status_of_the_agent_passes_through() {
        let (code, _) = status(Error::Agent {
            verb: "ExecProcess",
            code: Code::FAILED_PRECONDITION,
            message: "not running".into(),
        });
        assert_eq!(code, Code::FAILED_PRECONDITION);
        let (code, _) = status(Error::Agent {
            verb: "CreateContainer",
            code: Code::INTERNAL,
            message: "no such program".into(),
        });
        assert_eq!(code, Code::UNKNOWN);
    }
}
