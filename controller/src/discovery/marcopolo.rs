//! Answers the MarcoPolo protocol of the 2015 system: JSON in datagrams on two multicast groups. An answer carries no
//! port: the client uses the source address, and the file mirror's usual port.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::DefaultClock;
use governor::state::keyed::HashMapStateStore;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use if_addrs::IfAddr;
use serde_json::{Value, json};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

/// UDP port of the protocol.
const PORT: u16 = 1337;
/// Multicast groups. Clients ask the first, and the second if the first gives no answer.
const GROUPS: [Ipv4Addr; 2] = [Ipv4Addr::new(224, 0, 0, 112), Ipv4Addr::new(224, 0, 0, 113)];
/// The service that installers ask for.
const SERVICE: &str = "marcobootstrap";
/// Largest question in bytes. A real one has 60.
const LONGEST: usize = 1024;
/// Interval at which network interfaces are listed: they come and go.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Answers to one address, per second and at once. An installer asks three times.
const EACH: (u32, u32) = (5, 20);
/// Answers to all addresses per second: a room full of Pis starts at once.
const ALL: u32 = 1000;
/// Remembered addresses. More of them at once are forged.
const MOST_ASKERS: usize = 4096;

/// The reason why nothing is answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("cannot listen on UDP {PORT}")]
    Listen(#[source] io::Error),
    #[error("MarcoPolo speaks IPv4, and the API listens on an address of IPv6 only")]
    NoIpv4,
}

/// Answers until `stop`.
///
/// # Errors
/// Returns an error if the port cannot be opened.
pub(super) async fn answer(listen: IpAddr, name: &str, stop: &CancellationToken) -> Result<(), AnswerError> {
    if matches!(listen, IpAddr::V6(ip) if !ip.is_unspecified()) {
        return Err(AnswerError::NoIpv4);
    }
    let [first, second] = GROUPS;
    let mut first = Group::open(first).map_err(AnswerError::Listen)?;
    let mut second = Group::open(second).map_err(AnswerError::Listen)?;
    let limits = Limits::default();
    let mut looks = tokio::time::interval(LOOK_AGAIN);
    let (mut one, mut other) = ([0; LONGEST + 1], [0; LONGEST + 1]);
    loop {
        // Receiving a datagram is all or nothing, so dropping the other arms loses none.
        let (group, received) = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = looks.tick() => {
                first.join(listen);
                second.join(listen);
                continue;
            }
            received = first.socket.recv_from(&mut one) => (&first, received.map(|(length, from)| (one.get(..length), from))),
            received = second.socket.recv_from(&mut other) => (&second, received.map(|(length, from)| (other.get(..length), from))),
        };
        match received {
            Ok((question, from)) => {
                let Some(answer) = question.filter(|question| question.len() <= LONGEST).and_then(|q| reply(q, name))
                else {
                    continue;
                };
                if limits.allow(from.ip())
                    && let Err(error) = group.socket.send_to(&answer, from).await
                {
                    tracing::debug!(%from, %error, "a MarcoPolo answer was not sent");
                }
            }
            // The error belongs to an earlier answer, whose client is gone. The pause keeps a lasting error from
            // becoming a busy loop.
            Err(error) => {
                tracing::debug!(%error, "MarcoPolo");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// The answer to a datagram; `None`: it is no question for this service.
fn reply(question: &[u8], name: &str) -> Option<Vec<u8>> {
    let question: Value = serde_json::from_slice(question).ok()?;
    let answer = match question.get("Command")?.as_str()? {
        "Request-For" | "Request-for" if question.get("Params")?.as_str()? == SERVICE => {
            json!({"Command": "OK", "Params": {}})
        }
        "Marco" | "Discover" => json!({"Command": "Polo", "Params": {"hostname": name}}),
        _ => return None,
    };
    serde_json::to_vec(&answer).ok()
}

/// One multicast group.
struct Group {
    socket: UdpSocket,
    address: Ipv4Addr,
    /// Indices of the interfaces on which the group is joined.
    joined: BTreeSet<u32>,
}

impl Group {
    /// Binds to the group's own address, so that nothing else comes in. Other programs of this machine can listen too.
    fn open(address: Ipv4Addr) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_address(true)?;
        // Without it a socket receives every group that any program of this machine has joined on any interface.
        socket.set_multicast_all_v4(false)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::V4(SocketAddrV4::new(address, PORT)).into())?;
        Ok(Self { socket: UdpSocket::from_std(socket.into())?, address, joined: BTreeSet::new() })
    }

    /// Joins the group on interfaces that are new, where the API can be reached.
    fn join(&mut self, listen: IpAddr) {
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
        let reachable = |ip: Ipv4Addr| listen.is_unspecified() || listen == IpAddr::V4(ip);
        let present: BTreeSet<u32> = interfaces
            .iter()
            .filter(|interface| interface.is_oper_up())
            .filter(|interface| matches!(&interface.addr, IfAddr::V4(v4) if reachable(v4.ip)))
            .filter_map(|interface| interface.index)
            .collect();
        // The kernel left the group on an interface that went away.
        self.joined.retain(|index| present.contains(index));
        for index in present {
            if self.joined.contains(&index) {
                continue;
            }
            let on = InterfaceIndexOrAddress::Index(index);
            match socket2::SockRef::from(&self.socket).join_multicast_v4_n(&self.address, &on) {
                Ok(()) => {
                    self.joined.insert(index);
                }
                // The interface was down for a moment, and is still a member.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    self.joined.insert(index);
                }
                Err(error) => tracing::debug!(index, group = %self.address, %error, "no multicast on an interface"),
            }
        }
    }
}

/// Limits of answers. A datagram's sender is easily forged, so answers could be aimed at others.
struct Limits {
    each: RateLimiter<IpAddr, HashMapStateStore<IpAddr>, DefaultClock>,
    all: DefaultDirectRateLimiter,
}

impl Default for Limits {
    fn default() -> Self {
        let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        let (rate, burst) = EACH;
        Self {
            each: RateLimiter::hashmap(Quota::per_second(number(rate)).allow_burst(number(burst))),
            all: RateLimiter::direct(Quota::per_second(number(ALL))),
        }
    }
}

impl Limits {
    fn allow(&self, asker: IpAddr) -> bool {
        if self.each.len() >= MOST_ASKERS {
            // Old addresses go first; if all are recent, only known ones would be answered, so none is.
            self.each.retain_recent();
            if self.each.len() >= MOST_ASKERS {
                return false;
            }
        }
        self.each.check_key(&asker).is_ok() && self.all.check().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::{ALL, EACH, Limits, MOST_ASKERS, reply};

    fn answer(question: &str) -> Option<String> {
        reply(question.as_bytes(), "lab").map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn questions_are_compared_as_values() {
        const OK: &str = r#"{"Command":"OK","Params":{}}"#;
        const POLO: &str = r#"{"Command":"Polo","Params":{"hostname":"lab"}}"#;
        for (question, expected) in [
            (r#"{"Command": "Request-For", "Params": "marcobootstrap"}"#, Some(OK)),
            (r#"{"Params":"marcobootstrap","Command":"Request-for"}"#, Some(OK)),
            ("{\n\"Command\":\"Request-\\u0046or\",\t\"Params\":\"marcobootstrap\"}\n", Some(OK)),
            (r#"{"Command": "Marco", "Params": {}}"#, Some(POLO)),
            (r#"{"Command": "Discover", "Params": {}}"#, Some(POLO)),
            (r#"{"Command":"Discover"}"#, Some(POLO)),
            (r#"{"Command":"Request-For","Params":"statusmonitor"}"#, None),
            (r#"{"Command":"Request-For","Params":{"marcobootstrap":1}}"#, None),
            (r#"{"Command":"Request-For"}"#, None),
            (r#"{"Command":"request-for","Params":"marcobootstrap"}"#, None),
            (r#"{"Command":"OK","Params":{}}"#, None),
            (r#"{"Command":"Polo","Params":{}}"#, None),
            (r#"{"Command":["Marco"]}"#, None),
            (r#""Marco""#, None),
            ("[]", None),
            ("", None),
            ("{\"Command\":\"Marco\"", None),
            ("{\"Command\":\"Marco\"} x", None),
            ("\u{0}\u{1}", None),
        ] {
            assert_eq!(answer(question).as_deref(), expected, "{question}");
        }
        assert_eq!(reply(b"{\"Command\":\"Marco\xff\"}", "lab"), None);
        assert_eq!(reply("[".repeat(1000).as_bytes(), "lab"), None);
    }

    #[test]
    fn an_asker_that_asks_too_often_is_not_answered() {
        let limits = Limits::default();
        let asker = |number: usize| IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap()));
        let answered = (0..1000).filter(|_| limits.allow(asker(1))).count();
        assert!((20..100).contains(&answered), "{answered} with a burst of {}", EACH.1);
        let answered = (0..MOST_ASKERS * 2).filter(|number| limits.allow(asker(*number + 10))).count();
        assert!((900..4000).contains(&answered), "{answered} with {ALL} a second");
        assert!(limits.each.len() <= MOST_ASKERS);
    }
}
