//! Coverage of the histories.

use std::collections::BTreeMap;
use std::fmt;

/// Number of times that each event had an effect.
#[derive(Clone, Default)]
pub(super) struct Counts(BTreeMap<&'static str, usize>);

/// Events that 200 histories have to reach. Without them a change of the generator could make the test pass for
/// nothing.
const EXPECTED: [&str; 21] = [
    "acknowledged",
    "agents restarted",
    "cancelled",
    "commits lost",
    "controllers killed",
    "created",
    "deliveries",
    "journals torn",
    "overdue",
    "paused",
    "paused by itself",
    "power cuts",
    "pushed",
    "repeated",
    "repeated after an error",
    "resumed",
    "retried",
    "sessions",
    "succeeded",
    "updates accepted",
    "verdicts",
];
/// The same, for histories on Postgres.
const ON_POSTGRES: [&str; 2] = ["answers lost", "commits cut"];
/// The same, if a small disk could be mounted.
const ON_A_SMALL_DISK: [&str; 1] = ["writes on a full disk"];
const ON_SQLITE: [&str; 2] = ["saved", "restored"];

impl Counts {
    pub(super) fn add(&mut self, what: &'static str) {
        self.add_many(what, 1);
    }

    pub(super) fn add_many(&mut self, what: &'static str, count: usize) {
        *self.0.entry(what).or_default() += count;
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            self.add_many(what, *count);
        }
    }

    /// Expected events that did not happen.
    pub(super) fn missing(&self, small_disk: bool) -> Vec<&'static str> {
        // Not every user may mount a small disk, so its events are expected only where there is one.
        let disk: &[&'static str] = if small_disk { &ON_A_SMALL_DISK } else { &[] };
        let expected = EXPECTED.iter().chain(&ON_POSTGRES).chain(&ON_SQLITE).chain(disk);
        expected.copied().filter(|what| !self.0.contains_key(what)).collect()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.0.iter().map(|(what, count)| format!("{count} {what}")).collect();
        f.write_str(&words.join(", "))
    }
}
