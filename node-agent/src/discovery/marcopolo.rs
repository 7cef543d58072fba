//! Asks by the MarcoPolo protocol of the 2015 system: a question in JSON to a multicast group. An answer has only the
//! sender's address, so the usual ports are assumed.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use if_addrs::IfAddr;
use marco_proto::names::{API_PORT, ENROLL_PORT};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::search::Found;

const PORT: u16 = 1337;
/// Multicast groups. The second one is asked if there is no answer in the first.
const GROUPS: [Ipv4Addr; 2] = [Ipv4Addr::new(224, 0, 0, 112), Ipv4Addr::new(224, 0, 0, 113)];
const QUESTION: &[u8] = br#"{"Command": "Request-For", "Params": "marcobootstrap"}"#;
/// Multicast TTL: the question may pass one router.
const HOPS: u32 = 2;
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(1);
/// Longest answer in bytes. A longer datagram is ignored.
const LONGEST: usize = 1024;

/// Asks three times, a second apart, in one group after the other, and passes on each answer. Unless `thorough`, it
/// ends with the first round that had an answer.
pub(super) async fn ask(answers: &mpsc::Sender<Found>, thorough: bool) -> io::Result<()> {
    let sockets = sockets()?;
    let answered = Arc::new(AtomicBool::new(false));
    // Dropping it ends the listeners.
    let mut ears = JoinSet::new();
    for socket in &sockets {
        ears.spawn(listen(Arc::clone(socket), answers.clone(), Arc::clone(&answered)));
    }
    for group in GROUPS {
        for _ in 0..ROUNDS {
            let mut sent = Err(io::ErrorKind::NotConnected.into());
            for socket in &sockets {
                // One interface may be going down while others work.
                sent = sent.or(socket.send_to(QUESTION, (group, PORT)).await.map(|_| ()));
            }
            sent?;
            tokio::time::sleep(ROUND).await;
            if answered.load(Ordering::Relaxed) && !thorough {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// One socket for each address of this machine: the question goes out on every interface, and the answers come back
/// there.
fn sockets() -> io::Result<Vec<Arc<UdpSocket>>> {
    let interfaces = if_addrs::get_if_addrs()?;
    let addresses: BTreeSet<Ipv4Addr> = interfaces
        .iter()
        .filter(|interface| interface.is_oper_up())
        .filter_map(|interface| match &interface.addr {
            IfAddr::V4(v4) => Some(v4.ip),
            IfAddr::V6(_) => None,
        })
        .collect();
    let mut sockets = Vec::new();
    let mut failed = io::Error::new(io::ErrorKind::NetworkDown, "no interface has an address of IPv4");
    for address in addresses {
        match open(address) {
            Ok(socket) => sockets.push(Arc::new(socket)),
            Err(error) => failed = error,
        }
    }
    if sockets.is_empty() { Err(failed) } else { Ok(sockets) }
}

fn open(address: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    // Otherwise the kernel would send every question out on the same interface.
    socket.set_multicast_if_v4(&address)?;
    socket.set_multicast_ttl_v4(HOPS)?;
    socket.set_nonblocking(true)?;
    // Any port: answers come back by unicast.
    socket.bind(&SocketAddr::V4(SocketAddrV4::new(address, 0)).into())?;
    UdpSocket::from_std(socket.into())
}

async fn listen(socket: Arc<UdpSocket>, answers: mpsc::Sender<Found>, answered: Arc<AtomicBool>) {
    let mut datagram = [0; LONGEST + 1];
    loop {
        let (length, from) = match socket.recv_from(&mut datagram).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "MarcoPolo");
                return;
            }
        };
        let IpAddr::V4(ip) = from.ip() else { continue };
        let is_answer = datagram.get(..length).is_some_and(|datagram| length <= LONGEST && is_yes(datagram));
        // A sender's address is easily forged, and these could not be dialled.
        if !is_answer || ip.is_unspecified() || ip.is_multicast() {
            continue;
        }
        answered.store(true, Ordering::Relaxed);
        let name = format!("marcopolo {ip}");
        let found = Found { addresses: vec![IpAddr::V4(ip)], api: API_PORT, enroll: ENROLL_PORT, ca: None, name };
        if answers.send(found).await.is_err() {
            return;
        }
    }
}

/// True if the answer says that the service is available.
fn is_yes(datagram: &[u8]) -> bool {
    let answer: Option<Value> = serde_json::from_slice(datagram).ok();
    answer.and_then(|answer| answer.get("Command")?.as_str().map(|word| word == "OK")).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::{QUESTION, is_yes};

    #[test]
    fn only_ok_is_an_answer() {
        assert!(is_yes(br#"{"Command":"OK","Params":{}}"#));
        assert!(is_yes(b" {\"Params\": null,\n\"Command\": \"OK\"}"));
        for other in [r#"{"Command":"Polo","Params":{}}"#, r#"{"Command":1}"#, r#""OK""#, "OK", "", "{", "[]"] {
            assert!(!is_yes(other.as_bytes()), "{other}");
        }
        // The agent's own question comes back on a machine that is a member of the group.
        assert!(!is_yes(QUESTION));
    }
}
