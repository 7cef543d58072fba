//! `installer-config.txt`, which the 2015 system left for its installer. Its lines are those of a shell script. They
//! are parsed here and never run.

use std::path::Path;

/// Path on the recovery partition.
pub const FILE: &str = "installer-config.txt";

/// Contents of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seed {
    /// Name of the image, without `.tar.gz`. `None`: the file names none.
    pub image: Option<String>,
    /// Keys or whole lines that were not understood, for a warning.
    pub unknown: Vec<String>,
}

impl Seed {
    /// Reads the file of this recovery partition. A missing or unreadable file gives no image.
    pub fn read(recovery: &Path) -> Self {
        let bytes = std::fs::read(recovery.join(FILE)).unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    /// Parses `export OS_IMG=name`, with or without quotes. Comments and empty lines are skipped. Values that a shell
    /// would expand or run are rejected.
    pub fn parse(text: &str) -> Self {
        let mut seed = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let assignment = line.strip_prefix("export").map_or(line, str::trim_start);
            let Some((key, value)) = assignment.split_once('=') else {
                seed.unknown.push(line.to_owned());
                continue;
            };
            let value = value.trim().trim_end_matches(';').trim();
            let value =
                ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote)).unwrap_or(value);
            let value = value.strip_suffix(".tar.gz").unwrap_or(value);
            // Characters of a file name only: no path, and nothing that a shell would expand.
            let plain = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
            match key.trim() {
                // The 2015 system wrote an empty name for "no image".
                "OS_IMG" if value.is_empty() => {}
                "OS_IMG" if plain => seed.image = Some(value.to_owned()),
                key => seed.unknown.push(key.to_owned()),
            }
        }
        seed
    }
}

#[cfg(test)]
mod tests {
    use super::Seed;

    #[test]
    fn the_image_is_read_and_what_is_unknown_is_named() {
        let seed = Seed::parse("# 2015\nexport OS_IMG=ArchLinuxARM-rpi-2-latest\nexport MIRROR=1.2.3.4\nreboot now\n");
        assert_eq!(seed.image.as_deref(), Some("ArchLinuxARM-rpi-2-latest"));
        assert_eq!(seed.unknown, ["MIRROR", "reboot now"]);
        for quoted in ["OS_IMG=\"a.tar.gz\"", "export OS_IMG='a'", "export OS_IMG=a;"] {
            assert_eq!(Seed::parse(quoted).image.as_deref(), Some("a"), "{quoted}");
        }
    }

    #[test]
    fn nothing_that_a_shell_would_run_becomes_a_name() {
        for line in ["export OS_IMG=$(reboot)", "OS_IMG=`id`", "OS_IMG=a/../b", "OS_IMG=", "OS_IMG=\"a b\""] {
            assert_eq!(Seed::parse(line).image, None, "{line}");
        }
    }
}
