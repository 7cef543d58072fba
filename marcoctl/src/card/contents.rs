//! Contents of p1.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use marco_archive::config_txt::ConfigTxt;
use marco_archive::switch::{self, HEAD};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// Folder of the first set.
const PREFIX: &str = "b0/";

/// Files of p1 by path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Contents(BTreeMap<String, Vec<u8>>);

/// The boot files of an installer, unpacked from a bootcode.
#[derive(Debug)]
pub(crate) struct Set {
    zip: Vec<u8>,
    files: BTreeMap<String, Vec<u8>>,
    digests: BTreeMap<String, String>,
    config: String,
}

/// `marco/join.toml`, in the agent's format.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Join {
    /// Addresses of controllers. Empty: discovery.
    pub(crate) controllers: Vec<String>,
    /// Addresses of enrolment listeners. Empty: the controllers' hosts with the default port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) enroll: Vec<String>,
    /// The join token.
    pub(crate) token: String,
    /// Id that the node asks for. `None`: derived from the serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
}

/// `marco/b0.json`, in the agent's format: the origin of the set.
#[derive(Debug, Serialize)]
struct Record<'a> {
    sha256: String,
    files: &'a BTreeMap<String, String>,
}

impl Set {
    /// Reads a zip and checks that it can start the installer.
    pub(crate) fn open(zip: Vec<u8>) -> Result<Self> {
        let summary = marco_archive::check_zip(std::io::Cursor::new(&zip))?;
        marco_archive::check_installer_set(&summary)?;
        // Unpacked by the guard, not read from the zip directly: the card gets exactly what an agent would unpack.
        let folder = tempfile::tempdir().context("cannot make a temporary folder (TMPDIR says where)")?;
        marco_archive::unpack_zip(std::io::Cursor::new(&zip), folder.path())?;
        let (mut files, mut digests) = (BTreeMap::new(), BTreeMap::new());
        for file in &summary.files {
            let path = folder.path().join(&file.name);
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.insert(file.name.clone(), bytes);
            digests.insert(file.name.clone(), hex::encode(file.sha256));
        }
        Ok(Self { zip, files, digests, config: summary.config_txt.unwrap_or_default() })
    }

    /// Returns the SHA-256 of the zip, as used by controllers.
    pub(crate) fn sha256(&self) -> String {
        hex::encode(Sha256::digest(&self.zip))
    }

    /// Lists the firmware files that a board needs and the card lacks. `None`: nothing is missing.
    fn lacks_firmware(&self, have: &Contents) -> Option<String> {
        let tree = |start: &str| self.files.keys().any(|name| name.starts_with(start) && name.ends_with(".dtb"));
        let old = ["bcm2708", "bcm2709", "bcm2710"].into_iter().any(tree);
        let mut missing: Vec<&str> = Vec::new();
        if old {
            missing.extend(["bootcode.bin", "start.elf", "fixup.dat"]);
        }
        if tree("bcm2711") {
            missing.extend(["start4.elf", "fixup4.dat"]);
        }
        // Checked in the root of p1: files below the prefix do not help, see `is_firmware`.
        missing.retain(|name| !have.0.contains_key(*name));
        (!missing.is_empty()).then(|| missing.join(", "))
    }
}

impl Contents {
    /// Builds the contents: the set, active for every boot of the installer, and the firmware of the set or of a
    /// folder. The second value lists missing firmware, without which some boards do not start.
    pub(crate) fn of(set: &Set, firmware: Option<&Path>) -> Result<(Self, Option<String>)> {
        let mut contents = Self::default();
        for (name, bytes) in &set.files {
            if is_firmware(name) {
                contents.put(name, bytes.clone());
            }
            contents.put(&format!("{PREFIX}{name}"), bytes.clone());
        }
        if let Some(folder) = firmware {
            contents.add_firmware(folder)?;
        }
        contents.put("config.txt", config_txt(&set.config)?);
        contents.put("autoboot.txt", switch::autoboot_txt(switch::INSTALLER, switch::SYSTEM));
        let record = Record { sha256: set.sha256(), files: &set.digests };
        contents.put("marco/b0.json", serde_json::to_vec_pretty(&record).context("JSON cannot be written")?);
        // The node's fallback if no controller has a bootcode.
        contents.put("marco/fallback.zip", set.zip.clone());
        let lacks = set.lacks_firmware(&contents);
        Ok((contents, lacks))
    }

    /// Adds the join data.
    pub(crate) fn join(&mut self, join: &Join) -> Result<()> {
        let text = toml::to_string(join).context("marco/join.toml cannot be written")?;
        self.put("marco/join.toml", text.into_bytes());
        Ok(())
    }

    /// Adds a file.
    pub(crate) fn put(&mut self, name: &str, bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), bytes);
    }

    /// Adds a local file under another name.
    pub(crate) fn put_file(&mut self, name: &str, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.put(name, bytes);
        Ok(())
    }

    /// Iterates over paths and contents.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// Returns the total number of bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.0.values().map(|bytes| u64::try_from(bytes.len()).unwrap_or_default()).sum()
    }

    fn add_firmware(&mut self, folder: &Path) -> Result<()> {
        let named = || format!("cannot read {}", folder.display());
        let mut found = false;
        for entry in std::fs::read_dir(folder).with_context(named)? {
            let entry = entry.with_context(named)?;
            if let Some(name) = entry.file_name().to_str().filter(|name| is_firmware(name)) {
                self.put_file(name, &entry.path())?;
                found = true;
            }
        }
        if !found {
            bail!("there is no firmware (bootcode.bin, start*.elf, fixup*.dat) in {}", folder.display());
        }
        Ok(())
    }
}

/// Returns true for files that the firmware reads only from the root of its partition, never below a prefix.
fn is_firmware(name: &str) -> bool {
    name == "bootcode.bin"
        || name.starts_with("start") && name.ends_with(".elf")
        || name.starts_with("fixup") && name.ends_with(".dat")
}

/// Renders p1's `config.txt` for an unknown board: the set's lines with their filters, behind the prefix. The installer
/// later writes one for its own board.
fn config_txt(set: &str) -> Result<Vec<u8>> {
    let mut text = format!("{HEAD}[all]\nos_prefix={PREFIX}\ncmdline=cmdline.txt\n");
    let mut filters: &[String] = &[];
    let config = ConfigTxt::parse(set);
    for setting in config.settings() {
        if setting.filters != filters {
            text.push_str("[all]\n");
            for filter in &setting.filters {
                text.push_str(&format!("[{filter}]\n"));
            }
            filters = &setting.filters;
        }
        // The firmware's line for an initramfs has no equals sign.
        let separator = if matches!(setting.key.as_str(), "initramfs") { ' ' } else { '=' };
        text.push_str(&format!("{}{separator}{}\n", setting.key, setting.value));
    }
    if !filters.is_empty() {
        text.push_str("[all]\n");
    }
    switch::pad(text).context("the set's config.txt does not fit")
}

#[cfg(test)]
mod tests {
    use marco_archive::config_txt::{Conditions, ConfigTxt};

    use marco_archive::switch::LENGTH;

    use super::{config_txt, is_firmware};

    #[test]
    fn the_cards_configuration_is_the_sets_behind_the_prefix() {
        let set = "# comment\nauto_initramfs=0\nkernel=kernel8.img\ninitramfs initramfs followkernel\n[pi5]\nkernel=five.img\n";
        let text = config_txt(set).unwrap();
        assert_eq!(text.len(), LENGTH);
        let config = ConfigTxt::parse(std::str::from_utf8(&text).unwrap());
        let on = |model: &str| Conditions { models: vec![model.to_owned()], ..Conditions::default() };
        assert_eq!(config.get("os_prefix", &on("pi4")), Some("b0/"));
        assert_eq!(config.get("kernel", &on("pi4")), Some("kernel8.img"));
        assert_eq!(config.get("kernel", &on("pi5")), Some("five.img"));
        assert_eq!(config.get("cmdline", &on("pi5")), Some("cmdline.txt"));
        assert_eq!(config.initramfs(&on("pi4")), ["initramfs"]);
    }

    #[test]
    fn a_configuration_that_the_agent_could_not_switch_is_refused() {
        assert!(config_txt(&"x=1\n".repeat(200)).is_err());
    }

    #[test]
    fn firmware_is_told_by_its_names() {
        assert!(["bootcode.bin", "start4.elf", "fixup_cd.dat"].into_iter().all(is_firmware));
        assert!(!["config.txt", "kernel.img", "overlays/start.elf"].into_iter().any(is_firmware));
    }
}
