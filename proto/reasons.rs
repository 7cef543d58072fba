//! The closed set of reasons for failures of an agent's execution, each with its remedy. Programs match on the words;
//! the controller offers a retry by the remedy.

/// The remedy without which another try ends the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Healing {
    /// None: networks, cards and power come and go.
    AnotherTry,
    /// A repair by hand, at the node or at the controller; then another try.
    ByHand,
    /// Another image. The same image always ends the same way on the same node.
    AnotherImage,
}

use Healing::{AnotherImage, AnotherTry, ByHand};

/// Every reason that an agent reports.
pub const REASONS: &[(&str, Healing)] = &[
    ("AGENT_BUG", AnotherTry),
    ("BOOT_LOADER_TOO_OLD", ByHand),
    ("BOOT_PARTITION_IO", AnotherTry),
    ("BOOT_PARTITION_NOT_WRITTEN", AnotherTry),
    ("BOOTCODE_REFUSED", ByHand),
    ("CALLED_OFF", AnotherTry),
    ("CALLED_OFF_ON_NODE", ByHand),
    ("CANCELLED", AnotherTry),
    ("CARD_UNREADABLE", ByHand),
    ("CONSOLE_IN_USE", ByHand),
    ("DIGEST_MISMATCH", ByHand),
    ("DISK_IO", AnotherTry),
    ("DISK_NOT_BLANK", ByHand),
    ("DISK_TOO_SMALL", ByHand),
    ("DOWNLOAD_FAILED", AnotherTry),
    ("DOWNLOAD_REFUSED", ByHand),
    ("FIRMWARE_TOO_OLD", ByHand),
    ("IMAGE_DID_NOT_COME_UP", AnotherImage),
    ("IMAGE_REFUSED", AnotherImage),
    ("INSTALL_JOB_LOST", AnotherTry),
    ("INSTALLATION_NEVER_ENDED", ByHand),
    ("INSTALLER_TAKES_ONLY_IMAGES", AnotherTry),
    ("JOURNAL_LOST", AnotherTry),
    ("JOURNAL_NOT_WRITABLE", ByHand),
    ("LABELS_UNKNOWN", AnotherTry),
    ("LAYOUT_NOT_RESIDENT", ByHand),
    ("LAYOUT_NOT_UNDERSTOOD", ByHand),
    ("NO_BOOTCODE", ByHand),
    ("NO_CONTROLLER", AnotherTry),
    ("NO_RECOVERY_PARTITION", ByHand),
    ("NO_ROOM", AnotherImage),
    ("NO_WIRED_NETWORK", ByHand),
    ("NODE_BUSY", AnotherTry),
    ("NOT_A_SYSTEM", AnotherImage),
    ("NOT_ENOUGH_MEMORY", ByHand),
    ("NOT_WIRED", ByHand),
    ("OLD_SYSTEM_CAME_BACK", AnotherTry),
    ("PARTITION_NOT_UNDERSTOOD", ByHand),
    ("PARTITION_TABLE_GPT", ByHand),
    ("PARTITION_TABLE_UNREADABLE", ByHand),
    ("PARTITION_UNREADABLE", ByHand),
    ("POWER_OFF_DID_NOT_HAPPEN", AnotherTry),
    ("REBOOT_DID_NOT_HAPPEN", AnotherTry),
    ("RECOVERY_PARTITION_UNREADABLE", ByHand),
    ("RELEASE_MISMATCH", AnotherImage),
    ("REPLACED", AnotherTry),
    ("ROOT_EMPTY", ByHand),
    ("SYSTEM_ERROR", AnotherTry),
    ("TRIAL_BOOT_UNUSABLE", ByHand),
    ("UNDER_VOLTAGE", ByHand),
    ("UNKNOWN_ACTION", ByHand),
    ("WRONG_MODE", AnotherTry),
];

/// The remedy for a failure. A reason outside the set comes from a newer agent; another try does no harm then.
pub fn healing(reason: &str) -> Healing {
    REASONS.iter().find(|(known, _)| *known == reason).map_or(AnotherTry, |(_, healing)| *healing)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::{Healing, REASONS, healing};

    /// Literals of the agent, without tests, that look like a reason.
    fn literals(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // Tests also name other words: states of the protocol, reasons of a newer agent.
            if path.file_stem().is_some_and(|name| name == "tests" || name == "testing") {
                continue;
            }
            if path.is_dir() {
                literals(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap();
                let word = |text: &&str| {
                    text.contains('_') && text.chars().all(|c| c.is_ascii_uppercase() || c == '_' || c.is_ascii_digit())
                };
                // Every piece is searched, not every other one: the character '"' is a quote without a partner. Code
                // between two literals is never a bare word.
                found.extend(code.split('"').filter(word).map(str::to_owned));
            }
        }
    }

    #[test]
    fn every_reason_that_the_agent_gives_is_in_the_set() {
        let mut found = BTreeSet::new();
        literals(&Path::new(env!("CARGO_MANIFEST_DIR")).join("node-agent/src"), &mut found);
        // Environment variables, one of the 2015 system's file, and one of systemd's.
        let others = ["MARCO_", "CARGO_", "RUST_", "NOTIFY_", "OS_IMG", "WALL_MESSAGE"];
        found.retain(|word| !others.iter().any(|other| word.starts_with(other)));
        assert!(found.contains("NOT_A_SYSTEM") && found.len() > 20, "{found:?}");
        let known: BTreeSet<String> = REASONS.iter().map(|(reason, _)| (*reason).to_owned()).collect();
        let unknown: Vec<_> = found.difference(&known).collect();
        assert!(unknown.is_empty(), "not in the set, so nobody knows what heals them: {unknown:?}");
    }

    #[test]
    fn a_bad_image_stays_bad_and_a_cut_connection_does_not() {
        assert_eq!(healing("NOT_A_SYSTEM"), Healing::AnotherImage);
        assert_eq!(healing("DOWNLOAD_FAILED"), Healing::AnotherTry);
        assert_eq!(healing("SOMETHING_NEW"), Healing::AnotherTry);
    }
}
