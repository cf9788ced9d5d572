//! The protocol between the shim and the worker process in which a VM runs.
//!
//! A `SOCK_SEQPACKET` pair of unix sockets; one message is one packet of JSON, at most [`MAX_MESSAGE_LEN`] bytes, with at
//! most [`MAX_FDS`] descriptors beside it (SCM_RIGHTS). The shim sends [`Request`]s, each answered by exactly one
//! [`Reply`] with the request's id; the worker sends [`Event`]s on its own. When the socket closes, the worker ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;

/// Longest message, in bytes.
pub const MAX_MESSAGE_LEN: usize = 64 * 1024;

/// Most descriptors beside one message.
pub const MAX_FDS: usize = 64;

/// What the shim asks, under an id that it chooses and that the reply repeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Repeated in the reply.
    pub id: u64,
    /// The question.
    pub call: Call,
}

/// The requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Builds and starts the VM. Once, first; the descriptors are those that [`VmConfig`] names.
    Boot(VmConfig),
    /// Opens a vsock connection to a port of the guest.
    VsockConnect {
        /// Port in the guest.
        port: u32,
    },
    /// Reads every counter.
    Metrics,
}

/// From the worker to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The answer to the request with this id.
    Reply {
        /// Of the request.
        id: u64,
        /// What came of it; the error is one sentence.
        result: Result<Reply, String>,
    },
    /// Something happened.
    Event(Event),
}

/// The answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The vCPUs run.
    Booted,
    /// The guest accepted; the stream is the descriptor beside the message.
    VsockConnected {
        /// The host's port of the connection, by which the guest knows it.
        local_port: u32,
    },
    /// Counters by name, for example `vcpu_exits_mmio`.
    Metrics(BTreeMap<String, u64>),
}

/// What the worker reports unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The guest connected to the ready port.
    Ready,
    /// The VM has ended; the worker exits after this message.
    Exited(ExitReason),
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU took a triple fault.
    TripleFault,
    /// The guest's kernel panicked (pvpanic).
    Panic,
    /// KVM could not run a vCPU, or it left in a way that cannot be handled; with what KVM said.
    VcpuFailed {
        /// Index of the vCPU.
        vcpu: u8,
        /// One sentence.
        message: String,
    },
    /// A device's worker failed in a way that ends the VM.
    DeviceFailed {
        /// One sentence.
        message: String,
    },
}
