//! Whether a set of boot files can boot.

use crate::{Refused, ZipSummary};

/// Whether a zip is a set that starts the installer from a folder named by `os_prefix`.
///
/// # Errors
/// The first thing that it lacks.
pub fn check_installer_set(zip: &ZipSummary) -> Result<(), Refused> {
    todo!("{zip:?}")
}

/// Whether a zip is the boot partition of an operating system.
///
/// # Errors
/// The first thing that it lacks.
pub fn check_system_set(zip: &ZipSummary) -> Result<(), Refused> {
    todo!("{zip:?}")
}
