//! Files for a system's first boot on a recovery partition: what they may be called, and which nodes they are for. Whoever
//! writes a card and whoever installs from it read the folder alike.

/// The folder on the recovery partition: files in it are for every node, and those in its folders `KEY=VALUE` for nodes
/// with that label.
pub const FOLDER: &str = "marco/first-boot";
/// What a system reads from its boot partition when it comes up for the first time: users, SSH and settings of Raspberry
/// Pi OS, and the data of cloud-init (its data source NoCloud).
pub const NAMES: [&str; 7] =
    ["custom.toml", "meta-data", "network-config", "ssh", "ssh.txt", "user-data", "userconf.txt"];

/// Longest key or value of a label, in bytes, as the controller takes them.
const LABEL_MAX: usize = 63;

/// The label that a folder's name means; none when it means no label that a node can have and a FAT can hold. (A label
/// with a slash, or with a dot at its end, cannot be the name of a folder there.)
pub fn label(folder: &str) -> Option<(&str, &str)> {
    let allowed = |text: &str| {
        text.len() <= LABEL_MAX && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    let (key, value) = folder.split_once('=')?;
    (!key.is_empty() && !folder.ends_with('.') && allowed(key) && allowed(value)).then_some((key, value))
}

#[cfg(test)]
mod tests {
    use super::label;

    #[test]
    fn a_folder_means_a_label_that_a_node_can_have() {
        assert_eq!(label("room=a1"), Some(("room", "a1")));
        assert_eq!(label("kiosk="), Some(("kiosk", "")));
        let long = format!("{}=x", "k".repeat(64));
        for none in ["room", "=a1", "a=b=c", "a/b=c", "a=b/c", "a=b.", "a b=c", "a=\u{e4}", "a=..", &long] {
            assert_eq!(label(none), None, "{none}");
        }
    }
}
