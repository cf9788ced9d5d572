//! The terminal of a process: its master side, which libcontainer sends over a console socket (runc's protocol: one
//! message that carries the descriptor), its size, and reading and writing it without blocking.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixListener;

use crate::error::{During, Error, Result};

/// Columns and rows, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    columns: u16,
    rows: u16,
}

impl Size {
    /// Of two numbers of a request; a terminal cannot be larger than 65,535.
    pub(crate) fn new(columns: u32, rows: u32) -> Result<Self> {
        match (u16::try_from(columns), u16::try_from(rows)) {
            (Ok(columns), Ok(rows)) => Ok(Self { columns, rows }),
            _ => Err(Error::Invalid(format!(
                "a terminal cannot have {columns} columns and {rows} rows"
            ))),
        }
    }

    /// Whether the request set a size at all.
    pub(crate) fn is_set(self) -> bool {
        self.columns != 0 || self.rows != 0
    }
}

/// Where the process that builds a container hands over the terminal.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// `path` must be short enough for a socket's address, and not exist.
    pub(crate) fn bind(path: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(&path).during("making a console socket")?;
        Ok(Self { listener, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the terminal, and gives its other side to `uid`, as a login would.
    pub(crate) async fn receive(&self, uid: u32) -> Result<Arc<Terminal>> {
        let receive = async || {
            let (stream, _) = self.listener.accept().await?;
            let master = stream
                .async_io(Interest::READABLE, || {
                    receive_descriptor(stream.as_raw_fd())
                })
                .await?;
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
            rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)?;
            Terminal::new(master)
        };
        receive().await.during("receiving the terminal")
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a console socket stays");
        }
    }
}

fn receive_descriptor(socket: i32) -> io::Result<OwnedFd> {
    // The text of the message is the name of the terminal, which nobody needs.
    let mut name = [0; 4096];
    let mut control = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<UnixAddr>(
        socket,
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let descriptor = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    let descriptor =
        descriptor.ok_or_else(|| io::Error::other("the message carries no descriptor"))?;
    // SAFETY: the kernel has just made this descriptor for us, and there is room for no other in `control`.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The master side of a pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: AsyncFd<OwnedFd>,
}

impl Terminal {
    fn new(master: OwnedFd) -> io::Result<Arc<Self>> {
        rustix::io::ioctl_fionbio(&master, true)?;
        // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and the `AsyncFd` owns it.
        let master = unsafe { AsyncFd::register(master) }?;
        Ok(Arc::new(Self { master }))
    }

    /// Tells the processes of the terminal (SIGWINCH) its new size.
    pub(crate) fn resize(&self, size: Size) -> Result<()> {
        let size = Winsize {
            ws_col: size.columns,
            ws_row: size.rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(self.master.as_fd(), size).during("resizing the terminal")
    }

    /// What the processes write.
    pub(crate) fn reader(self: &Arc<Self>) -> TerminalReader {
        TerminalReader(Arc::clone(self))
    }

    /// What is typed.
    pub(crate) fn writer(self: &Arc<Self>) -> TerminalWriter {
        TerminalWriter(Arc::clone(self))
    }
}

/// Reads a terminal; ends when the last process has closed it.
#[derive(Debug)]
pub(crate) struct TerminalReader(Arc<Terminal>);

/// Writes to a terminal.
#[derive(Debug)]
pub(crate) struct TerminalWriter(Arc<Terminal>);

impl AsyncRead for TerminalReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.master.poll_read_ready(cx))?;
            let read =
                guard.try_io(|master| Ok(rustix::io::read(master, buffer.initialize_unfilled())?));
            match read {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                // How Linux says that nobody has the other side open.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for TerminalWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.master.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|master| Ok(rustix::io::write(master, data)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tokio::io::AsyncReadExt;

    use super::*;

    fn pair() -> (Arc<Terminal>, std::fs::File) {
        let master =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        rustix::pty::grantpt(&master).expect("ours");
        rustix::pty::unlockpt(&master).expect("ours");
        let slave =
            rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY)
                .expect("its other side");
        (Terminal::new(master).expect("a runtime"), slave.into())
    }

    #[tokio::test]
    async fn output_ends_when_the_last_process_closes_the_terminal() {
        let (terminal, mut slave) = pair();
        slave.write_all(b"bye").expect("there is room");
        drop(slave);
        let mut text = String::new();
        terminal
            .reader()
            .read_to_string(&mut text)
            .await
            .expect("it ends");
        assert_eq!(text, "bye");
    }

    #[tokio::test]
    async fn size_is_seen_on_the_other_side() {
        let (terminal, slave) = pair();
        let size = Size::new(132, 43).expect("a fair size");
        terminal.resize(size).expect("a terminal");
        let seen = rustix::termios::tcgetwinsize(&slave).expect("a terminal");
        assert_eq!((seen.ws_col, seen.ws_row), (132, 43));
    }

    #[test]
    fn size_beyond_16_bits_is_refused() {
        assert!(Size::new(65_536, 1).is_err());
    }
}
