//! Standard streams: vsock connections that the host opens to the stream port, each named in a request by the host's
//! port of it, and the copying between them and the pipes or the terminal of a process.
//!
//! End of file is exact in both directions. The host's half-close of a stdin connection closes the write end of the
//! process' pipe. The last writer of a stdout pipe to go ends its connection. A process that closes its stdin early ends
//! the connection, so the host learns of it; a host that goes away early closes the pipe, so the process does.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio_vsock::{VsockListener, VsockStream};

use crate::error::{During, Error, Result};
use crate::terminal::Terminal;

/// The host opens the connections before it sends the request that names them, so they are there or about to be.
const ARRIVAL: Duration = Duration::from_secs(10);

/// As much as a pipe holds, and as a vsock packet carries.
const BUFFER_BYTES: usize = 64 << 10;

/// A connection of the host.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

type Stream = Box<dyn Connection>;

/// Connections by the host's port: those that have come and those that a request waits for.
#[derive(Default)]
pub(crate) struct Streams {
    slots: Mutex<HashMap<u32, Slot>>,
}

enum Slot {
    Arrived(Stream),
    Awaited(oneshot::Sender<Stream>),
}

/// The ports of a request; 0 is "no such stream".
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

/// The connections that belong to [`Ports`].
#[derive(Default)]
pub(crate) struct Stdio {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Stdio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stdio").finish_non_exhaustive()
    }
}

impl Streams {
    /// Takes connections for as long as the agent lives.
    pub(crate) async fn serve(self: Arc<Self>, listener: VsockListener) {
        loop {
            let (stream, port) = accept(&listener).await;
            self.arrived(port, Box::new(stream));
        }
    }

    fn arrived(&self, port: u32, stream: Stream) {
        let mut slots = self.lock();
        let unclaimed = match slots.remove(&port) {
            Some(Slot::Awaited(request)) => request.send(stream).err(),
            // The host uses a port again only after it has closed the connection that had it.
            Some(Slot::Arrived(_)) | None => Some(stream),
        };
        if let Some(stream) = unclaimed {
            slots.insert(port, Slot::Arrived(stream));
        }
    }

    /// Waits for the connections of a request. Each of them is taken, also when another does not come.
    pub(crate) async fn take(&self, ports: Ports) -> Result<Stdio> {
        let (stdin, stdout, stderr) = tokio::join!(
            self.take_one(ports.stdin),
            self.take_one(ports.stdout),
            self.take_one(ports.stderr)
        );
        Ok(Stdio {
            stdin: stdin?,
            stdout: stdout?,
            stderr: stderr?,
        })
    }

    async fn take_one(&self, port: u32) -> Result<Option<Stream>> {
        if port == 0 {
            return Ok(None);
        }
        let arrival = {
            let mut slots = self.lock();
            match slots.remove(&port) {
                Some(Slot::Arrived(stream)) => return Ok(Some(stream)),
                Some(Slot::Awaited(_)) => {
                    return Err(Error::Invalid(format!(
                        "port {port} is named for two standard streams"
                    )));
                }
                None => {
                    let (sender, receiver) = oneshot::channel();
                    slots.insert(port, Slot::Awaited(sender));
                    receiver
                }
            }
        };
        if let Ok(Ok(stream)) = tokio::time::timeout(ARRIVAL, arrival).await {
            return Ok(Some(stream));
        }
        self.lock().remove(&port);
        Err(Error::NoStream {
            port,
            seconds: ARRIVAL.as_secs(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ends of the pipes that a process gets as its standard streams; `None` stands for `/dev/null`.
#[derive(Debug, Default)]
pub(crate) struct ChildEnds {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl Stdio {
    /// Makes a pipe for each stream that there is, owned by `uid` so that the process may open `/dev/stdout` again, and
    /// copies between the pipes and the connections in the background.
    pub(crate) fn into_pipes(self, uid: u32) -> Result<ChildEnds> {
        let mut child = ChildEnds::default();
        if let Some(stream) = self.stdin {
            let (read_end, write_end) = pipe_for(uid)?;
            let pipe = pipe::Sender::from_owned_fd(write_end).during("making a pipe")?;
            child.stdin = Some(read_end);
            tokio::spawn(feed(stream, pipe));
        }
        for (stream, end) in [
            (self.stdout, &mut child.stdout),
            (self.stderr, &mut child.stderr),
        ] {
            if let Some(stream) = stream {
                let (read_end, write_end) = pipe_for(uid)?;
                let pipe = pipe::Receiver::from_owned_fd(read_end).during("making a pipe")?;
                *end = Some(write_end);
                tokio::spawn(drain(pipe, stream));
            }
        }
        Ok(child)
    }

    /// Copies between the connections and a terminal in the background.
    pub(crate) fn into_terminal(self, terminal: &Arc<Terminal>) {
        if let Some(stream) = self.stdin {
            let (mut source, mut sink) = (stream, terminal.writer());
            tokio::spawn(async move { copy(&mut source, &mut sink).await });
        }
        if let Some(stream) = self.stdout {
            tokio::spawn(drain(terminal.reader(), stream));
        }
    }
}

fn pipe_for(uid: u32) -> Result<(OwnedFd, OwnedFd)> {
    let (read_end, write_end) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during("making a pipe")?;
    // Both ends are one inode.
    rustix::fs::fchown(read_end.as_fd(), Some(rustix::fs::Uid::from_raw(uid)), None)
        .during("giving a pipe to its process")?;
    Ok((read_end, write_end))
}

/// The host's data to the process: until the host ends the stream, or the process closes its end.
async fn feed(mut stream: Stream, mut pipe: pipe::Sender) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = tokio::select! {
            biased;
            count = stream.read(&mut buffer) => count,
            // Without data to write, only this tells that nobody reads any more.
            _ = pipe.ready(Interest::ERROR) => return,
        };
        match count {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if pipe.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The process' data to the host: until the last writer is gone, or the host is.
async fn drain(mut source: impl AsyncRead + Unpin, mut stream: Stream) {
    copy(&mut source, &mut stream).await;
    // The end of the stream travels behind the data. A host that is gone already needs none.
    let _gone = stream.shutdown().await;
}

async fn copy(source: &mut (impl AsyncRead + Unpin), sink: &mut (impl AsyncWrite + Unpin)) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(count) = source.read(&mut buffer).await {
        if count == 0 || sink.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// The host's next connection, and its port of it.
pub(crate) async fn accept(listener: &VsockListener) -> (VsockStream, u32) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == husk_protocol::HOST_CID => {
                return (stream, peer.port());
            }
            // A process of the guest has no business here.
            Ok((_, peer)) => tracing::warn!(%peer, "refused a stream that is not the host's"),
            Err(error) => tracing::error!(%error, "a stream was not accepted"),
        }
    }
}

/// Tells the host that the agent serves. The connection itself is the message.
pub(crate) async fn announce() -> io::Result<()> {
    let address = tokio_vsock::VsockAddr::new(husk_protocol::HOST_CID, husk_protocol::READY_PORT);
    VsockStream::connect(address).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(stdin: u32, stdout: u32, stderr: u32) -> Ports {
        Ports {
            stdin,
            stdout,
            stderr,
        }
    }

    fn uid() -> u32 {
        rustix::process::getuid().as_raw()
    }

    #[tokio::test]
    async fn a_request_gets_the_connection_of_its_port_whichever_comes_first() {
        let streams = Arc::new(Streams::default());
        let (early, _host) = tokio::io::duplex(16);
        streams.arrived(7, Box::new(early));
        assert!(
            streams
                .take(ports(7, 0, 0))
                .await
                .is_ok_and(|stdio| stdio.stdin.is_some())
        );

        let waiting = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.take(ports(0, 8, 0)).await }
        });
        tokio::task::yield_now().await;
        let (late, _host) = tokio::io::duplex(16);
        streams.arrived(8, Box::new(late));
        assert!(
            waiting
                .await
                .is_ok_and(|stdio| stdio.is_ok_and(|stdio| stdio.stdout.is_some()))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_comes_is_an_error() {
        let streams = Streams::default();
        let error = streams
            .take(ports(0, 0, 9))
            .await
            .expect_err("nobody connected");
        assert!(matches!(error, Error::NoStream { port: 9, .. }));
        assert!(streams.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn connections_beside_one_that_never_comes_are_not_kept() {
        let streams = Streams::default();
        let (arrived, mut host) = tokio::io::duplex(16);
        streams.arrived(8, Box::new(arrived));
        assert!(streams.take(ports(7, 8, 0)).await.is_err());
        assert!(streams.lock().is_empty());
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).await.expect("it is closed");
    }

    #[tokio::test]
    async fn half_close_of_the_host_is_end_of_file_for_the_process() {
        let (stream, mut host) = tokio::io::duplex(1 << 20);
        let stdio = Stdio {
            stdin: Some(Box::new(stream)),
            ..Stdio::default()
        };
        let child = stdio.into_pipes(uid()).expect("pipes");
        host.write_all(b"hello").await.expect("there is room");
        host.shutdown().await.expect("it was open");
        let mut stdin =
            pipe::Receiver::from_owned_fd(child.stdin.expect("asked for")).expect("a pipe");
        let mut text = String::new();
        stdin.read_to_string(&mut text).await.expect("it ends");
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn process_that_closes_its_stdin_ends_the_connection() {
        let (stream, mut host) = tokio::io::duplex(16);
        let stdio = Stdio {
            stdin: Some(Box::new(stream)),
            ..Stdio::default()
        };
        let child = stdio.into_pipes(uid()).expect("pipes");
        drop(child.stdin);
        let mut rest = Vec::new();
        host.read_to_end(&mut rest)
            .await
            .expect("the agent hangs up");
        assert!(rest.is_empty());
    }

    #[tokio::test]
    async fn last_writer_to_go_ends_the_output() {
        let (stream, mut host) = tokio::io::duplex(16);
        let stdio = Stdio {
            stdout: Some(Box::new(stream)),
            ..Stdio::default()
        };
        let child = stdio.into_pipes(uid()).expect("pipes");
        let mut stdout =
            pipe::Sender::from_owned_fd(child.stdout.expect("asked for")).expect("a pipe");
        let data = vec![b'x'; 300_000];
        let sent = data.clone();
        tokio::spawn(async move { stdout.write_all(&sent).await });
        let mut received = Vec::new();
        host.read_to_end(&mut received).await.expect("it ends");
        assert!(received == data);
    }
}
