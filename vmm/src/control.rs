//! The protocol between the shim and the worker process in which a VM runs.
//!
//! A `SOCK_SEQPACKET` pair of unix sockets; one message is one packet of JSON, at most [`MAX_MESSAGE_LEN`] bytes, with at
//! most [`MAX_FDS`] descriptors beside it (SCM_RIGHTS). The shim sends [`Request`]s, each answered by exactly one
//! [`Reply`] with the request's id; the worker sends [`Event`]s on its own. When the socket closes, the worker ends.
//!
//! [`send`] and [`recv`] are the framing, the same for both ends. They make one attempt each: on a non-blocking socket
//! they fail with [`FrameError::would_block`], which is how an event loop (or tokio's `AsyncFd`) wants it.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, NicConfig, VmConfig};

/// Longest message, in bytes.
pub const MAX_MESSAGE_LEN: usize = 64 * 1024;

/// Most descriptors beside one message.
pub const MAX_FDS: usize = 64;

/// Most descriptors that Linux passes beside one message (SCM_MAX_FD). Room for all of them is made at receipt: were
/// there less, a peer could make the kernel install descriptors and then report them as cut off.
const KERNEL_MAX_FDS: usize = 253;

/// How long a guest has to let go of a device.
pub const REMOVE_LIMIT: Duration = Duration::from_secs(30);

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
    /// Changes how large the running VM is, within what its [`VmConfig`] allows.
    Resize(Resize),
    /// Adds a disk to the running VM; its descriptor is beside the message. The guest finds it by its serial, which no other
    /// disk may have: the reply, [`Reply::Added`], says that its kernel has been told, not that it is through with it, so
    /// whoever waits for the disk in the guest waits for the kernel's event. A VM has at most 32 devices in all.
    AddDisk(DiskConfig),
    /// Removes a disk that was added. What is not durable on it by then may be lost, so the guest should not use it any more. The
    /// reply, [`Reply::Removed`], comes when the guest has let go of it and its descriptor is closed; if the guest does not
    /// within [`REMOVE_LIMIT`], it is an error, and the disk stays.
    RemoveDisk {
        /// [`DiskConfig::serial`].
        serial: String,
    },
    /// Adds a network device, as [`Call::AddDisk`] a disk; the descriptors that [`NicConfig`] says are beside the message.
    AddNic(NicConfig),
    /// Removes a network device that was added, as [`Call::RemoveDisk`] a disk. Its tap is closed then.
    RemoveNic {
        /// [`NicConfig::mac`].
        mac: [u8; 6],
    },
    /// Takes the first of what others have changed in the shared folder that is watched.
    TakeChanges,
    /// Reads every counter.
    Metrics,
}

/// How large a running VM shall be. What is not given stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Virtual processors, 1 to [`VmConfig::max_vcpus`].
    pub vcpus: Option<u8>,
    /// Guest memory in MiB, up to [`VmConfig::max_memory_mib`]. The VM keeps what it started with.
    pub memory_mib: Option<u32>,
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
    /// The guest has been told. It follows when it can; the counters `vcpus` and `mem_plugged_bytes` say how far it has.
    Resized,
    /// The device is there, and the guest has been told.
    Added,
    /// The device is gone, and all that it had is closed.
    Removed,
    /// What has changed, in this order; a change is told once.
    Changes {
        /// The first ones.
        changes: Vec<FileChange>,
        /// There are more. If not, an event says when there are.
        more: bool,
    },
    /// Counters by name, for example `vcpu_exits_mmio`.
    Metrics(BTreeMap<String, u64>),
}

/// That somebody else than the guest has changed something in a shared folder which the guest knows.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileChange {
    /// What has been done.
    pub kind: ChangeKind,
    /// With what, below the shared folder, and without a slash at its start. Empty for what has been moved in from where
    /// nobody watches.
    pub path: Vec<u8>,
    /// Where it has been moved to. Empty for a place that nobody watches, and for all but [`ChangeKind::Moved`].
    pub to: Vec<u8>,
    /// S_IFMT of its mode. Of what is gone no more is known than whether it was a folder.
    pub file_type: u32,
}

/// What can be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ChangeKind {
    /// It has been written to.
    Modified,
    /// Somebody who could write to it has closed it.
    Written,
    /// Its attributes are others; of a folder of the root also: there was more than can be told.
    Attributes,
    /// It is new.
    Created,
    /// It has been removed.
    Gone,
    /// It has another name.
    Moved,
}

/// What the worker reports unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The guest connected to the ready port.
    Ready,
    /// There is something for [`Call::TakeChanges`]. Not repeated before all is taken.
    FilesChanged,
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
    /// The process that serves a folder of the guest's is gone, or does not do what it is to do.
    FileServer {
        /// The folder's tag.
        tag: String,
        /// One sentence.
        message: String,
    },
}

impl fmt::Display for ExitReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => formatter.write_str("the guest powered off"),
            // Nothing in the guest asks for one; what containers may call ends their PID namespace.
            Self::Reset => formatter.write_str(
                "the guest reset itself, as its kernel does when it panics early in the boot",
            ),
            Self::TripleFault => formatter.write_str("a vCPU took a triple fault"),
            Self::Panic => formatter.write_str("the guest's kernel panicked"),
            Self::VcpuFailed { vcpu, message } => {
                write!(formatter, "vCPU {vcpu} failed: {message}")
            }
            Self::FileServer { tag, message } => {
                write!(formatter, "the file server of {tag:?} failed: {message}")
            }
        }
    }
}

/// Why a message could not be sent or received. After any of these but [`FrameError::would_block`] the socket is of no
/// further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The system call failed.
    #[error("control socket")]
    Socket(#[source] io::Error),
    /// A message that is longer than [`MAX_MESSAGE_LEN`], to be sent or received.
    #[error("control message of more than {MAX_MESSAGE_LEN} bytes")]
    TooLong,
    /// More than [`MAX_FDS`] descriptors, to be sent or received.
    #[error("control message with more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// Not all descriptors of the message could be received: this process has no room for them (RLIMIT_NOFILE).
    #[error("descriptors beside a control message were lost")]
    FdsLost,
    /// A message that cannot be written as JSON.
    #[error("cannot encode a control message")]
    Encode(#[source] serde_json::Error),
    /// A message that is not the JSON that was expected.
    #[error("cannot decode a control message")]
    Decode(#[source] serde_json::Error),
}

impl FrameError {
    /// Whether the socket is non-blocking and was not ready: nothing was sent or received, try again when it is.
    #[must_use]
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Socket(err) if err.kind() == io::ErrorKind::WouldBlock)
    }
}

/// For callers whose event loop speaks `std::io` (tokio's `AsyncFd::try_io`): keeps the kind of a socket's error.
impl From<FrameError> for io::Error {
    fn from(err: FrameError) -> Self {
        match err {
            FrameError::Socket(err) => err,
            err @ (FrameError::TooLong | FrameError::TooManyFds | FrameError::FdsLost) => {
                Self::new(io::ErrorKind::InvalidData, err)
            }
            err @ (FrameError::Encode(_) | FrameError::Decode(_)) => {
                Self::new(io::ErrorKind::InvalidData, err)
            }
        }
    }
}

/// Sends one message with the descriptors beside it; both arrive together or not at all.
///
/// # Errors
/// See [`FrameError`]. A closed peer is `Socket` with `BrokenPipe`; no signal is raised.
pub fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    let packet = serde_json::to_vec(message).map_err(FrameError::Encode)?;
    if packet.len() > MAX_MESSAGE_LEN {
        return Err(FrameError::TooLong);
    }
    if fds.len() > MAX_FDS {
        return Err(FrameError::TooManyFds);
    }

    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        let pushed = control.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(pushed, "the buffer holds MAX_FDS descriptors");
    }
    retry_on_intr(|| {
        sendmsg(
            socket.as_fd(),
            &[IoSlice::new(&packet)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })
    .map_err(|err| FrameError::Socket(err.into()))?;
    // A packet is sent whole or not at all (unix(7)), so the count of bytes says nothing.
    Ok(())
}

/// Receives one message and the descriptors beside it, which are close-on-exec; `None` when the peer is gone.
///
/// # Errors
/// See [`FrameError`]. Descriptors of a message that is refused are closed.
pub fn recv<T: DeserializeOwned>(
    socket: impl AsFd,
) -> Result<Option<(T, Vec<OwnedFd>)>, FrameError> {
    let mut packet = vec![0; MAX_MESSAGE_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut packet)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let received = match received {
        Ok(received) => received,
        // The peer closed with messages of ours unread.
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(err) => return Err(FrameError::Socket(err.into())),
    };

    // Taken out first, so that every way out of here closes them.
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(FrameError::FdsLost);
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(FrameError::TooLong);
    }
    if fds.len() > MAX_FDS {
        return Err(FrameError::TooManyFds);
    }
    // No message is empty, so an empty packet is the end of the stream.
    let Some(packet) = packet
        .get(..received.bytes)
        .filter(|bytes| !bytes.is_empty())
    else {
        return Ok(None);
    };
    let message = serde_json::from_slice(packet).map_err(FrameError::Decode)?;
    Ok(Some((message, fds)))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair(flags: SocketFlags) -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            flags | SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    fn raw_send(socket: &OwnedFd, packet: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(
            socket,
            &[IoSlice::new(packet)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    #[test]
    fn message_and_descriptors_arrive_together() {
        let (ours, theirs) = pair(SocketFlags::empty());
        let (mut reader, writer) = std::io::pipe().unwrap();
        let sent = Message::Reply {
            id: 7,
            result: Ok(Reply::VsockConnected { local_port: 9 }),
        };

        send(&ours, &sent, &[writer.as_fd()]).unwrap();
        drop(writer);

        let (received, fds): (Message, _) = recv(&theirs).unwrap().unwrap();
        assert_eq!(received, sent);
        let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
        assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
        File::from(fd).write_all(b"through").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn messages_keep_their_bounds() {
        let (ours, theirs) = pair(SocketFlags::empty());
        for id in 0..3 {
            send(
                &ours,
                &Request {
                    id,
                    call: Call::Metrics,
                },
                &[],
            )
            .unwrap();
        }
        for id in 0..3 {
            let (request, fds): (Request, _) = recv(&theirs).unwrap().unwrap();
            assert_eq!((request.id, fds.len()), (id, 0));
        }
    }

    #[test]
    fn closed_peer_is_none() {
        let (ours, theirs) = pair(SocketFlags::empty());
        drop(ours);
        assert!(recv::<Request>(&theirs).unwrap().is_none());
    }

    #[test]
    fn peer_that_closed_with_unread_messages_is_none() {
        let (ours, theirs) = pair(SocketFlags::empty());
        send(&theirs, &Message::Event(Event::Ready), &[]).unwrap();
        drop(ours);
        assert!(recv::<Request>(&theirs).unwrap().is_none());
    }

    #[test]
    fn sending_to_a_closed_peer_is_broken_pipe() {
        let (ours, theirs) = pair(SocketFlags::empty());
        drop(theirs);
        let err = send(&ours, &Message::Event(Event::Ready), &[]).unwrap_err();
        assert_eq!(io::Error::from(err).kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn nonblocking_socket_without_a_message_would_block() {
        let (ours, _theirs) = pair(SocketFlags::NONBLOCK);
        let err = recv::<Request>(&ours).unwrap_err();
        assert!(err.would_block());
        assert_eq!(io::Error::from(err).kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn nonblocking_socket_whose_peer_does_not_read_would_block() {
        let (ours, _theirs) = pair(SocketFlags::NONBLOCK);
        let err = (0..100_000)
            .find_map(|_| send(&ours, &Message::Event(Event::Ready), &[]).err())
            .unwrap();
        assert!(err.would_block(), "{err:?}");
    }

    #[test]
    fn too_long_a_message_is_not_sent() {
        let (ours, _theirs) = pair(SocketFlags::empty());
        let err = send(&ours, &"x".repeat(MAX_MESSAGE_LEN), &[]).unwrap_err();
        assert!(matches!(err, FrameError::TooLong));
    }

    #[test]
    fn too_long_a_message_is_refused_at_receipt() {
        let (ours, theirs) = pair(SocketFlags::empty());
        raw_send(&ours, &vec![b' '; MAX_MESSAGE_LEN + 1], &[]);
        assert!(matches!(recv::<Request>(&theirs), Err(FrameError::TooLong)));
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (ours, theirs) = pair(SocketFlags::empty());
        let (mut reader, writer) = std::io::pipe().unwrap();
        let fds = vec![writer.as_fd(); MAX_FDS + 1];
        assert!(matches!(
            send(&ours, &Message::Event(Event::Ready), &fds),
            Err(FrameError::TooManyFds)
        ));

        raw_send(&ours, b"{}", &vec![writer.as_fd(); KERNEL_MAX_FDS]);
        drop(writer);
        assert!(matches!(
            recv::<Request>(&theirs),
            Err(FrameError::TooManyFds)
        ));
        // End of file: no copy of the writer is left open.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn packet_that_is_not_the_message_is_refused() {
        let (ours, theirs) = pair(SocketFlags::empty());
        raw_send(&ours, b"{\"id\":1}", &[]);
        assert!(matches!(
            recv::<Request>(&theirs),
            Err(FrameError::Decode(_))
        ));
    }
}
