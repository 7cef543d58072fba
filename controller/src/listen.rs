//! Ports to listen on.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket};

/// Connections that may wait to be accepted. A whole fleet reconnects at the same time after a restart, and a client
/// that finds the queue full retries only a second later. `net.core.somaxconn` (4096) limits this number as well.
const BACKLOG: u32 = 4096;

/// Listens on the address; `what` names the service in errors.
pub(crate) fn listen(address: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Without it a restart fails while connections of the last run are in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().with_context(|| {
        format!(
            "cannot listen on {address} for {what}; is another controller running? choose another address with a flag"
        )
    })
}

/// Listens on the address. If `asked_for` is false, a taken address is a warning and not an error.
pub(crate) fn listen_if_free(address: SocketAddr, asked_for: bool, what: &str) -> anyhow::Result<Option<TcpListener>> {
    match listen(address, what) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if asked_for => Err(error),
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "this controller runs without {what}");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::time::Duration;

    /// More than 128, the backlog of a listener that sets none.
    const CROWD: usize = 300;

    #[tokio::test]
    async fn a_crowd_waits_at_the_door_though_nobody_opens() {
        let listener = super::listen("127.0.0.1:0".parse().unwrap(), "a test").unwrap();
        let address = listener.local_addr().unwrap();
        let connect = |_| TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap();
        assert_eq!((0..CROWD).map(connect).collect::<Vec<_>>().len(), CROWD);
    }
}
