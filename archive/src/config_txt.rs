//! Parser for the firmware's `config.txt`, `autoboot.txt` and `tryboot.txt`: lines of `key=value`, `#` comments,
//! `initramfs FILE ADDRESS`, and filters in brackets. Keys are case-sensitive, and the last value wins.
//!
//! Source: <https://www.raspberrypi.com/documentation/computers/config_txt.html>

/// Inputs of the firmware for its filters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Filter names of the board without brackets, for example `["pi4"]`.
    pub models: Vec<String>,
    /// True during a trial boot.
    pub tryboot: bool,
    /// Number of the partition that boots. `None`: not known.
    pub boot_partition: Option<u32>,
}

/// One setting, with the filters in force at its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Filters without brackets, in the order given since the last `[all]`.
    pub filters: Vec<String>,
    /// Text before `=`. `initramfs` and `include` have no `=` and are stored as keys.
    pub key: String,
    /// Text after `=`, or after the key of `initramfs` and `include`.
    pub value: String,
}

/// A parsed file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigTxt {
    settings: Vec<Setting>,
}

/// Kind of a filter. Filters of one kind replace each other; filters of different kinds must all hold.
#[derive(PartialEq, Eq)]
enum FilterKind {
    Model,
    Tryboot,
    BootPartition,
    None,
    Other,
}

fn kind(filter: &str) -> FilterKind {
    match filter {
        "none" => FilterKind::None,
        "tryboot" => FilterKind::Tryboot,
        _ if filter.starts_with("boot_partition=") || filter.starts_with("partition=") => FilterKind::BootPartition,
        _ if filter.starts_with("pi") || filter.starts_with("cm") || filter.starts_with("board-type=") => {
            FilterKind::Model
        }
        _ => FilterKind::Other,
    }
}

impl Conditions {
    /// Returns true if a filter admits its lines. Serial numbers, monitors and pins are not known here, so their lines
    /// never apply.
    fn pass(&self, filter: &str) -> bool {
        match kind(filter) {
            FilterKind::Model => self.models.iter().any(|model| model == filter),
            FilterKind::Tryboot => self.tryboot,
            FilterKind::BootPartition => {
                let number = filter.split_once('=').and_then(|(_, number)| number.parse::<u32>().ok());
                number.is_some() && number == self.boot_partition
            }
            FilterKind::None | FilterKind::Other => false,
        }
    }
}

impl Setting {
    /// Returns true if the firmware applies this line under these conditions.
    pub fn applies(&self, conditions: &Conditions) -> bool {
        self.filters.iter().all(|filter| conditions.pass(filter))
    }
}

impl ConfigTxt {
    /// Parses the text. There are no errors: the firmware ignores lines that it does not understand.
    pub fn parse(text: &str) -> Self {
        let mut filters: Vec<String> = Vec::new();
        let mut settings = Vec::new();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(filter) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(name, _)| name) {
                let filter = filter.trim().to_ascii_lowercase();
                if filter == "all" {
                    filters.clear();
                } else {
                    // The documentation of the firmware ("Conditional filters"): a filter replaces one of its kind and
                    // adds to the others.
                    filters.retain(|old| kind(old) != kind(&filter));
                    filters.push(filter);
                }
                continue;
            }
            // These two have no equals sign. Without the blank, `initramfsx` would match.
            let word = ["initramfs", "include"].into_iter().find_map(|word| {
                let rest = line.strip_prefix(word)?;
                rest.starts_with([' ', '\t']).then(|| (word, rest.trim()))
            });
            let Some((key, value)) = word.or_else(|| line.split_once('=')) else { continue };
            settings.push(Setting {
                filters: filters.clone(),
                key: key.trim().to_owned(),
                value: value.trim().to_owned(),
            });
        }
        Self { settings }
    }

    /// Returns all settings of all sections, in order.
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// Returns the values of a key in all sections, in order.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.settings.iter().filter(move |setting| setting.key == key).map(|setting| setting.value.as_str())
    }

    /// Returns the last applicable value of a key.
    pub fn get(&self, key: &str, conditions: &Conditions) -> Option<&str> {
        let mut settings = self.settings.iter().rev();
        settings.find(|setting| setting.key == key && setting.applies(conditions)).map(|setting| setting.value.as_str())
    }

    /// Returns the files of all applicable `initramfs` and `ramfsfile` lines.
    pub fn initramfs(&self, conditions: &Conditions) -> Vec<&str> {
        self.settings.iter().filter(|setting| setting.applies(conditions)).flat_map(initramfs_files).collect()
    }
}

/// Returns the initramfs files of a line, split at commas. Empty for any other line.
pub(crate) fn initramfs_files(setting: &Setting) -> Vec<&str> {
    let files = match setting.key.as_str() {
        "initramfs" => setting.value.split_whitespace().next().unwrap_or_default(),
        "ramfsfile" => setting.value.as_str(),
        _ => "",
    };
    files.split(',').map(str::trim).filter(|file| !file.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::{Conditions, ConfigTxt};

    fn pi4(tryboot: bool) -> Conditions {
        Conditions { models: vec!["pi4".to_owned()], tryboot, boot_partition: Some(1) }
    }

    #[test]
    fn the_last_value_that_applies_wins() {
        let config = ConfigTxt::parse("os_prefix=b0/\n[tryboot]\nos_prefix=b1/\n[all]\n");
        assert_eq!(config.get("os_prefix", &pi4(false)), Some("b0/"));
        assert_eq!(config.get("os_prefix", &pi4(true)), Some("b1/"));
    }

    #[test]
    fn a_model_replaces_a_model_and_adds_to_other_filters() {
        let config = ConfigTxt::parse("[pi3]\na=3\n[pi4]\na=4\n[tryboot]\nb=both\n[pi3]\nb=three\n[all]\nc=all\n");
        assert_eq!(config.get("a", &pi4(false)), Some("4"));
        assert_eq!(config.get("b", &pi4(false)), None);
        assert_eq!(config.get("b", &pi4(true)), Some("both"));
        assert_eq!(config.get("c", &pi4(false)), Some("all"));
    }

    #[test]
    fn comments_none_and_unknown_filters_are_skipped() {
        let config = ConfigTxt::parse("#a=1\n  # a=2\n[none]\na=3\n[all]\n[gpio4=1]\na=4\nnonsense\n[ALL]\nA=5\n");
        assert_eq!(config.get("a", &pi4(false)), None, "keys are case-sensitive, and no line with `a` applies");
        assert_eq!(config.get("A", &pi4(false)), Some("5"));
    }

    #[test]
    fn an_initramfs_line_has_no_equals_sign() {
        let config = ConfigTxt::parse("initramfs a.img,b.img followkernel\r\ninitramfsx y\nramfsfile=c.img\n");
        assert_eq!(config.initramfs(&pi4(false)), ["a.img", "b.img", "c.img"]);
    }

    #[test]
    fn the_partition_is_a_filter() {
        let config = ConfigTxt::parse("[boot_partition=4]\na=4\n[boot_partition=1]\na=1\n");
        assert_eq!(config.get("a", &pi4(false)), Some("1"));
    }
}
