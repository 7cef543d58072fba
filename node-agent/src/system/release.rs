//! `/etc/marco-release`: the installation that a system comes from.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::SystemError;
use super::rooted::Rooted;

/// Record of the installation, relative to the root.
pub const ROOT_FILE: &str = "etc/marco-release";
/// Record of the last boot files, relative to the boot partition. Replacing only boot files does not touch the root, so
/// the record cannot be there.
pub const BOOT_FILE: &str = "marco-release";

/// The installation that a system comes from. The file holds it as TOML.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Release {
    /// Name of the execution that installed the system or, last, its boot files.
    pub execution: String,
    /// SHA-256 of the image. Empty: Marco did not install the image.
    pub image_sha256: String,
    /// SHA-256 of the boot files that replaced the image's own. Empty: they are the image's.
    pub boot_sha256: String,
    /// Time of the installation, RFC 3339, by the controller's clock.
    pub time: String,
}

impl Release {
    /// Reads both records. The image is the root's; the rest is the boot partition's, which every installation writes.
    pub fn read(root: &Path, boot: Option<&Path>) -> Result<Option<Self>, SystemError> {
        let root = parse(root, ROOT_FILE)?;
        let boot = boot.map(|boot| parse(boot, BOOT_FILE)).transpose()?.flatten();
        Ok(match (root, boot) {
            (root, None) => root,
            // Boot files were replaced in a system that Marco did not install: its image is unknown.
            (None, Some(boot)) => Some(Self { image_sha256: String::new(), ..boot }),
            (Some(root), Some(boot)) => Some(Self { image_sha256: root.image_sha256, ..boot }),
        })
    }

    /// The contents of the file, as TOML.
    pub fn render(&self) -> Result<String, SystemError> {
        toml::to_string(self).map_err(|error| SystemError::Invalid(format!("cannot write the release: {error}")))
    }
}

/// A file that cannot be read as a release (torn, or not Marco's) counts as none.
fn parse(root: &Path, file: &str) -> Result<Option<Release>, SystemError> {
    let bytes =
        Rooted::open(root).and_then(|root| root.read(file)).map_err(SystemError::io("read", root.join(file)))?;
    Ok(bytes.and_then(|bytes| toml::from_str(&String::from_utf8_lossy(&bytes)).ok()))
}

#[cfg(test)]
mod tests {
    use super::{BOOT_FILE, ROOT_FILE, Release};

    fn release(execution: &str, image: &str, boot: &str) -> Release {
        Release { execution: execution.into(), image_sha256: image.into(), boot_sha256: boot.into(), time: "t".into() }
    }

    #[test]
    fn recorded_release_is_read_and_written_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let today = include_str!("../../testdata/card/release-1.toml");
        let read = |text: &str| {
            std::fs::write(root.path().join(ROOT_FILE), text).unwrap();
            Release::read(root.path(), None).unwrap().unwrap()
        };
        let release = read(today);
        assert!(release.execution.ends_with("/pi-01") && release.time == "2026-11-30T08:00:00Z");
        assert_eq!(release.render().unwrap(), today);
        assert_eq!(read(include_str!("../../testdata/card/release-next.toml")), release);
    }

    #[test]
    fn boot_files_replaced_later_count_with_the_image_of_the_root() {
        let (root, boot) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(root.path().join("etc")).unwrap();
        assert_eq!(Release::read(root.path(), Some(boot.path())).unwrap(), None);
        std::fs::write(root.path().join(ROOT_FILE), release("one", "image", "").render().unwrap()).unwrap();
        std::fs::write(boot.path().join(BOOT_FILE), release("two", "", "boot").render().unwrap()).unwrap();
        let read = Release::read(root.path(), Some(boot.path())).unwrap().unwrap();
        assert_eq!(read, release("two", "image", "boot"));
    }
}
