//! What can go wrong with the network of a pod. [`crate::error::Error::Network`] adds the namespace.

use std::io;

/// Why a pod's network cannot be given to a VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("cannot open it")]
    Open(#[source] io::Error),
    #[error("cannot enter it")]
    Enter(#[source] io::Error),
    #[error("cannot {what}")]
    Netlink {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot make a tap for {interface}")]
    Tap {
        interface: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot open /dev/vhost-net, which network.datapath = \"vhost\" asks for")]
    Vhost(#[source] io::Error),
    #[error("cannot listen in it")]
    Forward(#[source] io::Error),
    #[error("cannot write {path}")]
    Record {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("interface {interface} ({kind}) cannot be a VM's: {reason}")]
    Unsupported {
        interface: String,
        kind: String,
        reason: String,
    },
    #[error("another VM has it already, by {tap}")]
    InUse { tap: String },
    #[error("interface {interface} has an ingress queueing discipline of somebody else's")]
    Qdisc { interface: String },
}

/// What was being done, as in "cannot `what`", when netlink refused.
pub(super) trait While<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, NetworkError>;
}

impl<T> While<T> for Result<T, rtnetlink::Error> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, NetworkError> {
        self.map_err(|err| NetworkError::Netlink {
            what: what(),
            source: io_error(err),
        })
    }
}

/// The system's error, if it is one.
pub(super) fn io_error(err: rtnetlink::Error) -> io::Error {
    match err {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// The system's error number, if it has one.
pub(super) fn errno(err: &rtnetlink::Error) -> Option<i32> {
    match err {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}
