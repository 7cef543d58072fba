//! The script of udhcpc: this program under another name. udhcpc calls it with each change of its lease, which is in
//! the environment (busybox, networking/udhcp/dhcpc.c).

use std::net::Ipv4Addr;

use super::{configure, ip};
use crate::system::SystemError;

/// Path of the script, a link to the agent.
pub const PROGRAM: &str = "/usr/lib/marco/udhcpc-hook";
/// Folder of the files `lease-INTERFACE`, one line each, for the log.
const LEASES: &str = "/run/marco";

/// A lease from the environment.
#[derive(Debug, PartialEq, Eq)]
struct Lease {
    interface: String,
    address: String,
    gateway: Option<String>,
    dns: Vec<String>,
}

impl Lease {
    fn read(get: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let (interface, ip) = (get("interface")?, get("ip")?);
        let prefix = match get("mask").and_then(|mask| mask.parse::<u8>().ok()) {
            Some(prefix) => u32::from(prefix),
            None => get("subnet")?.parse::<Ipv4Addr>().ok()?.to_bits().count_ones(),
        };
        let words = |key| get(key).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        Some(Self {
            interface,
            address: format!("{ip}/{prefix}"),
            // Routers are listed by preference (RFC 2132, section 3.5).
            gateway: words("router").into_iter().next(),
            dns: words("dns"),
        })
    }
}

/// Handles the event in udhcpc's argument.
///
/// # Errors
/// Returns an error if the interface could not be set up. udhcpc continues anyway.
pub async fn main(event: &str) -> Result<(), SystemError> {
    let lease = Lease::read(|key| std::env::var(key).ok());
    match (event, lease) {
        ("deconfig", _) => {
            // udhcpc calls this at its start and after it lost a lease.
            let Ok(interface) = std::env::var("interface") else { return Ok(()) };
            ip(&["link", "set", "dev", &interface, "up"]).await?;
            ip(&["addr", "flush", "dev", &interface]).await
        }
        ("bound" | "renew", Some(lease)) => {
            // A renewal usually changes nothing, and flushing the address would cut every connection.
            let text = format!("{} via {}", lease.address, lease.gateway.as_deref().unwrap_or("nobody"));
            if event == "renew" && self::lease(&lease.interface) == text {
                return Ok(());
            }
            configure(&lease.interface, &lease.address, lease.gateway.as_deref(), &lease.dns).await?;
            std::fs::create_dir_all(LEASES).map_err(SystemError::io("make", LEASES))?;
            let path = format!("{LEASES}/lease-{}", lease.interface);
            std::fs::write(&path, text).map_err(SystemError::io("write", path))
        }
        _ => Ok(()),
    }
}

/// Last lease of an interface as a line. Empty: none.
pub(super) fn lease(interface: &str) -> String {
    std::fs::read_to_string(format!("{LEASES}/lease-{interface}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::Lease;

    #[test]
    fn a_lease_is_read_from_the_environment() {
        let get = |key: &str| {
            let value = match key {
                "interface" => "eth0",
                "ip" => "10.0.2.15",
                "subnet" => "255.255.254.0",
                "router" => "10.0.2.2 10.0.2.9",
                "dns" => "10.0.2.3 10.0.2.4",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let lease = Lease::read(get).unwrap();
        assert_eq!((lease.address.as_str(), lease.gateway.as_deref()), ("10.0.2.15/23", Some("10.0.2.2")));
        assert_eq!(lease.dns, ["10.0.2.3", "10.0.2.4"]);
        assert_eq!(Lease::read(|_| None), None);
    }
}
