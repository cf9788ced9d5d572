//! The shim's end of the control socket: spawns the worker process of a VM and speaks with it.
//!
//! One task receives; it hands replies to the callers that wait for them, and events to the VM's owner ([`crate::vm`]).
//! When the socket closes, every call fails and the channel of events ends.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_vmm::config::{DiskConfig, NicConfig, VmConfig};
use husk_vmm::control::{self, Call, Event, FileChange, Message, Reply, Request, Resize};
use husk_vmm::worker;
use log::error;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};

use crate::error::Error;
use crate::size::VmSize;

/// How long a guest may take to accept a connection: long, since it can be busy; not for ever, since it can be hostile.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

type Answer = Result<(Reply, Vec<OwnedFd>), String>;

/// Asks a worker. Cheap to clone; all clones are the same connection.
#[derive(Debug, Clone)]
pub(crate) struct Worker(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    socket: AsyncFd<OwnedFd>,
    next_id: AtomicU64,
    /// Who waits for which reply; `None` once the socket has closed.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

/// Starts a worker process, which waits for [`Worker::boot`].
///
/// It dies with the thread that called this (PR_SET_PDEATHSIG counts threads, not processes), so the caller has to be on
/// the shim's main thread: on the thread of the single-threaded runtime, never in `spawn_blocking`.
pub(crate) fn spawn() -> Result<(Child, OwnedFd), Error> {
    let (mut command, ours) = worker::command("/proc/self/exe").map_err(Error::SpawnWorker)?;
    command.arg0(env!("CARGO_BIN_NAME"));
    let child = Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::SpawnWorker)?;
    // containerd protects its shims from the host's OOM killer. The VM is the workload: it must not be spared for it.
    let pid = child.id().expect("not yet waited for");
    set_oom_score_adj(pid, 0)?;
    Ok((child, ours))
}

/// Says how much the host's OOM killer shall spare a process, see proc(5).
pub(crate) fn set_oom_score_adj(pid: u32, score: i32) -> Result<(), Error> {
    let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
    std::fs::write(&path, score.to_string()).map_err(|source| Error::Storage {
        operation: "write",
        path,
        source,
    })
}

impl Worker {
    /// Takes the control socket into use. The receiver yields the worker's events and ends when the socket closes.
    pub(crate) fn connect(socket: OwnedFd) -> io::Result<(Self, mpsc::UnboundedReceiver<Event>)> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an `OwnedFd` keeps one open descriptor, and the `AsyncFd` keeps the `OwnedFd`.
        let socket = unsafe { AsyncFd::register(socket)? };
        let connection = Arc::new(Connection {
            socket,
            next_id: AtomicU64::new(1),
            pending: Mutex::new(Some(HashMap::new())),
        });
        let (events, receiver) = mpsc::unbounded_channel();
        tokio::spawn(receive(connection.clone(), events));
        Ok((Self(connection), receiver))
    }

    /// Builds and starts the VM; `files` as [`VmConfig`] orders them.
    pub(crate) async fn boot(
        &self,
        config: VmConfig,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        match self.call(Call::Boot(config), files).await? {
            Ok((Reply::Booted, _)) => Ok(()),
            Ok((other, _)) => Err(unexpected("Boot", &other)),
            Err(message) => Err(Error::BootRefused(message)),
        }
    }

    /// Opens a vsock connection to `port` of the guest; also returns the host's port of it.
    pub(crate) async fn connect_vsock(&self, port: u32) -> Result<(u32, UnixStream), Error> {
        let failed = |message: String| Error::Connect { port, message };
        let answer =
            tokio::time::timeout(CONNECT_LIMIT, self.call(Call::VsockConnect { port }, &[]));
        let no_answer = |_| failed(format!("no answer within {} s", CONNECT_LIMIT.as_secs()));
        match answer.await.map_err(no_answer)?? {
            Ok((Reply::VsockConnected { local_port }, fds)) => {
                let [fd] = <[OwnedFd; 1]>::try_from(fds)
                    .map_err(|fds| failed(format!("{} descriptors arrived", fds.len())))?;
                let stream = std::os::unix::net::UnixStream::from(fd);
                let stream = stream
                    .set_nonblocking(true)
                    .and_then(|()| UnixStream::from_std(stream))
                    .map_err(Error::WorkerSocket)?;
                Ok((local_port, stream))
            }
            Ok((other, _)) => Err(unexpected("VsockConnect", &other)),
            Err(message) => Err(failed(message)),
        }
    }

    /// Tells the guest how large it shall be.
    pub(crate) async fn resize(&self, size: VmSize) -> Result<(), Error> {
        let resize = Resize {
            vcpus: Some(size.vcpus),
            memory_mib: Some(size.memory_mib),
        };
        self.tell("Resize", Call::Resize(resize), &[], &Reply::Resized)
            .await
    }

    /// Adds a disk to the running VM.
    pub(crate) async fn add_disk(
        &self,
        config: DiskConfig,
        file: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        self.tell("AddDisk", Call::AddDisk(config), &[file], &Reply::Added)
            .await
    }

    /// Removes one that was added, and returns when it is gone and its file closed.
    pub(crate) async fn remove_disk(&self, serial: String) -> Result<(), Error> {
        let call = Call::RemoveDisk { serial };
        self.tell("RemoveDisk", call, &[], &Reply::Removed).await
    }

    /// Adds a network device to the running VM; `files` as [`NicConfig`] orders them.
    pub(crate) async fn add_nic(
        &self,
        nic: NicConfig,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.tell("AddNic", Call::AddNic(nic), files, &Reply::Added)
            .await
    }

    /// Removes one that was added, and returns when it is gone.
    pub(crate) async fn remove_nic(&self, mac: [u8; 6]) -> Result<(), Error> {
        self.tell("RemoveNic", Call::RemoveNic { mac }, &[], &Reply::Removed)
            .await
    }

    async fn tell(
        &self,
        question: &'static str,
        call: Call,
        files: &[BorrowedFd<'_>],
        expected: &Reply,
    ) -> Result<(), Error> {
        match self.call(call, files).await? {
            Ok((reply, _)) if reply == *expected => Ok(()),
            Ok((other, _)) => Err(unexpected(question, &other)),
            Err(message) => Err(Error::WorkerProtocol {
                question,
                answer: message,
            }),
        }
    }

    /// Takes the first of what others have changed in the shared folder, and tells whether there is more.
    pub(crate) async fn take_changes(&self) -> Result<(Vec<FileChange>, bool), Error> {
        match self.call(Call::TakeChanges, &[]).await? {
            Ok((Reply::Changes { changes, more }, _)) => Ok((changes, more)),
            Ok((other, _)) => Err(unexpected("TakeChanges", &other)),
            Err(message) => Err(Error::WorkerProtocol {
                question: "TakeChanges",
                answer: message,
            }),
        }
    }

    /// Every counter of the VM, by name.
    pub(crate) async fn metrics(&self) -> Result<std::collections::BTreeMap<String, u64>, Error> {
        match self.call(Call::Metrics, &[]).await? {
            Ok((Reply::Metrics(counters), _)) => Ok(counters),
            Ok((other, _)) => Err(unexpected("Metrics", &other)),
            Err(message) => Err(Error::WorkerProtocol {
                question: "Metrics",
                answer: message,
            }),
        }
    }

    /// Closes the socket, upon which the worker ends. May be called more than once.
    pub(crate) fn close(&self) {
        // An error means that the peer has gone first.
        let _ = shutdown(self.0.socket.as_raw_fd(), Shutdown::Both);
    }

    async fn call(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Answer, Error> {
        let closed = || Error::WorkerSocket(io::ErrorKind::BrokenPipe.into());
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.0
            .pending()
            .as_mut()
            .ok_or_else(closed)?
            .insert(id, sender);
        let request = Request { id, call };
        let sent = self
            .0
            .socket
            .async_io(Interest::WRITABLE, |socket| {
                control::send(socket.as_fd(), &request, fds).map_err(io::Error::from)
            })
            .await;
        if let Err(err) = sent {
            if let Some(pending) = self.0.pending().as_mut() {
                pending.remove(&id);
            }
            return Err(Error::WorkerSocket(err));
        }
        answer.await.map_err(|_| closed())
    }
}

impl Connection {
    fn pending(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unexpected(question: &'static str, reply: &Reply) -> Error {
    Error::WorkerProtocol {
        question,
        answer: format!("{reply:?}"),
    }
}

async fn receive(connection: Arc<Connection>, events: mpsc::UnboundedSender<Event>) {
    loop {
        let received = connection
            .socket
            .async_io(Interest::READABLE, |socket| {
                control::recv::<Message>(socket.as_fd()).map_err(io::Error::from)
            })
            .await;
        match received {
            Ok(Some((Message::Reply { id, result }, fds))) => {
                let waiting = connection
                    .pending()
                    .as_mut()
                    .and_then(|pending| pending.remove(&id));
                match waiting {
                    // A caller that was cancelled is no error; its descriptors close here.
                    Some(sender) => drop(sender.send(result.map(|reply| (reply, fds)))),
                    None => error!("the worker answered request {id}, which nobody asked"),
                }
            }
            // The receiver is gone when the VM's owner is, and then nobody cares.
            Ok(Some((Message::Event(event), _))) => drop(events.send(event)),
            Ok(None) => break,
            Err(err) => {
                error!("control socket of the worker: {err}");
                break;
            }
        }
    }
    // Dropping the senders wakes the callers.
    connection.pending().take();
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as StdStream;

    use husk_vmm::control::ExitReason;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The worker's end, played by a thread of the test: no VM can run where unit tests do.
    pub(crate) fn fake_worker(
        play: impl FnOnce(OwnedFd) + Send + 'static,
    ) -> (Worker, mpsc::UnboundedReceiver<Event>) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        std::thread::spawn(move || play(theirs));
        Worker::connect(ours).unwrap()
    }

    fn next_request(socket: &OwnedFd) -> (Request, Vec<OwnedFd>) {
        control::recv(socket).unwrap().unwrap()
    }

    pub(crate) fn reply(
        socket: &OwnedFd,
        id: u64,
        result: Result<Reply, String>,
        fds: &[BorrowedFd<'_>],
    ) {
        control::send(socket, &Message::Reply { id, result }, fds).unwrap();
    }

    #[tokio::test]
    async fn vsock_connection_arrives_with_its_port() {
        let (worker, _events) = fake_worker(|socket| {
            let (request, _) = next_request(&socket);
            assert_eq!(request.call, Call::VsockConnect { port: 1025 });
            let (mut guest, host) = StdStream::pair().unwrap();
            reply(
                &socket,
                request.id,
                Ok(Reply::VsockConnected { local_port: 77 }),
                &[host.as_fd()],
            );
            drop(host);
            let mut text = [0; 4];
            guest.read_exact(&mut text).unwrap();
            guest.write_all(&text).unwrap();
        });
        let (port, mut stream) = worker.connect_vsock(1025).await.unwrap();
        assert_eq!(port, 77);
        stream.write_all(b"echo").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "echo");
    }

    #[tokio::test]
    async fn replies_find_their_callers_in_any_order() {
        let (worker, _events) = fake_worker(|socket| {
            let (first, _) = next_request(&socket);
            let (second, _) = next_request(&socket);
            for request in [second, first] {
                let Call::VsockConnect { port } = request.call else {
                    panic!("{request:?}")
                };
                reply(&socket, request.id, Err(format!("refused {port}")), &[]);
            }
        });
        let (one, two) = tokio::join!(worker.connect_vsock(1), worker.connect_vsock(2));
        assert!(one.unwrap_err().to_string().ends_with("refused 1"));
        assert!(two.unwrap_err().to_string().ends_with("refused 2"));
    }

    #[tokio::test]
    async fn refusal_to_boot_is_told() {
        let (worker, _events) = fake_worker(|socket| {
            let (request, fds) = next_request(&socket);
            assert_eq!(fds.len(), 1);
            reply(
                &socket,
                request.id,
                Err("/dev/kvm: no such file".into()),
                &[],
            );
        });
        let config = VmConfig {
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 512,
            max_memory_mib: 512,
            kernel_params: String::new(),
            shares: Vec::new(),
            disks: Vec::new(),
            nics: Vec::new(),
            file_servers: Vec::new(),
            guest_cid: 3,
            ready_port: 1024,
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        let err = worker.boot(config, &[file.as_fd()]).await.unwrap_err();
        assert_eq!(
            err.to_string(),
            "the VM cannot be started: /dev/kvm: no such file"
        );
    }

    #[tokio::test]
    async fn end_of_the_worker_ends_calls_and_events() {
        let (worker, mut events) = fake_worker(|socket| {
            let exited = Event::Exited(ExitReason::PowerOff);
            control::send(&socket, &Message::Event(exited), &[]).unwrap();
            next_request(&socket);
        });
        assert!(matches!(
            worker.metrics().await,
            Err(Error::WorkerSocket(_))
        ));
        assert_eq!(
            events.recv().await,
            Some(Event::Exited(ExitReason::PowerOff))
        );
        assert_eq!(events.recv().await, None);
        assert!(matches!(
            worker.metrics().await,
            Err(Error::WorkerSocket(_))
        ));
    }

    #[tokio::test]
    async fn close_is_seen_by_the_worker() {
        let (sender, receiver) = oneshot::channel();
        let (worker, mut events) = fake_worker(move |socket| {
            let closed = control::recv::<Request>(&socket).unwrap().is_none();
            sender.send(closed).unwrap();
        });
        worker.close();
        assert!(receiver.await.unwrap());
        assert_eq!(events.recv().await, None);
    }
}
