//! `marco/install.toml` on the recovery partition: settings of the installer. `dist/install.toml` shows every key.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

pub mod seed2015;

/// Path on the recovery partition.
pub const FILE: &str = "marco/install.toml";
/// File systems for root and home, and the program that makes each.
pub const FILE_SYSTEMS: [(&str, &str); 4] =
    [("ext4", "/sbin/mke2fs"), ("btrfs", "/sbin/mkfs.btrfs"), ("f2fs", "/sbin/mkfs.f2fs"), ("xfs", "/sbin/mkfs.xfs")];

/// Longest trial of a new system. With the restart it stays below 15 minutes. Longer than the wait for the controller's
/// verdict, after which the new system goes back by itself.
pub const TRIAL_LIMIT: Duration = Duration::from_secs(14 * 60);
/// Shortest one: a system must be able to start at all.
const SHORTEST_TRIAL: Duration = Duration::from_secs(20);

/// Settings of an installer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The system's boot partition (p4).
    pub boot: Boot,
    /// The root (p2).
    pub root: FileSystem,
    /// Home (p3).
    pub home: FileSystem,
    /// The wired network.
    pub network: Network,
    /// Reaction to a failed installation.
    pub failure: Failure,
    /// The trial of a new system.
    pub trial: Trial,
    /// Log level or filter, as tracing-subscriber reads it. `None`: the default.
    pub log: Option<String>,
}

/// The system's boot partition.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Boot {
    /// Size in bytes. In the file also `512MiB`.
    #[serde(deserialize_with = "bytes")]
    pub size: u64,
    /// Extra options for mkfs.vfat.
    pub mkfs_options: Vec<String>,
}

impl Default for Boot {
    fn default() -> Self {
        Self { size: 512 << 20, mkfs_options: Vec::new() }
    }
}

/// The root or home.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct FileSystem {
    /// Size in bytes. `None`: for the root two thirds of the rest of the card, at most 32 GiB; for home all that is
    /// left.
    #[serde(deserialize_with = "some_bytes")]
    pub size: Option<u64>,
    /// Type, one of [`FILE_SYSTEMS`].
    #[serde(rename = "type", deserialize_with = "file_system")]
    pub kind: String,
    /// Extra options for the program that makes it.
    pub mkfs_options: Vec<String>,
}

impl Default for FileSystem {
    fn default() -> Self {
        Self { size: None, kind: "ext4".into(), mkfs_options: Vec::new() }
    }
}

/// The wired network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Name of the interface. `None`: every wired one with a carrier.
    pub interface: Option<String>,
    /// Fixed address with its prefix length, for example `10.0.0.5/24`. `None`: DHCP.
    pub address: Option<String>,
    /// Router; only with a fixed address.
    pub gateway: Option<IpAddr>,
    /// Name servers; only with a fixed address.
    pub dns: Vec<IpAddr>,
}

/// Reaction to a failed installation, or to an installer that cannot continue.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// The reaction itself.
    pub policy: Policy,
    /// Wait before the reaction, so that the failure can be seen on the screen and at the controller.
    #[serde(deserialize_with = "time")]
    pub after: Duration,
}

impl Default for Failure {
    fn default() -> Self {
        // A node that waits can get another image. One that is off cannot.
        Self { policy: Policy::Retry, after: Duration::from_secs(60) }
    }
}

/// Reaction to a failure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Retry with backoff if a retry can help. Otherwise the node waits for its controller.
    #[default]
    Retry,
    /// Restarts the node.
    Reboot,
    /// Powers the node off.
    PowerOff,
    /// Opens a shell on the console. Without a shell in the initramfs, same as `retry`.
    Shell,
}

/// The trial of a new system.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Trial {
    /// Time from the start of the new system's kernel until the installer comes back, unless the controller has accepted
    /// the system. At most [`TRIAL_LIMIT`].
    #[serde(deserialize_with = "limit")]
    pub limit: Duration,
}

impl Default for Trial {
    fn default() -> Self {
        Self { limit: TRIAL_LIMIT }
    }
}

/// The settings are unusable.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file exists and cannot be read.
    #[error("cannot read {FILE}")]
    Read(#[source] std::io::Error),
    /// The file is no TOML, or has an invalid value.
    #[error("{FILE} is wrong: {0}")]
    Wrong(String),
}

impl Settings {
    /// Reads the text of a file. A key that is not known here is only warned of: a newer agent may have written it, and
    /// an older installer must still do its job.
    fn parse(text: &str) -> Result<Self, SettingsError> {
        let (settings, unknown) = Self::with_unknown_keys(text)?;
        if !unknown.is_empty() {
            tracing::warn!(?unknown, "{FILE} has keys that are not known here");
        }
        Ok(settings)
    }

    /// Reads the text of a file, and the keys in it that are not known here.
    fn with_unknown_keys(text: &str) -> Result<(Self, Vec<String>), SettingsError> {
        let wrong = |error: toml::de::Error| SettingsError::Wrong(error.to_string());
        let mut unknown = Vec::new();
        let document = toml::Deserializer::parse(text).map_err(wrong)?;
        let settings = serde_ignored::deserialize(document, |key| unknown.push(key.to_string())).map_err(wrong)?;
        Ok((settings, unknown))
    }

    /// Reads the file of this recovery partition; the defaults hold for a wrong one, with the error.
    pub fn read_or_default(recovery: &Path) -> (Self, Option<SettingsError>) {
        match Self::read(recovery) {
            Ok(settings) => (settings, None),
            Err(error) => (Self::default(), Some(error)),
        }
    }

    /// Reads the file of this recovery partition. Without a file: the defaults.
    pub fn read(recovery: &Path) -> Result<Self, SettingsError> {
        match std::fs::read_to_string(recovery.join(FILE)) {
            // Never the defaults for a wrong file: they would divide the card against its owner's wish.
            Ok(text) => Self::parse(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(SettingsError::Read(error)),
        }
    }
}

/// Number of bytes: `512MiB`, `8GiB`, `1TiB`, `4096KiB`, or plain bytes. `M` equals `MiB`, and so on. `None`: not a
/// size.
fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.trim().trim_end_matches("iB").to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    // Checked: a size that overflows would divide the card wrongly.
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Number(u64),
    Text(String),
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match Size::deserialize(deserializer)? {
        Size::Number(bytes) => Ok(bytes),
        Size::Text(text) => {
            let wrong = || serde::de::Error::custom(format!("{text:?} is no size, such as \"512MiB\" or \"8GiB\""));
            size(&text).ok_or_else(wrong)
        }
    }
}

fn some_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    bytes(deserializer).map(Some)
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| serde::de::Error::custom(format!("{text:?} is no time: {error}")))
}

fn limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let limit = time(deserializer)?;
    if (SHORTEST_TRIAL..=TRIAL_LIMIT).contains(&limit) {
        return Ok(limit);
    }
    let format = humantime::format_duration;
    Err(serde::de::Error::custom(format!(
        "a trial of {}: it can last from {} to {}",
        format(limit),
        format(SHORTEST_TRIAL),
        format(TRIAL_LIMIT)
    )))
}

fn file_system<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    // Checked here: later, the old root would be gone already.
    if FILE_SYSTEMS.iter().any(|(name, _)| *name == text) {
        return Ok(text);
    }
    let known: Vec<&str> = FILE_SYSTEMS.iter().map(|(name, _)| *name).collect();
    Err(serde::de::Error::custom(format!("{text:?} is no file system that the installer makes: {}", known.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::{Policy, Settings, size};

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, expected) in [("512MiB", 512 << 20), ("8GiB", 8 << 30), ("8G", 8 << 30), ("4096", 4096)] {
            assert_eq!(size(text), Some(expected), "{text}");
        }
        for wrong in ["", "MiB", "8 potatoes", "99999999999TiB"] {
            assert_eq!(size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn wrong_values_are_refused() {
        // A typing error must not lead to the defaults, which would divide the card.
        for wrong in [
            "boot = 1",
            "[root",
            "[root]\ntype = \"ntfs\"",
            "[failure]\npolicy = \"pray\"",
            "[boot]\nsize = \"big\"",
            "[trial]\nlimit = \"15m\"",
            "[trial]\nlimit = \"1s\"",
        ] {
            assert!(Settings::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn file_of_a_newer_agent_is_read() {
        let text = "log = \"debug\"\nspeed = 1\n[boot]\nsize = \"1GiB\"\nquiet = true\n[trial]\nlimit = \"5m\"\nhow = \"x\"\n\
                    [next]\nkey = 1\n";
        let (read, mut unknown) = Settings::with_unknown_keys(text).unwrap();
        assert_eq!((read.boot.size, read.trial.limit.as_secs()), (1 << 30, 300));
        unknown.sort();
        assert_eq!(unknown, ["boot.quiet", "next", "speed", "trial.how"]);
    }

    #[test]
    fn the_example_in_dist_shows_every_key_and_changes_nothing() {
        let example = include_str!("../dist/install.toml");
        assert_eq!(toml::from_str::<Settings>(example).unwrap(), Settings::default());
        let keys: String = example
            .lines()
            // In the example a space follows the `#` of a sentence, but not that of a key.
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .map(|line| format!("{line}\n"))
            .collect();
        let (all, unknown) = Settings::with_unknown_keys(&keys).unwrap();
        assert_eq!(unknown, [""; 0]);
        assert_eq!((all.boot.size, all.root.size), (1 << 30, Some(16 << 30)));
        assert!(all.home.size.is_some() && !all.root.mkfs_options.is_empty() && all.root.kind != "ext4");
        assert!(!all.boot.mkfs_options.is_empty() && !all.home.mkfs_options.is_empty());
        assert!(all.network.interface.is_some() && all.network.address.is_some() && all.network.gateway.is_some());
        assert_eq!((all.network.dns.len(), all.failure.policy), (1, Policy::Reboot));
        assert_eq!(all.trial.limit.as_secs(), 300);
        assert!(all.log.is_some() && all.failure.after.as_secs() == 300);
    }
}
