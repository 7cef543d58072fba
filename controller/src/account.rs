//! Checks that the numbers in `docs/security.md` are the program's constants.

use std::fmt::Display;
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

/// Cells of a table of the document, by row, without the heading.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let rows = SECURITY.lines().skip_while(|line| *line != heading).skip(4).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// Checks that the rows are these, and that each cell says these sums of the program's constants.
fn compare(heading: &str, expected: &[(&str, &[&[String]])]) {
    let rows = table(heading);
    let names: Vec<&str> = rows.iter().filter_map(|row| row.first().copied()).collect();
    assert_eq!(names, expected.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "{heading}");
    for (row, (name, cells)) in rows.iter().zip(expected) {
        assert_eq!(row.len(), cells.len() + 1, "{heading}: {name}");
        for (cell, phrases) in row.iter().skip(1).zip(*cells) {
            for phrase in *phrases {
                assert!(cell.contains(phrase.as_str()), "{heading}, {name}: no \"{phrase}\" in \"{cell}\"");
            }
        }
    }
}

fn number(value: impl Display) -> u64 {
    value.to_string().parse().unwrap()
}

#[test]
fn each_peers_share_is_that_of_the_program() {
    let (strangers, age, streams) = (places::STRANGERS, places::STRANGER_AGE.as_secs(), places::STRANGER_STREAMS);
    let unread = number(places::STRANGER_MESSAGE) >> 10;
    // KiB: its connection's buffers, and its calls.
    let stranger = 128 + number(streams) * unread;
    let enrolment = (number(strangers) * stranger) >> 10;
    let (node, person) = (places::OF_A_NODE, places::OF_A_PERSON);
    compare(
        "## Listener by peer",
        &[
            (
                "nobody",
                &[
                    &[format!("{strangers} connections, {age} s, {streams} calls")],
                    &[format!("up to {unread} KiB"), format!("{enrolment} MiB in all")],
                    &[],
                ],
            ),
            ("expired", &[&[], &[], &[]]),
            ("revoked", &[&[], &[], &[]]),
            ("quarantined", &[&[], &[], &[]]),
            ("held", &[&[format!("{node} connections, {} calls", callers::OF_A_NODE)], &[], &["403".to_owned()]]),
            ("node", &[&[format!("{} downloads", downloads::OF_A_NODE)], &[], &[format!("{node} places")]]),
            (
                "person",
                &[
                    &[
                        format!(
                            "{person} connections, {} calls, of which {}",
                            callers::OF_A_PERSON,
                            callers::RECEIVING
                        ),
                        format!("{} downloads", downloads::OF_A_PERSON),
                    ],
                    &[],
                    &[format!("{person} connections, among the {} places", places::MIRROR_PLACES)],
                ],
            ),
        ],
    );
    let handshakes = incoming::MAX_HANDSHAKES;
    let count = strangers.to_string();
    let silent = format!("128 KiB each, {} MiB", (number(strangers) * 128) >> 10);
    // MiB: each download and each message that is being received is at most one.
    let halves = format!("{} MiB for what it sends by halves", callers::RECEIVING);
    let for_downloads = |most: usize| format!("{most} MiB for downloads");
    compare(
        "## What that comes to",
        &[
            (
                "handshakes",
                &[
                    &[format!("12 KiB each, {} MiB a listener", (number(handshakes) * 12) >> 10)],
                    &[format!("{handshakes} a listener")],
                    &[],
                ],
            ),
            ("strangers of the API", &[std::slice::from_ref(&silent), std::slice::from_ref(&count), &[]]),
            (
                "strangers of the enrolment",
                &[&[format!("{stranger} KiB each, {enrolment} MiB")], std::slice::from_ref(&count), &[]],
            ),
            ("strangers of the mirror", &[std::slice::from_ref(&silent), std::slice::from_ref(&count), &[]]),
            (
                "one node",
                &[
                    &[for_downloads(downloads::OF_A_NODE), halves.clone(), format!("{node} MiB for its connections")],
                    // Of the API and of the mirror, and a file for each download.
                    &[(2 * node + downloads::OF_A_NODE).to_string()],
                    &["five a second".to_owned()],
                ],
            ),
            (
                "one person",
                &[
                    &[for_downloads(downloads::OF_A_PERSON), halves, format!("and {} answers", callers::OF_A_PERSON)],
                    &[(person + downloads::OF_A_PERSON).to_string()],
                    &[],
                ],
            ),
        ],
    );
}
