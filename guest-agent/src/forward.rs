//! Port forwarding: connections of the host to a port of the pod's loopback interface. Each begins with the number of the
//! port, 16 bits in network byte order. The agent answers [`FORWARD_CONNECTED`] when it has connected, after which both
//! sides are the connection's; where nobody listens, it hangs up.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use husk_protocol::FORWARD_CONNECTED;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio_vsock::VsockListener;

use crate::streams::{Connection, accept};

/// Serves for as long as the agent lives.
pub(crate) async fn serve(listener: VsockListener) {
    loop {
        let (host, _) = accept(&listener).await;
        tokio::spawn(async move {
            if let Err(error) = forward(host).await {
                tracing::debug!(%error, "a forwarded connection ended");
            }
        });
    }
}

async fn forward(mut host: impl Connection) -> io::Result<()> {
    let port = host.read_u16().await?;
    // A server may listen on either.
    let mut server = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(server) => server,
        Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
            .await
            .map_err(|_| error)?,
    };
    host.write_u8(FORWARD_CONNECTED).await?;
    copy_bidirectional(&mut host, &mut server).await.map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::net::TcpListener;

    use super::*;

    /// What the host sees of a connection to `port`.
    async fn connect(port: u16) -> DuplexStream {
        let (mut ours, theirs) = duplex(1 << 16);
        ours.write_u16(port).await.expect("there is room");
        tokio::spawn(forward(theirs));
        ours
    }

    /// Answers with what it has read once the client has ended.
    async fn echo_once(listener: TcpListener) {
        let (mut client, _) = listener.accept().await.expect("a client");
        let mut text = Vec::new();
        client.read_to_end(&mut text).await.expect("it ends");
        client.write_all(&text).await.expect("it still reads");
    }

    #[tokio::test]
    async fn bytes_and_half_closes_pass_on_either_address() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                eprintln!("skipped: no {address} here");
                continue;
            };
            let port = listener.local_addr().expect("it is bound").port();
            tokio::spawn(echo_once(listener));
            let mut host = connect(port).await;
            assert_eq!(host.read_u8().await.expect("an answer"), FORWARD_CONNECTED);
            host.write_all(b"hello").await.expect("there is room");
            host.shutdown().await.expect("it was open");
            let mut text = String::new();
            host.read_to_string(&mut text).await.expect("it ends");
            assert_eq!(text, "hello", "{address}");
        }
    }

    #[tokio::test]
    async fn where_nobody_listens_nothing_is_said() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        drop(listener);
        let mut rest = Vec::new();
        let mut host = connect(port).await;
        host.read_to_end(&mut rest).await.expect("it ends");
        assert!(rest.is_empty());
    }
}
