//! A network namespace, and what can only be done inside of it. A socket or a tap belongs for ever to the namespace in
//! which it was opened, whoever uses it: so a thread enters the namespace, opens it, and ends. The shim's own thread
//! never leaves the host's namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::channel::mpsc::UnboundedReceiver;
use nix::sched::{CloneFlags, setns};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::error::NetworkError;

/// The namespace that this process is in.
const OWN: &str = "/proc/self/ns/net";

/// What the kernel tells unasked.
pub(super) type News = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// An open network namespace. It exists as long as this does. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Namespace {
    path: PathBuf,
    file: Arc<File>,
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Namespace {
    pub(crate) fn open(path: &Path) -> Result<Self, NetworkError> {
        Ok(Self {
            file: File::open(path).map_err(NetworkError::Open)?.into(),
            path: path.to_owned(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the one that this process, and with it the host, is in.
    pub(crate) fn is_own(&self) -> Result<bool, NetworkError> {
        let identity = |file: &File| {
            let metadata = file.metadata()?;
            io::Result::Ok((metadata.dev(), metadata.ino()))
        };
        let own = File::open(OWN).and_then(|file| identity(&file));
        let this = identity(&self.file);
        Ok(own.map_err(NetworkError::Open)? == this.map_err(NetworkError::Open)?)
    }

    /// Runs `work` inside, on a thread of its own, with the caller's runtime at hand.
    pub(crate) async fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        let namespace = self.file.clone();
        let runtime = Handle::current();
        let (sender, answer) = oneshot::channel();
        std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(move || {
                let _runtime = runtime.enter();
                let result = setns(&namespace, CloneFlags::CLONE_NEWNET).map(|()| work());
                // Whoever asked may have given up.
                drop(sender.send(result));
            })
            .map_err(NetworkError::Enter)?;
        answer
            .await
            .expect("the thread answers before it ends")
            .map_err(|errno| NetworkError::Enter(errno.into()))
    }

    /// Opens a netlink socket inside. It closes when the last handle is dropped.
    pub(crate) async fn connect(&self) -> Result<rtnetlink::Handle, NetworkError> {
        self.subscribe(&[]).await.map(|(netlink, _)| netlink)
    }

    /// Opens one that hears of every change of these kinds from now on.
    pub(super) async fn subscribe(
        &self,
        groups: &'static [MulticastGroup],
    ) -> Result<(rtnetlink::Handle, News), NetworkError> {
        let (connection, netlink, news) = self
            .inside(|| rtnetlink::new_multicast_connection(groups))
            .await?
            .map_err(NetworkError::Enter)?;
        tokio::spawn(connection);
        Ok((netlink, news))
    }
}
