//! What can go wrong with a request, and the gRPC status that the shim gets for it. An error's text is one sentence that
//! names the object and what failed; causes are joined to it here, once, where the error leaves the agent.

use std::error::Error as StdError;
use std::io;

use ttrpc::Code;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container {id} does not exist")]
    NoContainer { id: String },
    #[error("process {exec_id} of container {id} does not exist")]
    NoProcess { id: String, exec_id: String },
    #[error("process already finished")]
    Finished,
    #[error("container {id} was removed")]
    Removed { id: String },
    #[error("container {id} exists already")]
    ContainerExists { id: String },
    #[error("process {exec_id} of container {id} exists already")]
    ProcessExists { id: String, exec_id: String },
    #[error("container {id} is {is}, not {wanted}")]
    WrongState {
        id: String,
        is: &'static str,
        wanted: &'static str,
    },
    #[error("process {exec_id} of container {id} is still running")]
    StillRunning { id: String, exec_id: String },
    #[error("process {name} has no terminal")]
    NoTerminal { name: String },
    #[error("{what} cannot be understood")]
    Malformed {
        what: &'static str,
        source: serde_json::Error,
    },
    #[error("{0}")]
    Invalid(String),
    #[error("device {path} does not exist in the guest, which has only devices of its own")]
    NoDevice { path: String },
    /// The working directory of an exec, which, other than that of the first process, is not made.
    #[error("working directory {path}: no such file or directory in the container")]
    NoFolder { path: String },
    #[error("no connection for a standard stream came from port {port} within {seconds} s")]
    NoStream { port: u32, seconds: u64 },
    #[error("the guest has got no interface {names} within {seconds} s")]
    NoInterface { names: String, seconds: u64 },
    #[error("the guest has got no disk {serial} within {seconds} s")]
    NoDisk { serial: String, seconds: u64 },
    /// What the process that builds containers, or the program's own start, reported.
    #[error("{0}")]
    Launch(String),
    #[error("cgroup {path}: {what} failed")]
    Cgroup {
        path: String,
        what: &'static str,
        source: io::Error,
    },
    #[error("the processes of container {id} did not {what} within {seconds} s")]
    TooSlow {
        id: String,
        what: &'static str,
        seconds: u64,
    },
    #[error("{what} failed")]
    Io { what: String, source: io::Error },
}

/// The result of everything that a request runs.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NoContainer { .. }
            | Self::NoProcess { .. }
            | Self::Finished
            | Self::Removed { .. } => Code::NOT_FOUND,
            Self::ContainerExists { .. } | Self::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. } | Self::StillRunning { .. } | Self::NoTerminal { .. } => {
                Code::FAILED_PRECONDITION
            }
            Self::Malformed { .. }
            | Self::Invalid(_)
            | Self::NoDevice { .. }
            | Self::NoFolder { .. } => Code::INVALID_ARGUMENT,
            Self::NoStream { .. }
            | Self::NoInterface { .. }
            | Self::NoDisk { .. }
            | Self::Launch(_)
            | Self::Cgroup { .. }
            | Self::TooSlow { .. }
            | Self::Io { .. } => Code::INTERNAL,
        }
    }
}

/// Says what was being done when the system refused.
pub(crate) trait During<T> {
    /// `what` is a phrase such as "mounting the share".
    fn during(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what.into(),
            source: source.into(),
        })
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_joined_once() {
        let refused: io::Result<()> = Err(io::Error::other("no such tag"));
        let error = refused
            .during("mounting the share")
            .expect_err("it was refused");
        assert_eq!(chain(&error), "mounting the share failed: no such tag");
    }

    #[test]
    fn unknown_container_is_not_found() {
        let error = Error::NoContainer { id: "x".to_owned() };
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "container x does not exist");
    }
}
