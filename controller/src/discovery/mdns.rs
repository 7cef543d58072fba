//! Announces the controller as `_marco-bootstrap._tcp` (RFC 6762, RFC 6763).

use std::net::IpAddr;
use std::time::Duration;

use mdns_sd::{DaemonEvent, IfKind, ServiceDaemon, ServiceInfo};
use tokio_util::sync::CancellationToken;

use super::Announced;

/// Service type of controllers in DNS-SD.
const SERVICE: &str = "_marco-bootstrap._tcp.local.";
/// Version of the TXT record's format.
const VERSION: &str = "1";
/// Hexadecimal digits of the CA's pin in the record: enough to tell the controllers of one network apart.
const CA_DIGITS: usize = 16;
/// Time limit of the good-bye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Announces the controller until `stop`, then says good-bye.
///
/// # Errors
/// Returns an error if nothing can be announced.
pub(super) async fn announce(
    announced: &Announced,
    name: &str,
    stop: &CancellationToken,
) -> Result<(), mdns_sd::Error> {
    let daemon = ServiceDaemon::new()?;
    // With the API on the loopback interface it is the only one that can find it.
    if !announced.listen.is_loopback() {
        daemon.disable_interface(vec![IfKind::LoopbackV4, IfKind::LoopbackV6])?;
    }
    let events = daemon.monitor()?;
    let service = service(announced, name)?;
    let fullname = service.get_fullname().to_owned();
    daemon.register(service)?;
    tracing::info!(name = fullname, "announced by mDNS");
    let mut said = false;
    loop {
        // An event that is lost on a stop would only have been logged.
        let event = tokio::select! {
            () = stop.cancelled() => break,
            event = events.recv_async() => event,
        };
        match event {
            // A network that is down or has no multicast; it may come back, and the daemon goes on with the others.
            Ok(DaemonEvent::Error(error)) if !said => {
                said = true;
                tracing::warn!(error = %error, "mDNS does not work on every interface");
            }
            Ok(DaemonEvent::NameChange(change)) => {
                tracing::info!(from = change.original, to = change.new_name, "another name was taken for mDNS");
            }
            Ok(event) => tracing::debug!(?event, "mDNS"),
            Err(_) => return Err(mdns_sd::Error::Msg("the mDNS thread ended".to_owned())),
        }
    }
    let goodbye = async {
        if let Ok(done) = daemon.unregister(&fullname) {
            let _ = done.recv_async().await;
        }
        if let Ok(done) = daemon.shutdown() {
            let _ = done.recv_async().await;
        }
    };
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    Ok(())
}

fn service(announced: &Announced, name: &str) -> Result<ServiceInfo, mdns_sd::Error> {
    // Several controllers may run on one machine, next to a responder that owns the machine's host name.
    let tag: String = announced.controller.chars().filter(char::is_ascii_alphanumeric).rev().take(8).collect();
    let host = format!("marco-{tag}.local.");
    let instance = format!("{name}-{tag}");
    let ca: String = hex::encode(announced.ca).chars().take(CA_DIGITS).collect();
    let mut txt = vec![("v", VERSION.to_owned()), ("enroll", announced.enroll.to_string())];
    txt.extend(announced.mirror.map(|port| ("mirror", port.to_string())));
    txt.push(("ca", ca));
    let (api, txt) = (announced.api, txt.as_slice());
    let mut service = match announced.listen {
        ip if ip.is_unspecified() => ServiceInfo::new(SERVICE, &instance, &host, "", api, txt)?.enable_addr_auto(),
        ip => ServiceInfo::new(SERVICE, &instance, &host, ip, api, txt)?,
    };
    match announced.listen {
        // `[::]` takes connections of both kinds.
        IpAddr::V6(ip) if ip.is_unspecified() => {}
        IpAddr::V4(ip) if ip.is_unspecified() => service.set_interfaces(vec![IfKind::IPv4]),
        ip => service.set_interfaces(vec![IfKind::Addr(ip)]),
    }
    Ok(service)
}

#[cfg(test)]
mod tests {
    use super::super::{Announced, Ways};
    use super::service;

    #[test]
    fn the_record_says_ports_and_the_beginning_of_the_pin() {
        let announced = Announced {
            ways: Ways::ALL,
            listen: "10.0.0.1".parse().unwrap(),
            api: 1346,
            enroll: 1347,
            mirror: Some(1345),
            ca: [0xab; 32],
            controller: "01a20548-f22e-7402-ba54-e95bd8579816".to_owned(),
        };
        let told = service(&announced, "lab").unwrap();
        assert_eq!(told.get_type(), "_marco-bootstrap._tcp.local.");
        assert_eq!(told.get_port(), 1346);
        let txt: Vec<String> = told.get_properties().iter().map(ToString::to_string).collect();
        assert_eq!(txt, ["v=1", "enroll=1347", "mirror=1345", "ca=abababababababab"]);
        let without = service(&Announced { mirror: None, ..announced }, "lab").unwrap();
        assert!(without.get_property("mirror").is_none());
    }
}
