//! Files for the first boot of a system, stored on the recovery partition: their names, and the nodes that they are
//! for. The writer of a card and the installer both use this module, so they read the folder alike.

/// Folder on the recovery partition. Files directly in it are for every node. Files in a subfolder `KEY=VALUE` are for
/// nodes with that label.
pub const FOLDER: &str = "marco/first-boot";
/// Names that a system reads from its boot partition at its first boot: users, SSH and settings of Raspberry Pi OS, and
/// the data of cloud-init (data source NoCloud).
pub const NAMES: [&str; 7] =
    ["custom.toml", "meta-data", "network-config", "ssh", "ssh.txt", "user-data", "userconf.txt"];

/// Longest key or value of a label in bytes: the controller's limit.
const LABEL_MAX: usize = 63;

/// Parses the name of a folder as a label. `None`: no node can have the label, or FAT cannot store the name (a slash,
/// or a dot at the end).
pub fn label(folder: &str) -> Option<(&str, &str)> {
    let allowed = |text: &str| {
        text.len() <= LABEL_MAX && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    let (key, value) = folder.split_once('=')?;
    // VFAT drops a dot at the end, so two labels would share a folder.
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
