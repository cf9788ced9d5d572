//! Standard streams: containerd's ends (fifos, files, a logging program) and the copies between them and the guest.
//!
//! Each stream of a process is one vsock connection. The shim opens containerd's end first ([`open`]), which may happen
//! while the VM still boots, then connects to the guest ([`Ends::connect`]) and copies until the source ends.
//!
//! A fifo for output is opened for reading and writing, so that a reader may come late and may go early: the open does
//! not block, and a write never fails with EPIPE. For input the shim holds a writer of its own until `CloseIO`, so that
//! a client that detaches is no end of file. It opens the fifo for input when the process starts, and not before: a
//! client's first write waits for that, so that `ctr`, which forgets an end of its input that comes while it still
//! creates the task, meets the end of a short input when it can tell of it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use husk_protocol::STREAM_PORT;
use log::{debug, warn};
use nix::fcntl::OFlag;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::error::Error;
use crate::vm::Vm;

/// Bytes moved at once: what a pipe holds by default.
const BUFFER_LEN: usize = 64 * 1024;

/// How long a logging program may take to say that it is ready, and to end after its input has.
const LOGGER_LIMIT: Duration = Duration::from_secs(10);

/// Where containerd wants the standard streams of a process; empty for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) terminal: bool,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Whose streams they are, for a logging program.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogIdentity<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) id: &'a str,
}

/// What an output URI asks for.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    /// A fifo, or a file if the path turns out to be one.
    Path(PathBuf),
    /// `file://`: appended to, made if missing.
    File(PathBuf),
    /// `binary://`: a program that reads both outputs.
    Binary {
        path: PathBuf,
        arguments: Vec<String>,
    },
}

impl Output {
    fn parse(uri: &str) -> Result<Self, Error> {
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(Self::Path(uri.into()));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&path));
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            "file" => Ok(Self::File(path)),
            "binary" => Ok(Self::Binary {
                path,
                // containerd: each key is an argument, followed by its value if there is one.
                arguments: form_urlencoded::parse(query.as_bytes())
                    .flat_map(|(key, value)| [key.into_owned(), value.into_owned()])
                    .filter(|argument| !argument.is_empty())
                    .collect(),
            }),
            other => Err(Error::UnknownScheme {
                scheme: other.to_owned(),
                uri: uri.to_owned(),
            }),
        }
    }
}

/// containerd's ends of a process's streams, opened.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    stdin: Option<PathBuf>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Child>,
}

#[derive(Debug)]
enum Sink {
    Pipe(pipe::Sender),
    File(tokio::fs::File),
}

impl Sink {
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                // tokio's file keeps the last write to itself until the next one.
                file.flush().await
            }
        }
    }
}

/// The streams of a process that are connected to the guest.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    stdin: Mutex<Stdin>,
    outputs: Vec<JoinHandle<()>>,
    logger: Option<Child>,
}

#[derive(Debug, Default)]
enum Stdin {
    #[default]
    None,
    /// The process has not started.
    Waiting {
        fifo: PathBuf,
        guest: UnixStream,
        closed: bool,
    },
    Copying {
        copy: JoinHandle<()>,
        writer: Option<OwnedFd>,
    },
}

/// The host's ports of the connections, by which the agent finds them; 0 for none.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

/// Opens containerd's ends. A terminal has no stderr.
pub(crate) async fn open(stdio: &Stdio, identity: LogIdentity<'_>) -> Result<Ends, Error> {
    let stdin = match stdio.stdin.as_str() {
        "" => None,
        uri => Some(find_stdin(uri).map_err(|source| stream_error(uri, source))?),
    };
    let stderr_uri = if stdio.terminal { "" } else { &stdio.stderr };
    let mut ends = Ends {
        stdin,
        ..Ends::default()
    };
    // As in runc's shim, stdout decides what becomes of both.
    match Output::parse(&stdio.stdout)? {
        Output::Binary { path, arguments } => {
            let (child, stdout, stderr) = start_logger(&path, &arguments, identity)
                .await
                .map_err(|source| Error::Logger { path, source })?;
            ends.stdout = Some(Sink::Pipe(stdout));
            ends.stderr = (!stdio.terminal).then_some(Sink::Pipe(stderr));
            ends.logger = Some(child);
        }
        Output::File(path) => {
            let open =
                || open_log_file(&path).map_err(|source| stream_error(&stdio.stdout, source));
            ends.stdout = Some(open()?);
            if !stdio.terminal {
                ends.stderr = Some(open()?);
            }
        }
        Output::Path(path) => {
            ends.stdout = open_path(&path, &stdio.stdout)?;
            if let Output::Path(path) = Output::parse(stderr_uri)? {
                ends.stderr = open_path(&path, stderr_uri)?;
            } else {
                return Err(Error::UnknownScheme {
                    scheme: "stderr other than stdout's".to_owned(),
                    uri: stderr_uri.to_owned(),
                });
            }
        }
    }
    Ok(ends)
}

impl Ends {
    /// Opens the connections to the guest and starts to copy.
    pub(crate) async fn connect(self, vm: &Vm) -> Result<(Streams, Ports), Error> {
        let connect = async |wanted: bool| match wanted {
            true => vm.connect(STREAM_PORT).await.map(Some),
            false => Ok(None),
        };
        let (stdin, stdout, stderr) = tokio::try_join!(
            connect(self.stdin.is_some()),
            connect(self.stdout.is_some()),
            connect(self.stderr.is_some())
        )?;
        Ok(self.copy(stdin, stdout, stderr))
    }

    fn copy(
        self,
        stdin: Option<(u32, UnixStream)>,
        stdout: Option<(u32, UnixStream)>,
        stderr: Option<(u32, UnixStream)>,
    ) -> (Streams, Ports) {
        let mut streams = Streams::default();
        streams.logger = self.logger;
        let mut ports = Ports::default();
        if let (Some(fifo), Some((port, guest))) = (self.stdin, stdin) {
            ports.stdin = port;
            streams.stdin = Mutex::new(Stdin::Waiting {
                fifo,
                guest,
                closed: false,
            });
        }
        if let (Some(sink), Some((port, guest))) = (self.stdout, stdout) {
            ports.stdout = port;
            streams.outputs.push(tokio::spawn(copy_output(guest, sink)));
        }
        if let (Some(sink), Some((port, guest))) = (self.stderr, stderr) {
            ports.stderr = port;
            streams.outputs.push(tokio::spawn(copy_output(guest, sink)));
        }
        (streams, ports)
    }
}

impl Streams {
    /// Begins to copy stdin: to be called when the process starts. May be called more than once.
    pub(crate) fn open_stdin(&self) {
        let mut stdin = self.stdin();
        let (fifo, guest, closed) = match std::mem::take(&mut *stdin) {
            Stdin::Waiting {
                fifo,
                guest,
                closed,
            } => (fifo, guest, closed),
            other => {
                *stdin = other;
                return;
            }
        };
        match open_fifo(&fifo) {
            Ok((reader, writer)) => {
                *stdin = Stdin::Copying {
                    copy: tokio::spawn(copy_input(reader, guest)),
                    writer: (!closed).then_some(writer),
                };
            }
            // It was there when the process was created. Without it, the input is at its end.
            Err(err) => warn!("cannot open standard stream {}: {err}", fifo.display()),
        }
    }

    /// Gives up the shim's own writer of the stdin fifo: once its other writers are gone too and it is empty, the
    /// process reads the end of its input. May be called more than once.
    pub(crate) fn close_stdin(&self) {
        match &mut *self.stdin() {
            Stdin::None => {}
            Stdin::Waiting { closed, .. } => *closed = true,
            Stdin::Copying { writer, .. } => drop(writer.take()),
        }
    }

    fn stdin(&self) -> MutexGuard<'_, Stdin> {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all output of an ended process has been handed over, but no longer than `limit`: a process that it
    /// left behind may hold its outputs open, and a fifo may have no reader.
    pub(crate) async fn drain(mut self, limit: Duration) {
        let copied = async {
            for output in &mut self.outputs {
                // A copy does not panic, and is aborted nowhere else.
                let _ = output.await;
            }
        };
        if tokio::time::timeout(limit, copied).await.is_err() {
            warn!("output of an ended process is not read to its end");
        }
        for output in &self.outputs {
            output.abort();
        }
        if let Some(mut logger) = self.logger.take() {
            end_logger(&mut logger).await;
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if let Stdin::Copying { copy, .. } = &*self.stdin() {
            copy.abort();
        }
        for copy in &self.outputs {
            copy.abort();
        }
    }
}

fn stream_error(uri: &str, source: io::Error) -> Error {
    Error::OpenStream {
        uri: uri.to_owned(),
        source,
    }
}

/// The fifo that `uri` names, if it is one.
fn find_stdin(uri: &str) -> io::Result<PathBuf> {
    let path = Path::new(uri.strip_prefix("fifo://").unwrap_or(uri));
    if !std::fs::metadata(path)?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a pipe"));
    }
    Ok(path.to_owned())
}

fn open_fifo(path: &Path) -> io::Result<(pipe::Receiver, OwnedFd)> {
    // Non-blocking on both ends: neither open waits for the other.
    let reader = pipe::OpenOptions::new().open_receiver(path)?;
    let writer = File::options()
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    Ok((reader, writer.into()))
}

fn open_path(path: &Path, uri: &str) -> Result<Option<Sink>, Error> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let open = || -> io::Result<Sink> {
        if std::fs::metadata(path)?.file_type().is_fifo() {
            return pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(path)
                .map(Sink::Pipe);
        }
        let file = File::options().append(true).open(path)?;
        Ok(Sink::File(file.into()))
    };
    open().map(Some).map_err(|source| stream_error(uri, source))
}

fn open_log_file(path: &Path) -> io::Result<Sink> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o644)
        .open(path)?;
    Ok(Sink::File(file.into()))
}

/// Runs a logging program: descriptor 3 is the container's stdout, 4 its stderr, and it closes 5 (or writes to it)
/// once it is ready (containerd, `runtime/v2/logging`).
async fn start_logger(
    path: &Path,
    arguments: &[String],
    identity: LogIdentity<'_>,
) -> io::Result<(Child, pipe::Sender, pipe::Sender)> {
    let (stdout, child_stdout) = logger_pipe()?;
    let (stderr, child_stderr) = logger_pipe()?;
    let (ready, mut readiness) = pipe::pipe()?;
    let child = {
        let fds = [child_stdout, child_stderr, ready.into_blocking_fd()?];
        let mappings = fds
            .into_iter()
            .zip(3..)
            .map(|(parent_fd, child_fd)| FdMapping {
                parent_fd,
                child_fd,
            })
            .collect();
        let mut command = Command::new(path);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", identity.id)
            .env("CONTAINER_NAMESPACE", identity.namespace)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .fd_mappings(mappings)
            .expect("three different descriptors");
        command.spawn()?
    };
    // One byte or the end: both mean ready, as in containerd.
    match tokio::time::timeout(LOGGER_LIMIT, readiness.read(&mut [0])).await {
        Ok(read) => drop(read?),
        Err(_) => {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("not ready after {} s", LOGGER_LIMIT.as_secs()),
            ));
        }
    }
    Ok((child, stdout, stderr))
}

fn logger_pipe() -> io::Result<(pipe::Sender, OwnedFd)> {
    let (sender, receiver) = pipe::pipe()?;
    Ok((sender, receiver.into_blocking_fd()?))
}

async fn end_logger(logger: &mut Child) {
    if tokio::time::timeout(LOGGER_LIMIT, logger.wait())
        .await
        .is_err()
    {
        warn!("a logging program goes on after the end of its input; it is killed");
        if let Err(err) = logger.kill().await {
            warn!("cannot kill a logging program: {err}");
        }
    }
}

async fn copy_input(mut from: pipe::Receiver, mut to: UnixStream) {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => {
                if let Err(err) = to.write_all(buffer.get(..count).unwrap_or_default()).await {
                    debug!("stdin is not read any more: {err}");
                    // The process has closed its stdin, or has ended. The fifo keeps its reader until the streams go:
                    // without one, a client that still writes would end by SIGPIPE and lose what the process says.
                    return std::future::pending().await;
                }
            }
            Err(err) => {
                warn!("cannot read a stdin fifo: {err}");
                break;
            }
        }
    }
    if let Err(err) = to.shutdown().await {
        debug!("stdin was closed before its end: {err}");
    }
}

async fn copy_output(mut from: UnixStream, mut to: Sink) {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return,
            Ok(count) => {
                if let Err(err) = to.write_all(buffer.get(..count).unwrap_or_default()).await {
                    // Closing the connection makes the process's next write fail, as on a pipe.
                    warn!("output has nowhere to go any more: {err}");
                    return;
                }
            }
            Err(err) => {
                debug!("an output of the guest broke: {err}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    const IDENTITY: LogIdentity<'static> = LogIdentity {
        namespace: "default",
        id: "x",
    };

    struct Fifos {
        dir: tempfile::TempDir,
    }

    impl Fifos {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["stdin", "stdout", "stderr"] {
                mkfifo(&dir.path().join(name), Mode::S_IRWXU).unwrap();
            }
            Self { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn uri(&self, name: &str) -> String {
            self.path(name).to_str().unwrap().to_owned()
        }

        fn stdio(&self) -> Stdio {
            Stdio {
                terminal: false,
                stdin: self.uri("stdin"),
                stdout: self.uri("stdout"),
                stderr: self.uri("stderr"),
            }
        }
    }

    /// Streams of a started process, whose guest is the other ends of socket pairs.
    fn connected(ends: Ends) -> (Streams, [Option<UnixStream>; 3]) {
        let (streams, guest) = waiting(ends);
        streams.open_stdin();
        (streams, guest)
    }

    /// The same, before the start.
    fn waiting(ends: Ends) -> (Streams, [Option<UnixStream>; 3]) {
        let pair = |wanted: bool, port: u32| {
            let (host, guest) = wanted.then(|| UnixStream::pair().unwrap()).unzip();
            (host.map(|host| (port, host)), guest)
        };
        let (stdin, guest_stdin) = pair(ends.stdin.is_some(), 1);
        let (stdout, guest_stdout) = pair(ends.stdout.is_some(), 2);
        let (stderr, guest_stderr) = pair(ends.stderr.is_some(), 3);
        let (streams, ports) = ends.copy(stdin, stdout, stderr);
        let port = |guest: &Option<UnixStream>, port| guest.as_ref().map_or(0, |_| port);
        assert_eq!(ports.stdin, port(&guest_stdin, 1));
        assert_eq!(ports.stdout, port(&guest_stdout, 2));
        assert_eq!(ports.stderr, port(&guest_stderr, 3));
        (streams, [guest_stdin, guest_stdout, guest_stderr])
    }

    /// Is a reader from now on: what nobody reads before the process ends is lost. To be called while the shim has its end.
    fn read_all(path: PathBuf) -> JoinHandle<Vec<u8>> {
        let mut file = File::open(path).unwrap();
        tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    #[test]
    fn uris_are_understood() {
        assert_eq!(
            Output::parse("/run/f").unwrap(),
            Output::Path("/run/f".into())
        );
        assert_eq!(Output::parse("").unwrap(), Output::Path("".into()));
        assert_eq!(
            Output::parse("file:///var/log/a%20b").unwrap(),
            Output::File("/var/log/a b".into())
        );
        assert_eq!(
            Output::parse("binary:///usr/bin/logger?--tag=a%2Fb&-v").unwrap(),
            Output::Binary {
                path: "/usr/bin/logger".into(),
                arguments: vec!["--tag".into(), "a/b".into(), "-v".into()],
            }
        );
        assert!(matches!(
            Output::parse("npipe:////./pipe/x"),
            Err(Error::UnknownScheme { scheme, .. }) if scheme == "npipe"
        ));
    }

    #[tokio::test]
    async fn no_streams_need_no_connections() {
        let ends = open(&Stdio::default(), IDENTITY).await.unwrap();
        let (streams, guest) = connected(ends);
        assert!(guest.iter().all(Option::is_none));
        streams.drain(Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn missing_fifo_is_named() {
        let stdio = Stdio {
            stdout: "/absent/fifo".into(),
            ..Stdio::default()
        };
        let err = open(&stdio, IDENTITY).await.unwrap_err();
        assert!(err.chain().contains("/absent/fifo"), "{}", err.chain());
    }

    #[tokio::test]
    async fn output_waits_for_a_late_reader_and_ends_with_the_process() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [_, stdout, stderr]) = connected(ends);
        let (mut stdout, mut stderr) = (stdout.unwrap(), stderr.unwrap());
        stderr.write_all(b"warning").await.unwrap();
        let text = vec![b'x'; 1 << 20];
        let writer = tokio::spawn(async move {
            stdout.write_all(&text).await.unwrap();
        });
        let out = read_all(fifos.path("stdout"));
        let err = read_all(fifos.path("stderr"));
        writer.await.unwrap();
        drop(stderr);
        streams.drain(Duration::from_secs(10)).await;
        assert_eq!(out.await.unwrap().len(), 1 << 20);
        assert_eq!(err.await.unwrap(), b"warning");
    }

    #[tokio::test]
    async fn output_survives_a_reader_that_goes() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [_, stdout, _]) = connected(ends);
        let mut stdout = stdout.unwrap();
        let mut first = File::open(fifos.path("stdout")).unwrap();
        stdout.write_all(b"one").await.unwrap();
        let first = tokio::task::spawn_blocking(move || {
            let mut bytes = [0; 3];
            first.read_exact(&mut bytes).unwrap();
            bytes
        });
        assert_eq!(&first.await.unwrap(), b"one");
        stdout.write_all(b"two").await.unwrap();
        // Open before the end: what a fifo holds is gone with its last descriptor.
        let mut second = File::open(fifos.path("stdout")).unwrap();
        drop(stdout);
        let second = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            second.read_to_end(&mut bytes).unwrap();
            bytes
        });
        assert_eq!(second.await.unwrap(), b"two");
        drop(streams);
    }

    #[tokio::test]
    async fn drain_gives_up_on_a_fifo_that_nobody_reads() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [_, stdout, _]) = connected(ends);
        let mut stdout = stdout.unwrap();
        stdout.write_all(&vec![b'x'; 80 * 1024]).await.unwrap();
        drop(stdout);
        tokio::time::timeout(
            Duration::from_secs(10),
            streams.drain(Duration::from_millis(50)),
        )
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn stdin_ends_after_close_when_the_client_is_gone_and_all_is_read() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [stdin, _, _]) = connected(ends);
        let mut stdin = stdin.unwrap();
        let mut client = File::options()
            .write(true)
            .open(fifos.path("stdin"))
            .unwrap();
        client.write_all(b"hello").unwrap();
        streams.close_stdin();
        streams.close_stdin();
        client.write_all(b" world").unwrap();
        drop(client);
        let mut text = String::new();
        stdin.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello world");
    }

    #[tokio::test]
    async fn stdin_is_not_taken_before_the_start_and_a_close_until_then_counts() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [stdin, _, _]) = waiting(ends);
        let no_reader = File::options()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(fifos.path("stdin"))
            .unwrap_err();
        assert_eq!(no_reader.raw_os_error(), Some(6));
        streams.close_stdin();
        streams.open_stdin();
        streams.open_stdin();
        assert_eq!(stdin.unwrap().read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn client_may_go_on_writing_when_the_process_reads_no_more() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [stdin, _, _]) = connected(ends);
        drop(stdin);
        let mut client = File::options()
            .write(true)
            .open(fifos.path("stdin"))
            .unwrap();
        // Each turn gives the copy, which the first bytes make fail, the time to let go of the fifo.
        for _ in 0..1000 {
            client.write_all(b"x").unwrap();
            tokio::task::yield_now().await;
        }
        drop(streams);
    }

    #[tokio::test]
    async fn stdin_that_is_no_fifo_is_refused() {
        let stdio = Stdio {
            stdin: "/dev/null".into(),
            ..Stdio::default()
        };
        let err = open(&stdio, IDENTITY).await.unwrap_err();
        assert!(err.chain().contains("/dev/null"), "{}", err.chain());
    }

    #[tokio::test]
    async fn client_that_detaches_does_not_end_stdin() {
        let fifos = Fifos::new();
        let ends = open(&fifos.stdio(), IDENTITY).await.unwrap();
        let (streams, [stdin, _, _]) = connected(ends);
        let mut stdin = stdin.unwrap();
        for text in ["first", "second"] {
            let mut client = File::options()
                .write(true)
                .open(fifos.path("stdin"))
                .unwrap();
            client.write_all(text.as_bytes()).unwrap();
            drop(client);
            let mut bytes = vec![0; text.len()];
            stdin.read_exact(&mut bytes).await.unwrap();
            assert_eq!(bytes, text.as_bytes());
        }
        streams.close_stdin();
        assert_eq!(stdin.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn terminal_has_no_stderr() {
        let fifos = Fifos::new();
        let stdio = Stdio {
            terminal: true,
            ..fifos.stdio()
        };
        let ends = open(&stdio, IDENTITY).await.unwrap();
        let (_streams, [stdin, stdout, stderr]) = connected(ends);
        assert!(stdin.is_some() && stdout.is_some() && stderr.is_none());
    }

    #[tokio::test]
    async fn file_takes_both_outputs_and_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/container.log");
        for round in 0..2 {
            let stdio = Stdio {
                stdout: format!("file://{}", path.display()),
                ..Stdio::default()
            };
            let ends = open(&stdio, IDENTITY).await.unwrap();
            let (streams, [_, stdout, stderr]) = connected(ends);
            let (mut stdout, mut stderr) = (stdout.unwrap(), stderr.unwrap());
            stdout.write_all(b"out").await.unwrap();
            stderr.write_all(b"err").await.unwrap();
            drop((stdout, stderr));
            streams.drain(Duration::from_secs(10)).await;
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text.matches("out").count(), round + 1, "{text}");
            assert_eq!(text.matches("err").count(), round + 1, "{text}");
        }
    }

    #[tokio::test]
    async fn logging_program_gets_both_outputs_and_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let (script, out) = (dir.path().join("logger"), dir.path().join("out"));
        std::fs::write(
            &script,
            "#!/bin/sh\nexec 5>&-\necho \"$1 $2 $CONTAINER_NAMESPACE/$CONTAINER_ID\" > \"$2\"\ncat <&3 >> \"$2\"\ncat <&4 >> \"$2\"\n",
        )
        .unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let stdio = Stdio {
            stdout: format!("binary://{}?to={}", script.display(), out.display()),
            ..Stdio::default()
        };
        let ends = open(&stdio, IDENTITY).await.unwrap();
        let (streams, [_, stdout, stderr]) = connected(ends);
        let (mut stdout, mut stderr) = (stdout.unwrap(), stderr.unwrap());
        stdout.write_all(b"out\n").await.unwrap();
        stderr.write_all(b"err\n").await.unwrap();
        drop((stdout, stderr));
        streams.drain(Duration::from_secs(10)).await;
        let text = std::fs::read_to_string(&out).unwrap();
        assert_eq!(text, format!("to {} default/x\nout\nerr\n", out.display()));
    }

    #[tokio::test]
    async fn missing_logging_program_is_named() {
        let stdio = Stdio {
            stdout: "binary:///absent/logger".into(),
            ..Stdio::default()
        };
        let err = open(&stdio, IDENTITY).await.unwrap_err();
        assert!(err.chain().contains("/absent/logger"), "{}", err.chain());
    }
}
