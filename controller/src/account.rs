//! Checks that the numbers in `docs/security.md` are the program's constants.

use std::time::Duration;

use crate::api::downloads;
use crate::identity::tls::{MAX_CONCURRENT_STREAMS, incoming, places};
use crate::identity::{callers, peer_log};

/// The document with the table of limits.
const SECURITY: &str = include_str!("../../docs/security.md");

#[test]
fn account_of_the_doors_is_that_of_the_program() {
    let seconds = |time: Duration| format!("{} s", time.as_secs());
    let rows = [
        ("handshakes at a time, each listener", incoming::MAX_HANDSHAKES.to_string()),
        ("time of a handshake", seconds(incoming::HANDSHAKE_TIMEOUT)),
        ("connections of strangers, each listener", places::STRANGERS.to_string()),
        (
            "of them from one address (IPv6: one network of 64 bits)",
            places::Limits::of_files(1 << 20).strangers_of_one.to_string(),
        ),
        ("life of a stranger's connection", seconds(places::STRANGER_AGE)),
        ("calls at a time on it; more get `REFUSED_STREAM`", places::STRANGER_STREAMS.to_string()),
        ("bytes of a call on it", places::STRANGER_MESSAGE.to_string()),
        ("connections of one node, each listener", places::OF_A_NODE.to_string()),
        ("connections of one person, each listener", places::OF_A_PERSON.to_string()),
        ("calls at a time on a connection whose credential was accepted", MAX_CONCURRENT_STREAMS.to_string()),
        ("open calls of one node, besides its sessions", callers::OF_A_NODE.to_string()),
        ("open calls of one person", callers::OF_A_PERSON.to_string()),
        ("calls with one credential that ask the database at a time whether it counts", callers::LOOKUPS.to_string()),
        ("messages of one caller that are being received, 1 MiB each", callers::RECEIVING.to_string()),
        ("downloads in all", downloads::ALL.to_string()),
        ("downloads of one node", downloads::OF_A_NODE.to_string()),
        ("downloads of one person", downloads::OF_A_PERSON.to_string()),
        ("messages read ahead of a download, 256 KiB each", downloads::DOWNLOAD_QUEUE.to_string()),
        ("places of the file mirror", places::MIRROR_PLACES.to_string()),
        ("bytes of a peer's text in a log line", peer_log::TEXT_MAX.to_string()),
        ("log lines about one address, at once; then one each 2 s", peer_log::ADDRESS_BURST.to_string()),
        ("log lines about all addresses together, at once; then five a second", peer_log::ALL_BURST.to_string()),
        ("log lines about one caller, at once; then five a second", peer_log::CALLER_BURST.to_string()),
    ];
    let written: Vec<&str> = SECURITY.lines().skip_while(|line| *line != "## Numbers").skip(4).collect();
    let written: Vec<&str> = written.into_iter().take_while(|line| line.starts_with('|')).collect();
    let expected: Vec<String> = rows.iter().map(|(what, most)| format!("| {what} | {most} |")).collect();
    assert_eq!(written, expected);
    let times = (peer_log::ADDRESS_EVERY, peer_log::ALL_EVERY, peer_log::CALLER_EVERY);
    assert_eq!(times, (Duration::from_secs(2), Duration::from_millis(200), Duration::from_millis(200)));
}
