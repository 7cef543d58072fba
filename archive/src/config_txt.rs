//! The firmware's `config.txt`, `autoboot.txt` and `tryboot.txt`, as
//! <https://www.raspberrypi.com/documentation/computers/config_txt.html> describes them: lines of `key=value`, `#`
//! comments, `initramfs FILE ADDRESS`, and filters in brackets. Keys are case-sensitive, and the last value wins.

/// What the firmware knows when it applies filters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// The board's filter names without brackets, for example `["pi4"]`.
    pub models: Vec<String>,
    /// The trial-boot flag.
    pub tryboot: bool,
    /// The partition that is being booted, when known.
    pub boot_partition: Option<u32>,
}

/// One meaningful line, with the filters in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The filters in force, without brackets, in the order given since the last `[all]`.
    pub filters: Vec<String>,
    /// The key, before `=` (`initramfs` and `include` have none: the first word).
    pub key: String,
    /// The rest.
    pub value: String,
}

/// A file, parsed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigTxt {
    settings: Vec<Setting>,
}

impl ConfigTxt {
    /// Reads the text. Nothing is an error to the firmware: what it does not understand it ignores.
    pub fn parse(text: &str) -> Self {
        todo!("{text}")
    }

    /// Every setting of every section, in order.
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// The value of a key under these conditions: the last one that applies.
    pub fn get(&self, key: &str, conditions: &Conditions) -> Option<&str> {
        todo!("{key} {conditions:?}")
    }

    /// The files of the `initramfs` and `ramfsfile` lines that apply under these conditions.
    pub fn initramfs(&self, conditions: &Conditions) -> Vec<&str> {
        todo!("{conditions:?}")
    }
}
