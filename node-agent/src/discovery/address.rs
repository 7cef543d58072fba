//! Addresses as operators write them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use marco_proto::names::{API_PORT, ENROLL_PORT};

/// Address of a controller: a host name or IP address, and an optional port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: Option<u16>,
}

/// The text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address: it must read HOST, HOST:PORT or [IPV6]:PORT")]
pub struct InvalidAddress {
    text: String,
}

impl Address {
    /// `host:port` of the API. Without a port: the usual one.
    pub fn api(&self) -> String {
        self.with_port(API_PORT)
    }

    /// `host:port` of an enrolment listener that an operator named.
    pub fn enroll(&self) -> String {
        self.with_port(ENROLL_PORT)
    }

    /// `host:port` of the enrolment listener of the controller with this API.
    pub fn enroll_beside(&self) -> String {
        format!("{}:{ENROLL_PORT}", self.host)
    }

    fn with_port(&self, usual: u16) -> String {
        format!("{}:{}", self.host, self.port.unwrap_or(usual))
    }
}

impl Address {
    /// An address from an answer.
    pub(super) fn found(ip: IpAddr, port: u16) -> Self {
        let host = if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
        Self { host, port: Some(port) }
    }
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let invalid = || InvalidAddress { text: text.chars().take(80).collect() };
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(invalid)?)),
            // More than one colon without brackets: an IPv6 address without a port.
            None if text.matches(':').count() > 1 => (text, None),
            None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map(|port| port.parse().map_err(|_| invalid())).transpose()?;
        let host = if host.contains(':') || text.starts_with('[') {
            host.parse::<std::net::Ipv6Addr>().map_err(|_| invalid())?;
            format!("[{host}]")
        } else {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
            if host.is_empty() || !host.bytes().all(plain) {
                return Err(invalid());
            }
            host.to_owned()
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => f.write_str(&self.host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn an_address_gets_the_usual_ports() {
        let address = |text: &str| text.parse::<Address>().unwrap();
        assert_eq!(address("pi.local").api(), "pi.local:1346");
        assert_eq!(address("10.0.0.1:99").api(), "10.0.0.1:99");
        assert_eq!(address("10.0.0.1:99").enroll_beside(), "10.0.0.1:1347");
        assert_eq!(address("10.0.0.1:99").enroll(), "10.0.0.1:99");
        assert_eq!(address("fe80::1").api(), "[fe80::1]:1346");
        assert_eq!(address("[fe80::1]:7").enroll_beside(), "[fe80::1]:1347");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", ":1346", "host:", "host:x", "host:70000", "[::1", "[x]:1", "https://host", "a b", "h/x:1"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
