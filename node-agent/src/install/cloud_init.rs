//! cloud-init in the installed system, and its search for data on the boot partition.
//!
//! Its data source NoCloud mounts the file system with a certain label and reads `user-data` and `meta-data` there, which
//! must both be present (cloud-init's documentation, "NoCloud", and `cloudinit/sources/DataSourceNoCloud.py`). The label is
//! `CIDATA` or `cidata` unless the configuration says another (`datasource: NoCloud: fs_label`: images of Ubuntu for the Pi
//! say `system-boot`). With `seedfrom` (images of Raspberry Pi OS) it reads a folder, and needs no label.

use std::io::Result;
use std::path::Path;

use crate::system::rooted::{Kind, Rooted};

/// The file that makes a boot partition one with data.
pub(super) const USER_DATA: &str = "user-data";
const CONFIGURATION: &str = "etc/cloud/cloud.cfg";
/// Folder of files that are read after it, in the order of their names: the last value counts.
const FOLDER: &str = "etc/cloud/cloud.cfg.d";
/// cloud-init does nothing if this file exists.
const DISABLED: &str = "etc/cloud/cloud-init.disabled";
const USUAL_LABEL: &str = "CIDATA";
/// Most bytes of a FAT's label.
const LABEL_MAX: usize = 11;

/// Returns true if the system has cloud-init, and it is not disabled.
pub(super) fn is_there(root: &Rooted) -> bool {
    root.is_dir("etc/cloud") && !root.is_there(DISABLED)
}

/// Returns the label of the boot partition with data that this root's cloud-init looks for; `None`: it needs none.
pub(super) fn label(root: &Rooted) -> Result<Option<String>> {
    if !is_there(root) {
        return Ok(None);
    }
    let (mut label, mut folder) = (None, None);
    let files = root.list(FOLDER)?.into_iter().filter(|(name, kind)| {
        // cloud-init reads no others. A README may show the key as an example.
        matches!(kind, Kind::File | Kind::Link) && Path::new(name).extension().is_some_and(|ending| ending == "cfg")
    });
    for path in [CONFIGURATION.into()].into_iter().chain(files.map(|(name, _)| Path::new(FOLDER).join(name))) {
        let text = root.read(&path)?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        label = last_value(&text, "fs_label").or(label);
        folder = last_value(&text, "seedfrom").or(folder);
    }
    // It reads a folder then, and looks for no label.
    if folder.is_some_and(|folder| folder.starts_with('/') || folder.starts_with("file:")) {
        return Ok(None);
    }
    let label = label.unwrap_or_else(|| USUAL_LABEL.to_owned());
    // YAML's words for nothing: it looks for no label then.
    if label.is_empty() || label == "~" || label.eq_ignore_ascii_case("null") || label == "None" {
        return Ok(None);
    }
    // Characters that mkfs.vfat takes and a FAT holds (Microsoft's FAT32 File System Specification, 6.1).
    let fits = label.len() <= LABEL_MAX
        && label.bytes().all(|byte| matches!(byte, 0x20..=0x7e) && !b"\"*+,./:;<=>?[\\]|".contains(&byte));
    if !fits {
        // Not an error: the system works, only without the data.
        tracing::warn!(label, "cloud-init of the image looks for a label that a FAT cannot have");
    }
    Ok(fits.then_some(label))
}

/// Writes `meta-data`, without which cloud-init ignores `user-data`. The instance is the node: with another one for the
/// same system cloud-init would set everything up again.
pub(super) fn complete(boot: &Rooted, node: &str) -> Result<()> {
    if boot.is_there(USER_DATA) && !boot.is_there("meta-data") {
        boot.write("meta-data", format!("instance-id: {node}\n").as_bytes(), 0o700)?;
    }
    Ok(())
}

/// Returns the last value of a key in a YAML text, in block or flow style. Enough for two keys that stand nowhere but
/// below `NoCloud`, and have a word as their value.
fn last_value(text: &str, key: &str) -> Option<String> {
    text.lines().rev().find_map(|line| {
        // In YAML a `#` begins a comment only after white space.
        let line = line.find(" #").and_then(|at| line.get(..at)).unwrap_or(line);
        if line.trim_start().starts_with('#') {
            return None;
        }
        let (before, after) = line.rsplit_once(key)?;
        let alone =
            before.trim_end_matches(['"', '\'']).chars().next_back().is_none_or(|c| matches!(c, ' ' | '{' | ','));
        let value = after.trim_start_matches(['"', '\'']).trim_start().strip_prefix(':')?;
        let value = value.split([',', '}']).next().unwrap_or_default().trim();
        alone.then(|| value.trim_matches(['"', '\'']).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{complete, label, last_value};
    use crate::system::rooted::Rooted;

    /// The label that cloud-init with these files looks for.
    fn with(files: &[(&str, &str)]) -> Option<String> {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join("etc/cloud").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        label(&Rooted::open(root.path()).unwrap()).unwrap()
    }

    const UBUNTU: &str = "# configure cloud-init for NoCloud\ndatasource_list: [ NoCloud ]\ndatasource:\n  NoCloud:\n    \
                          fs_label: system-boot\n";
    const RASPBERRY_PI_OS: &str = "datasource_list: [ NoCloud, None ]\ndatasource:\n  NoCloud:\n    \
                                   seedfrom: file:///boot/firmware\n";

    #[test]
    fn cloud_init_finds_its_data_by_the_label_that_it_looks_for() {
        assert_eq!(with(&[]), None, "there is no cloud-init");
        assert_eq!(with(&[("cloud.cfg", "users: [default]\n")]).as_deref(), Some("CIDATA"));
        assert_eq!(with(&[("cloud.cfg.d/README", "fs_label: wrong\n")]).as_deref(), Some("CIDATA"));
        assert_eq!(
            with(&[("cloud.cfg", ""), ("cloud.cfg.d/99-fake-cloud.cfg", UBUNTU)]).as_deref(),
            Some("system-boot")
        );
        assert_eq!(with(&[("cloud.cfg", ""), ("cloud.cfg.d/99_raspberry-pi.cfg", RASPBERRY_PI_OS)]), None);
        assert_eq!(with(&[("cloud.cfg", UBUNTU), ("cloud-init.disabled", "")]), None);
        // The last value in the order of names counts, not in that of the disk.
        let files =
            [("cloud.cfg.d/90.cfg", UBUNTU), ("cloud.cfg.d/10.cfg", "fs_label: ten"), ("cloud.cfg", "fs_label: x")];
        assert_eq!(with(&files).as_deref(), Some("system-boot"));
        for none in ["null", "~", "''", "a-label-that-is-too-long", "a/b"] {
            assert_eq!(with(&[("cloud.cfg", &format!("fs_label: {none}"))]), None, "{none}");
        }
    }

    #[test]
    fn a_value_is_found_however_it_is_written() {
        for text in [
            "fs_label: boot",
            "  fs_label:boot  # as Ubuntu has it",
            "datasource: { NoCloud: { fs_label: 'boot', x: y } }",
            "\"fs_label\": \"boot\"\n# fs_label: other",
            "fs_label: other\nfs_label: boot\nmy_fs_label: wrong\n",
        ] {
            assert_eq!(last_value(text, "fs_label").as_deref(), Some("boot"), "{text}");
        }
        for text in ["", "fs_labels: boot", "#fs_label: boot", "the fs_label is boot"] {
            assert_eq!(last_value(text, "fs_label"), None, "{text}");
        }
    }

    #[test]
    fn data_without_an_instance_gets_one_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let boot = Rooted::open(folder.path()).unwrap();
        let meta = || fs::read_to_string(folder.path().join("meta-data")).ok();
        complete(&boot, "pi-01").unwrap();
        assert_eq!(meta(), None, "nobody gave it data");
        fs::write(folder.path().join("user-data"), "#cloud-config\n").unwrap();
        complete(&boot, "pi-01").unwrap();
        assert_eq!(meta().as_deref(), Some("instance-id: pi-01\n"));
        fs::write(folder.path().join("meta-data"), "instance_id: theirs\n").unwrap();
        complete(&boot, "pi-01").unwrap();
        assert_eq!(meta().as_deref(), Some("instance_id: theirs\n"));
    }
}
