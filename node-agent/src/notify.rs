//! Reports the state of the service to systemd (sd_notify(3)): one datagram to the socket that systemd names.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// State of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The service is up.
    Ready,
    /// The service is going down.
    Stopping,
}

/// Reports to systemd. Does nothing without `NOTIFY_SOCKET`.
pub fn notify(status: Status) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    // Best effort: the agent works without systemd too.
    if let Err(error) = send(&socket, status) {
        tracing::warn!(error = %error, "systemd could not be notified");
    }
}

fn send(socket: &OsStr, status: Status) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let text: &[u8] = match status {
        Status::Ready => b"READY=1",
        Status::Stopping => b"STOPPING=1",
    };
    UnixDatagram::unbound()?.send_to_addr(text, &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::{Status, send};

    #[test]
    fn systemd_is_told_over_the_socket_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), Status::Ready).unwrap();
        let mut buffer = [0; 16];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
    }
}
