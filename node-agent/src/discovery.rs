//! Where controllers are.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use marco_proto::names::{API_PORT, ENROLL_PORT};

/// Where a controller listens: a host name or IP address, and perhaps a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: Option<u16>,
}

/// Not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address: it must read HOST, HOST:PORT or [IPV6]:PORT")]
pub struct InvalidAddress {
    text: String,
}

impl Address {
    /// `host:port` of the API, with its usual port when none was given.
    pub fn api(&self) -> String {
        self.with_port(API_PORT)
    }

    /// `host:port` of an enrolment listener that was named itself.
    pub fn enroll(&self) -> String {
        self.with_port(ENROLL_PORT)
    }

    /// `host:port` of the enrolment listener beside this API.
    pub fn enroll_beside(&self) -> String {
        format!("{}:{ENROLL_PORT}", self.host)
    }

    fn with_port(&self, usual: u16) -> String {
        format!("{}:{}", self.host, self.port.unwrap_or(usual))
    }
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let invalid = || InvalidAddress { text: text.chars().take(80).collect() };
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(invalid)?)),
            // More than one colon and no brackets: an IPv6 address without a port.
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

/// How controllers are found.
#[derive(Debug, Clone)]
pub enum Discovery {
    /// They were named.
    Fixed(Vec<Address>),
}

impl Discovery {
    /// Addresses of APIs, host:port, in the order in which they are to be tried.
    pub fn controllers(&self) -> Vec<String> {
        match self {
            Self::Fixed(addresses) => addresses.iter().map(Address::api).collect(),
        }
    }
}

/// At most so many controllers are remembered of those that a controller names.
const MOST_TOLD: usize = 16;

/// Where controllers are, as they were given and as a controller told it: the given ones are tried first, in their
/// order, and the others after them.
#[derive(Debug)]
pub struct Controllers {
    given: Discovery,
    told: Mutex<Vec<String>>,
    /// Where those that were told are kept over a restart; none: nowhere.
    file: Option<PathBuf>,
}

impl Controllers {
    /// Those that were given, with nothing remembered.
    pub fn given(given: Discovery) -> Self {
        Self { given, told: Mutex::default(), file: None }
    }

    /// Those that were given, and those that this file remembers. A file that makes no sense is as good as none.
    pub fn remembered(given: Discovery, file: PathBuf) -> Self {
        let told: Vec<String> =
            std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { given, told: Mutex::new(usable(&told)), file: Some(file) }
    }

    /// Addresses of APIs, host:port, in the order in which they are to be tried.
    pub fn in_order(&self) -> Vec<String> {
        let mut all = self.given.controllers();
        for address in self.lock().iter() {
            if !all.contains(address) {
                all.push(address.clone());
            }
        }
        all
    }

    /// A controller says which ones live. None at all says nothing: it does not know what it is called itself.
    pub fn learn(&self, live: &[String]) {
        let live = usable(live);
        if live.is_empty() || *self.lock() == live {
            return;
        }
        self.lock().clone_from(&live);
        let Some(file) = &self.file else { return };
        let written = serde_json::to_vec(&live)
            .map_err(std::io::Error::from)
            .and_then(|contents| crate::durable::replace(file, &contents, 0o644));
        if let Err(error) = written {
            tracing::warn!(error = %error, "the live controllers are not remembered");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that are addresses, as host:port.
fn usable(texts: &[String]) -> Vec<String> {
    let addresses = texts.iter().filter_map(|text| text.parse::<Address>().ok());
    addresses.map(|address| address.api()).take(MOST_TOLD).collect()
}

#[cfg(test)]
mod tests {
    use super::{Address, Controllers, Discovery};

    #[test]
    fn the_given_controllers_come_first_and_the_told_ones_are_remembered() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let given = || Discovery::Fixed(vec!["a".parse().unwrap(), "b:1".parse().unwrap()]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("live.json");
        let controllers = Controllers::remembered(given(), file.clone());
        assert_eq!(controllers.in_order(), ["a:1346", "b:1"]);
        controllers.learn(&texts(&["c:2", "b:1", "no address", "d"]));
        assert_eq!(controllers.in_order(), ["a:1346", "b:1", "c:2", "d:1346"]);
        controllers.learn(&[]);
        let again = Controllers::remembered(given(), file.clone());
        assert_eq!(again.in_order(), ["a:1346", "b:1", "c:2", "d:1346"]);
        again.learn(&texts(&["e:3"]));
        assert_eq!(Controllers::remembered(given(), file.clone()).in_order(), ["a:1346", "b:1", "e:3"]);
        std::fs::write(&file, "{").unwrap();
        assert_eq!(Controllers::remembered(given(), file).in_order(), ["a:1346", "b:1"]);
    }

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
