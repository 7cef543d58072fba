//! The texts of p1's `config.txt` and `autoboot.txt`. They always have the same length, so that a switch is one write
//! in place.

use marco_archive::config_txt::{Conditions, ConfigTxt};
use marco_archive::switch::{self, INSTALLER, LINE, SYSTEM};

use super::{BootError, DefaultBoot, Prefix};

pub use marco_archive::firmware::kernels;
pub(super) use marco_archive::switch::HEAD;

/// Lines of a set's own `config.txt` that p1's takes over for this board. The firmware reads no `config.txt` under a
/// prefix, so they are copied. Keys that reach out of the set (`os_prefix`, `include`) and lines of other boards are
/// left out. Command line and device tree are always named: otherwise the other block's would count.
pub fn set_lines(config: &str, family: &str, device_tree: Option<&str>) -> Vec<String> {
    let conditions = Conditions { models: vec![family.to_owned()], ..Conditions::default() };
    let mut lines = Vec::new();
    let mut fixed = vec![("cmdline", "cmdline.txt".to_owned())];
    fixed.extend(device_tree.map(|name| ("device_tree", name.to_owned())));
    for setting in ConfigTxt::parse(config).settings() {
        if !setting.applies(&conditions) {
            continue;
        }
        let (key, value) = (setting.key.as_str(), setting.value.trim());
        match key {
            "os_prefix" | "overlay_prefix" | "include" => {}
            "initramfs" => lines.push(format!("initramfs {value}")),
            _ => match fixed.iter_mut().find(|(name, _)| *name == key) {
                Some((_, named)) if !value.is_empty() => value.clone_into(named),
                // An empty `device_tree=` stands for a machine without a device tree.
                _ if key == "device_tree" && value.is_empty() => {}
                Some(_) => {}
                None => lines.push(format!("{key}={value}")),
            },
        }
    }
    lines.extend(fixed.into_iter().map(|(key, value)| format!("{key}={value}")));
    lines
}

/// p1's `config.txt`: the default set of the installer, then the set of a trial boot.
pub fn config_txt(
    (default, default_lines): (Prefix, &[String]),
    trial: Option<(Prefix, &[String])>,
) -> Result<Vec<u8>, BootError> {
    let mut text = format!("{HEAD}[all]\nos_prefix={}\n", default.as_str());
    let trial_lines = trial.map(|(_, lines)| lines).unwrap_or_default();
    // The firmware ignores the rest of a longer line, so the set would boot with half of a setting.
    if let Some(long) = default_lines.iter().chain(trial_lines).find(|line| line.len() > LINE) {
        return Err(BootError::Refused(format!("a line of their config.txt is longer than {LINE} characters: {long}")));
    }
    push(&mut text, default_lines);
    if let Some((prefix, lines)) = trial {
        text.push_str(&format!("[tryboot]\nos_prefix={}\n", prefix.as_str()));
        push(&mut text, lines);
    }
    switch::pad(text).map_err(|error| BootError::Refused(format!("their configuration does not fit: {error}")))
}

fn push(text: &mut String, lines: &[String]) {
    for line in lines {
        text.push_str(line);
        text.push('\n');
    }
}

/// Text of `autoboot.txt`.
pub fn autoboot_txt(default: DefaultBoot) -> Vec<u8> {
    match default {
        DefaultBoot::System => switch::autoboot_txt(SYSTEM, INSTALLER),
        DefaultBoot::Installer => switch::autoboot_txt(INSTALLER, SYSTEM),
    }
}

#[cfg(test)]
mod tests {
    use marco_archive::switch::LENGTH;

    use super::{autoboot_txt, config_txt, set_lines};
    use crate::bootpart::{BootError, DefaultBoot, Prefix};

    #[test]
    fn every_text_has_the_same_length() {
        let lines = set_lines("auto_initramfs=0\ninitramfs i.img followkernel\n", "pi4", Some("a.dtb"));
        for text in [
            autoboot_txt(DefaultBoot::System),
            autoboot_txt(DefaultBoot::Installer),
            config_txt((Prefix::B0, &lines), None).unwrap(),
            config_txt((Prefix::B1, &lines), Some((Prefix::B0, &lines))).unwrap(),
        ] {
            assert_eq!(text.len(), LENGTH);
            assert_eq!(text.last(), Some(&b'\n'));
        }
    }

    #[test]
    fn a_configuration_that_does_not_fit_is_refused() {
        let lines = vec!["#".repeat(90); 3];
        let refused = config_txt((Prefix::B0, &lines), Some((Prefix::B1, &lines)));
        assert!(matches!(refused, Err(BootError::Refused(_))));
    }

    #[test]
    fn a_set_cannot_reach_out_of_its_prefix_or_its_block() {
        let config =
            "os_prefix=../\ninclude x.txt\n[pi5]\nkernel=five.img\n[tryboot]\ngpu_mem=1\n[all]\nauto_initramfs=0\n";
        let lines = set_lines(config, "pi4", Some("bcm2711-rpi-4-b.dtb"));
        assert_eq!(lines, ["auto_initramfs=0", "cmdline=cmdline.txt", "device_tree=bcm2711-rpi-4-b.dtb"]);
    }

    #[test]
    fn lines_for_this_board_are_copied() {
        let lines = set_lines("[pi4]\nkernel=four.img\ninitramfs i.img followkernel\n[none]\nx=1\n", "pi4", Some("d"));
        assert_eq!(lines, ["kernel=four.img", "initramfs i.img followkernel", "cmdline=cmdline.txt", "device_tree=d"]);
    }
}
