//! How the rest of the process opens connections into the guest: requests by channel to the device's thread, answers by
//! callback from it.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use vmm_sys_util::eventfd::EventFd;

/// Most requests that wait for the device's thread. They wait while the driver is not there yet.
const MAX_WAITING: usize = 64;

/// A connection that the guest has accepted.
#[derive(Debug)]
pub struct VsockStream {
    /// The host's port, by which the guest knows the connection.
    pub local_port: u32,
    /// The host's end. Half-close (`shutdown(2)`) and close travel both ways.
    pub stream: UnixStream,
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The guest answered with RST: nobody listens on that port.
    #[error("the guest refused the connection")]
    Refused,
    /// The guest answered with something that is no answer.
    #[error("the guest broke the vsock protocol")]
    Protocol,
    /// As many connections as one guest may have are open, or too many requests wait.
    #[error("too many vsock connections")]
    TooMany,
    /// The driver reset the device, or the device is gone.
    #[error("the vsock device was reset")]
    Reset,
    /// The pair of sockets could not be made, or not be waited for.
    #[error("cannot make a socket for the connection")]
    Socket(#[source] io::Error),
}

/// Called once, on the device's thread or at once.
type Completion = Box<dyn FnOnce(Result<VsockStream, ConnectError>) + Send>;

/// A request on its way. Dropped unanswered, it answers [`ConnectError::Reset`].
pub(super) struct ConnectRequest {
    pub(super) port: u32,
    /// The device's end.
    pub(super) ours: UnixStream,
    pub(super) waiter: Waiter,
}

impl fmt::Debug for ConnectRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectRequest")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// Who waits for a connection, with the end of it that will be theirs.
pub(super) struct Waiter(Option<(UnixStream, Completion)>);

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").finish_non_exhaustive()
    }
}

impl Waiter {
    pub(super) fn accepted(mut self, local_port: u32) {
        if let Some((stream, completion)) = self.0.take() {
            completion(Ok(VsockStream { local_port, stream }));
        }
    }

    pub(super) fn failed(mut self, err: ConnectError) {
        if let Some((_, completion)) = self.0.take() {
            completion(Err(err));
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some((_, completion)) = self.0.take() {
            completion(Err(ConnectError::Reset));
        }
    }
}

/// Opens connections into the guest. Cheap to clone; valid as long as the device, and harmless after it.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    requests: SyncSender<ConnectRequest>,
    wake: Arc<EventFd>,
}

impl VsockHandle {
    /// A handle, and the device's side of it.
    pub(super) fn new() -> io::Result<(Self, Requests)> {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (requests, received) = sync_channel(MAX_WAITING);
        let requests_side = Requests {
            received,
            wake: Arc::clone(&wake),
        };
        Ok((Self { requests, wake }, requests_side))
    }

    /// Asks for a connection to `port` in the guest. `completion` is called exactly once, from the device's thread when
    /// the guest has answered, or from this one when the request cannot even be made; it must not block. While the
    /// guest's driver is not there yet, requests wait for it.
    pub fn connect(
        &self,
        port: u32,
        completion: impl FnOnce(Result<VsockStream, ConnectError>) + Send + 'static,
    ) {
        let (ours, theirs) = match UnixStream::pair() {
            Ok(pair) => pair,
            Err(err) => return completion(Err(ConnectError::Socket(err))),
        };
        let request = ConnectRequest {
            port,
            ours,
            waiter: Waiter(Some((theirs, Box::new(completion)))),
        };
        match self.requests.try_send(request) {
            Ok(()) => self.wake.write(1).expect("an eventfd takes a one"),
            Err(TrySendError::Full(request)) => request.waiter.failed(ConnectError::TooMany),
            // The waiter's end says so.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }
}

/// The device's side of the handles.
#[derive(Debug)]
pub(super) struct Requests {
    received: Receiver<ConnectRequest>,
    wake: Arc<EventFd>,
}

impl Requests {
    /// Readable when there are requests.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The next request, if one waits.
    pub(super) fn take(&self) -> Option<ConnectRequest> {
        self.received.try_recv().ok()
    }
}
