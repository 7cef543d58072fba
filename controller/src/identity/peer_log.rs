//! Log lines about peers. Texts of a peer are cut and cleaned, and each peer has a limited number of lines, so that it
//! can neither fill the disk nor control an operator's terminal.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::DateTime;
use marco_proto::names::NodeId;

use super::rate::{Rate, source};

/// Longest text of a peer in a line, in bytes.
pub const TEXT_MAX: usize = 200;
/// Lines about one known caller: at once, and one more for each interval. A node that installs makes a dozen.
pub const CALLER_BURST: u32 = 500;
/// See [`CALLER_BURST`].
pub const CALLER_EVERY: Duration = Duration::from_millis(200);
/// Lines about one address without an accepted credential.
pub const ADDRESS_BURST: u32 = 50;
/// See [`ADDRESS_BURST`].
pub const ADDRESS_EVERY: Duration = Duration::from_secs(2);
/// Lines about all such addresses together.
pub const ALL_BURST: u32 = 500;
/// See [`ALL_BURST`].
pub const ALL_EVERY: Duration = Duration::from_millis(200);

/// The subject of a line.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A caller by its name.
    Caller(String),
    /// An address that showed no accepted credential.
    Address(IpAddr),
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self::Address(source(address.ip()))
    }
}

impl From<&NodeId> for Peer {
    fn from(node: &NodeId) -> Self {
        Self::Caller(node.as_str().to_owned())
    }
}

impl From<&str> for Peer {
    fn from(name: &str) -> Self {
        Self::Caller(name.to_owned())
    }
}

struct Lines {
    since: Instant,
    callers: Rate<Peer>,
    addresses: Rate<Peer>,
    all: Rate<()>,
    left_out: AtomicU64,
}

/// One for the process, because its log is one too.
static LINES: LazyLock<Lines> = LazyLock::new(|| Lines {
    since: Instant::now(),
    callers: Rate::new(CALLER_BURST, CALLER_EVERY),
    addresses: Rate::new(ADDRESS_BURST, ADDRESS_EVERY),
    all: Rate::new(ALL_BURST, ALL_EVERY),
    left_out: AtomicU64::new(0),
});

/// True if a line about a peer may be written. The next written line is preceded by the number of omitted ones.
pub fn may_log(peer: impl Into<Peer>) -> bool {
    let lines = &*LINES;
    // Any clock that goes forward will do; this one cannot be set.
    let now = DateTime::UNIX_EPOCH + lines.since.elapsed();
    let peer = peer.into();
    let taken = match &peer {
        Peer::Caller(_) => lines.callers.take(peer, now),
        // Addresses also share a limit, because an attacker has many of them with IPv6.
        Peer::Address(_) => lines.addresses.take(peer, now) && lines.all.take((), now),
    };
    if !taken {
        lines.left_out.fetch_add(1, Ordering::Relaxed);
        return false;
    }
    let left_out = lines.left_out.swap(0, Ordering::Relaxed);
    if left_out > 0 {
        tracing::warn!(left_out, "lines about peers were left out");
    }
    true
}

/// A peer's text for the log: at most [`TEXT_MAX`] bytes, without control characters.
pub fn cut(text: &str) -> Cut<'_> {
    Cut(text)
}

/// See [`cut`].
#[derive(Debug, Clone, Copy)]
pub struct Cut<'a>(&'a str);

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(text) = self;
        if text.len() <= TEXT_MAX {
            return text.chars().try_for_each(|c| f.write_char(shown(c)));
        }
        const DOTS: char = '…';
        let mut left = TEXT_MAX - DOTS.len_utf8();
        for c in text.chars().map(shown) {
            if c.len_utf8() > left {
                break;
            }
            left -= c.len_utf8();
            f.write_char(c)?;
        }
        f.write_char(DOTS)
    }
}

/// Control characters move a terminal's cursor or begin a line that looks like another entry.
fn shown(c: char) -> char {
    if c.is_control() { '?' } else { c }
}

/// Logs a line about a peer, if its limit allows it: level, peer, then the arguments of the level's own macro.
macro_rules! of_peer {
    ($level:ident, $peer:expr, $($line:tt)+) => {
        if $crate::identity::peer_log::may_log($peer) {
            tracing::$level!($($line)+);
        }
    };
}
pub(crate) use of_peer;

#[cfg(test)]
mod tests {
    use super::{ADDRESS_BURST, CALLER_BURST, Peer, TEXT_MAX, cut, may_log};

    #[test]
    fn text_of_a_peer_is_short_and_harmless() {
        for text in ["x".repeat(60_000), "é".repeat(300), "\n\u{1b}[31m".repeat(100), String::new(), "pi-01".to_owned()]
        {
            let shown = cut(&text).to_string();
            assert!(shown.len() <= TEXT_MAX && !shown.contains(char::is_control), "{shown}");
            assert!(text.len() > TEXT_MAX || shown.len() == text.len());
        }
    }

    #[test]
    fn each_peer_has_so_many_lines() {
        let written = |peer: fn() -> Peer| (0..10_000).filter(|_| may_log(peer())).count();
        let (node, address) = (
            written(|| Peer::from("a-node-of-this-test")),
            written(|| Peer::from("[2001:db8:7::1]:5".parse::<std::net::SocketAddr>().unwrap())),
        );
        let near = |count: usize, burst: u32| (1..=usize::try_from(burst).unwrap() + 50).contains(&count);
        assert!(near(node, CALLER_BURST) && near(address, ADDRESS_BURST), "{node}, {address}");
        assert!(may_log("another-node-of-this-test"), "others have theirs");
    }
}
