//! Discovery of this controller: it announces itself by mDNS, and answers the MarcoPolo protocol of the 2015 system.
//! Both are hints; only the certificate proves the controller's identity.

mod marcopolo;
mod mdns;

use std::net::IpAddr;
use std::str::FromStr;

use tokio_util::sync::CancellationToken;

/// Discovery methods that are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ways {
    /// DNS-SD over multicast DNS.
    pub mdns: bool,
    /// MarcoPolo over UDP.
    pub marcopolo: bool,
}

impl Ways {
    /// Both.
    pub const ALL: Self = Self { mdns: true, marcopolo: true };
    /// Neither.
    pub const OFF: Self = Self { mdns: false, marcopolo: false };
}

/// The text is no discovery method.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way of being found: write mdns, marcopolo, both with a comma between them, or off")]
pub struct UnknownWay(String);

impl FromStr for Ways {
    type Err = UnknownWay;

    fn from_str(text: &str) -> Result<Self, UnknownWay> {
        let mut ways = Self::OFF;
        if text.trim() == "off" {
            return Ok(ways);
        }
        for word in text.split(',').map(str::trim) {
            match word {
                "mdns" => ways.mdns = true,
                "marcopolo" => ways.marcopolo = true,
                other => return Err(UnknownWay(other.chars().take(40).collect())),
            }
        }
        Ok(ways)
    }
}

/// The announced data, and the methods of announcing it.
#[derive(Debug, Clone)]
pub struct Announced {
    /// Discovery methods that are on.
    pub ways: Ways,
    /// The address that the API listens on. Nothing is announced on networks that cannot reach it.
    pub listen: IpAddr,
    /// Port of the API.
    pub api: u16,
    /// Port of the enrolment listener.
    pub enroll: u16,
    /// Port of the file mirror; `None`: there is no mirror.
    pub mirror: Option<u16>,
    /// SHA-256 of the CA's SubjectPublicKeyInfo.
    pub ca: [u8; 32],
    /// This controller's id.
    pub controller: String,
}

/// Announces the controller until `stop`. A method that fails is logged once, and the controller goes on without it.
pub async fn run(announced: Announced, stop: CancellationToken) {
    let Ways { mdns, marcopolo } = announced.ways;
    let name = host_name();
    // Both at the same time, and neither ends the other.
    tokio::join!(
        async {
            if mdns && let Err(error) = mdns::announce(&announced, &name, &stop).await {
                tracing::warn!(
                    error = &*crate::chain(&error),
                    "this controller is not announced by mDNS: name it to the agents (--controller), or allow UDP \
                     5353; --discovery marcopolo switches mDNS off"
                );
            }
        },
        async {
            if marcopolo && let Err(error) = marcopolo::answer(announced.listen, &name, &stop).await {
                tracing::warn!(
                    error = &*crate::chain(&error),
                    "this controller does not answer MarcoPolo: is another program on UDP 1337? --discovery mdns \
                     switches MarcoPolo off"
                );
            }
        },
    );
    // A failed method is no reason for the controller to end.
    stop.cancelled().await;
}

/// The host name of this machine, up to its first dot.
fn host_name() -> String {
    let name = gethostname::gethostname().to_string_lossy().into_owned();
    let short = name.split('.').next().unwrap_or_default();
    if short.is_empty() { "marco-controller".to_owned() } else { short.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::Ways;

    #[test]
    fn ways_are_read_as_they_are_written() {
        for (text, ways) in [
            ("mdns,marcopolo", Some(Ways::ALL)),
            ("marcopolo", Some(Ways { mdns: false, marcopolo: true })),
            (" mdns ", Some(Ways { mdns: true, marcopolo: false })),
            ("off", Some(Ways::OFF)),
            ("", None),
            ("mdns,off", None),
            ("avahi", None),
        ] {
            assert_eq!(text.parse().ok(), ways, "{text}");
        }
    }
}
