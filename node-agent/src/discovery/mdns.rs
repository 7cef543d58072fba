//! Asks for `_marco-bootstrap._tcp` (RFC 6762, RFC 6763).

use std::net::IpAddr;
use std::time::Duration;

use marco_proto::names::{API_PORT, ENROLL_PORT};
use mdns_sd::{ResolvedService, ServiceDaemon, ServiceEvent};
use tokio::sync::mpsc;

use super::search::{CaHint, Found};

const SERVICE: &str = "_marco-bootstrap._tcp.local.";
/// Version of the TXT record. An unknown one may mean anything, so its answer is ignored.
const VERSION: &str = "1";
/// Most addresses taken from one controller.
const MOST_ADDRESSES: usize = 8;

/// Ends its thread when dropped.
struct Daemon(ServiceDaemon);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.shutdown();
    }
}

/// Asks for this long, and passes on each answer.
pub(super) async fn ask(answers: &mpsc::Sender<Found>, window: Duration) -> Result<(), mdns_sd::Error> {
    let daemon = Daemon(ServiceDaemon::new()?);
    let events = daemon.0.browse(SERVICE)?;
    let listening = async {
        // The channel closes when the daemon's thread ends.
        while let Ok(event) = events.recv_async().await {
            if let ServiceEvent::ServiceResolved(service) = event
                && let Some(found) = found(&service)
                && answers.send(found).await.is_err()
            {
                return;
            }
        }
    };
    // Later answers are not waited for.
    let _ = tokio::time::timeout(window, listening).await;
    Ok(())
}

fn found(service: &ResolvedService) -> Option<Found> {
    let text = |key| service.get_property_val_str(key);
    if text("v").is_some_and(|version| version != VERSION) {
        return None;
    }
    // A link-local IPv6 address means nothing without its interface, which no file can name for another machine.
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast(),
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast() && !ip.is_unicast_link_local(),
    };
    let mut addresses: Vec<IpAddr> =
        service.get_addresses().iter().map(mdns_sd::ScopedIp::to_ip_addr).filter(usable).collect();
    // Loopback last: it works only if the controller runs on this machine.
    addresses.sort_by_key(|ip| (ip.is_loopback(), ip.is_ipv6(), *ip));
    addresses.dedup();
    addresses.truncate(MOST_ADDRESSES);
    if addresses.is_empty() {
        return None;
    }
    let port = |port: u16, usual| if port == 0 { usual } else { port };
    Some(Found {
        addresses,
        api: port(service.get_port(), API_PORT),
        enroll: port(text("enroll").and_then(|port| port.parse().ok()).unwrap_or_default(), ENROLL_PORT),
        ca: text("ca").and_then(CaHint::parse),
        name: service.get_fullname().to_ascii_lowercase(),
    })
}

#[cfg(test)]
mod tests {
    use mdns_sd::ServiceInfo;

    use super::{SERVICE, found};
    use crate::discovery::CaHint;

    fn resolved(addresses: &str, txt: &[(&str, &str)]) -> mdns_sd::ResolvedService {
        ServiceInfo::new(SERVICE, "Lab", "lab.local.", addresses, 7, txt).unwrap().as_resolved_service()
    }

    #[test]
    fn an_answer_gives_addresses_ports_and_the_hint() {
        let service =
            resolved("fe80::1,2001:db8::1,10.0.0.2", &[("v", "1"), ("enroll", "9"), ("ca", "00112233aabbccdd")]);
        let found = found(&service).unwrap();
        assert_eq!(found.apis().collect::<Vec<_>>(), ["10.0.0.2:7", "[2001:db8::1]:7"]);
        assert_eq!(found.listeners().collect::<Vec<_>>(), ["10.0.0.2:9", "[2001:db8::1]:9"]);
        assert_eq!(found.ca, CaHint::parse("00112233aabbccdd"));
    }

    #[test]
    fn what_an_answer_leaves_out_is_as_usual_and_what_makes_no_sense_is_left_out() {
        let found_of = |addresses, txt: &[_]| found(&resolved(addresses, txt));
        let plain = found_of("10.0.0.2", &[]).unwrap();
        assert_eq!((plain.enroll, plain.ca), (1347, None));
        let odd = found_of("10.0.0.2", &[("enroll", "many"), ("ca", "x")]).unwrap();
        assert_eq!((odd.enroll, odd.ca), (1347, None));
        assert_eq!(found_of("10.0.0.2", &[("v", "2")]), None);
        assert_eq!(found_of("fe80::1", &[("v", "1")]), None);
        assert_eq!(found_of("224.0.0.1,0.0.0.0", &[("v", "1")]), None);
    }
}
