//! Policies for a fire that comes late or while the one before is still at work, and the jitter of nodes.

use std::fmt;

use chrono::{DateTime, TimeDelta, Utc};
use sha2::{Digest as _, Sha256};
use uuid::{Builder, Uuid};

/// Handling of fires that no controller made in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MissedFire {
    /// All are recorded as missed.
    Skip,
    /// The last one is made up for; the others are recorded as missed.
    Once,
}

/// Handling of a fire while the schedule's last operation is unfinished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Overlap {
    /// The fire is recorded as skipped.
    Skip,
    /// Its operation is created, and each node begins it after its earlier work has ended.
    Queue,
}

/// Outcome of a scheduled time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FireOutcome {
    /// An operation was created.
    Fired,
    /// None was created, on purpose or because it was refused.
    Skipped,
    /// None was created, because the time was noticed too late.
    Missed,
}

impl MissedFire {
    /// The word as it is stored and shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "SKIP",
            Self::Once => "ONCE",
        }
    }

    /// The reverse of `as_str`.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Skip, Self::Once].into_iter().find(|word| word.as_str() == text)
    }
}

impl Overlap {
    /// The word as it is stored and shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "SKIP",
            Self::Queue => "QUEUE",
        }
    }

    /// The reverse of `as_str`.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Skip, Self::Queue].into_iter().find(|word| word.as_str() == text)
    }
}

impl FireOutcome {
    /// The word as it is stored and shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fired => "FIRED",
            Self::Skipped => "SKIPPED",
            Self::Missed => "MISSED",
        }
    }

    /// The reverse of `as_str`.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Fired, Self::Skipped, Self::Missed].into_iter().find(|word| word.as_str() == text)
    }
}

impl fmt::Display for FireOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Delay of a node after a fire: the same at each fire, less than `most`, and spread evenly over the nodes.
pub fn jitter(schedule: &str, node: &str, most: TimeDelta) -> TimeDelta {
    let milliseconds = u64::try_from(most.num_milliseconds()).unwrap_or(0);
    // From a hash and not at random: a node keeps its place, and no controller needs to store it. The zero separates
    // the names.
    let digest = Sha256::new().chain_update(schedule).chain_update([0]).chain_update(node).finalize();
    let number = digest.iter().take(8).fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
    // Without jitter every node begins at once.
    let share = number.checked_rem(milliseconds).unwrap_or(0);
    TimeDelta::milliseconds(i64::try_from(share).unwrap_or(0))
}

/// The id of the operation that a schedule creates for one of its times: a UUID of version 7 with this time; its other
/// bits follow from the schedule and the time. If the operation is lost with the database's last commits, a controller
/// creates it again under the same id. By this id the nodes' journals know their earlier work on it.
///
/// The creation time distinguishes schedules of the same name, of which the first was deleted.
pub fn operation_uuid(schedule: &str, made: DateTime<Utc>, instant: DateTime<Utc>) -> Uuid {
    let digest = Sha256::new()
        // A prefix of its own, so that no other hash of the same parts gives the same id.
        .chain_update(b"operation of a schedule")
        .chain_update([0])
        .chain_update(schedule)
        .chain_update([0])
        .chain_update(made.timestamp_micros().to_be_bytes())
        .chain_update(instant.timestamp_micros().to_be_bytes())
        .finalize();
    let mut bits = [0; 10];
    for (bit, byte) in bits.iter_mut().zip(&digest) {
        *bit = *byte;
    }
    let milliseconds = u64::try_from(instant.timestamp_millis()).unwrap_or(0);
    Builder::from_unix_timestamp_millis(milliseconds, &bits).into_uuid()
}
