//! `/etc/marco-release`: which installation a system comes from.

use std::path::Path;

use super::SystemError;

/// Which installation a system comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// Name of the execution that installed the system or, last, its boot files.
    pub execution: String,
    /// SHA-256 of the image; empty when no image was installed by us.
    pub image_sha256: String,
    /// SHA-256 of the boot files that replaced the image's own; empty when they are the image's.
    pub boot_sha256: String,
    /// When, RFC 3339, by the controller's time.
    pub time: String,
}

impl Release {
    /// Reads what the root's `etc/marco-release` and the boot partition's `marco-release` say together.
    pub fn read(_root: &Path, _boot: Option<&Path>) -> Result<Option<Self>, SystemError> {
        todo!()
    }
}
