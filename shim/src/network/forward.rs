//! Port forwarding. CRI's PortForward is containerd's: it enters the pod's network namespace on the host and connects to
//! 127.0.0.1 there, where nobody listens, since the pod's programs are in the guest. So the shim listens there, for all
//! ports at once ([`super::steer`]), and relays each connection to the agent, which connects to the same port in the guest.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use husk_protocol::{FORWARD_CONNECTED, FORWARD_PORT};
use log::{debug, warn};
use rustix::net::sockopt::set_ip_freebind;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::error::NetworkError;
use super::namespace::Namespace;
use super::steer::steer;
use crate::error::{Error, chain};
use crate::vmm::Worker;

/// How long a connection waits that cannot be accepted now.
const RETRY: Duration = Duration::from_secs(1);

/// How many connections wait to be accepted at most.
const BACKLOG: u32 = 128;

/// A socket that listens on every port of a namespace's loopback addresses, as long as this exists.
#[derive(Debug)]
pub(crate) struct Forward {
    listener: TcpListener,
    _steering: OwnedFd,
}

impl Forward {
    /// Listens in `namespace` from now on: until [`Forward::serve`] is called, connections wait.
    pub(super) async fn listen(namespace: &Namespace) -> Result<Self, NetworkError> {
        let listener = namespace
            .inside(listen)
            .await?
            .map_err(NetworkError::Forward)?;
        let steering = steer(&listener, namespace.as_fd()).map_err(NetworkError::Forward)?;
        Ok(Self {
            listener,
            _steering: steering,
        })
    }

    /// Relays connections to the guest of `worker`, for ever.
    pub(crate) async fn serve(self, worker: Worker) {
        let mut relays = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = relays.join_next() => continue,
            };
            match accepted {
                Ok((client, _)) => {
                    relays.spawn(relay(client, worker.clone()));
                }
                // The client has gone meanwhile.
                Err(err) if err.kind() == io::ErrorKind::ConnectionAborted => {}
                // Most likely there are no descriptors left; a relay that ends gives some back. Nobody tells when something
                // else does.
                Err(err) => {
                    warn!("a connection to a port of the pod has to wait: {err}");
                    if relays.join_next().await.is_none() {
                        tokio::time::sleep(RETRY).await;
                    }
                }
            }
        }
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    // As long as the interface is down, the namespace has no such address.
    set_ip_freebind(&socket, true)?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    socket.listen(BACKLOG)
}

async fn relay(mut client: TcpStream, worker: Worker) {
    if let Err(err) = relay_to_guest(&mut client, &worker).await {
        debug!("a forwarded connection: {}", chain(&err));
        // It is reset rather than closed: that is how whoever connected learns that it was not the server who ended it.
        if let Err(err) = client.set_zero_linger() {
            debug!("a forwarded connection cannot be reset: {err}");
        }
    }
}

async fn relay_to_guest(client: &mut TcpStream, worker: &Worker) -> Result<(), Error> {
    // Its own address is the one that was connected to.
    let port = client.local_addr().map_err(Error::Forward)?.port();
    let (_, mut guest) = worker.connect_vsock(FORWARD_PORT).await?;
    let connected = async {
        guest.write_u16(port).await?;
        guest.read_u8().await
    };
    match connected.await {
        Ok(FORWARD_CONNECTED) => {}
        Ok(_) => return Err(Error::Forward(io::ErrorKind::InvalidData.into())),
        // The agent has nothing to say about a port that refuses.
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(Error::Forward(io::ErrorKind::ConnectionRefused.into()));
        }
        Err(err) => return Err(Error::Forward(err)),
    }
    copy_bidirectional(client, &mut guest)
        .await
        .map(drop)
        .map_err(Error::Forward)
}
