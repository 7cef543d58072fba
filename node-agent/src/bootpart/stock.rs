//! The boot partition of a stock card, which has no other: the installer's set lies beside the system's boot files, and a
//! complete `tryboot.txt` starts it once. Nothing that the firmware or the system boots from is changed by that.

use std::path::Path;

use marco_archive::config_txt::{Conditions, ConfigTxt};

use super::file::{read_whole, remove_file};
use super::{BootError, render, write_whole};

const TRYBOOT: &str = "tryboot.txt";
const AUTOBOOT: &str = "autoboot.txt";
/// Where somebody else's files wait.
const AUTOBOOT_ASIDE: &str = "marco/autoboot.stock";
const CONFIG_ASIDE: &str = "marco/config.stock";

/// Makes a trial boot start this configuration. An `autoboot.txt` under which a trial boot would look elsewhere is set
/// aside first; one by which the card boots from another partition is refused.
pub(super) fn name_for_tryboot(boot: &Path, config: &[u8]) -> Result<(), BootError> {
    if let Some(text) = read_whole(&boot.join(AUTOBOOT))? {
        let autoboot = ConfigTxt::parse(&String::from_utf8_lossy(&text));
        let usual = Conditions::default();
        let get = |key| autoboot.get(key, &usual).map(str::trim);
        if get("boot_partition").is_some_and(|partition| !["", "0", "1"].contains(&partition)) {
            let message =
                "the card's autoboot.txt makes it boot from another partition, which is not a stock card's way";
            return Err(BootError::Refused(message.into()));
        }
        if get("tryboot_a_b") == Some("1") {
            write_whole(&boot.join(AUTOBOOT_ASIDE), &text)?;
            remove_file(&boot.join(AUTOBOOT))?;
        }
    }
    write_whole(&boot.join(TRYBOOT), config)
}

/// Keeps the system's own configuration for people, before the installer's takes its place.
pub(super) fn set_config_aside(boot: &Path) -> Result<(), BootError> {
    match read_whole(&boot.join("config.txt"))? {
        Some(text) => write_whole(&boot.join(CONFIG_ASIDE), &text),
        None => Ok(()),
    }
}

/// Takes the trial boot back; on a card that is still stock, everything is as it was.
pub(super) fn withdraw_tryboot(boot: &Path, still_stock: bool) -> Result<(), BootError> {
    let ours = read_whole(&boot.join(TRYBOOT))?.is_some_and(|text| text.starts_with(render::HEAD.as_bytes()));
    if ours {
        remove_file(&boot.join(TRYBOOT))?;
    }
    if let Some(text) = read_whole(&boot.join(AUTOBOOT_ASIDE))? {
        if still_stock {
            write_whole(&boot.join(AUTOBOOT), &text)?;
        }
        remove_file(&boot.join(AUTOBOOT_ASIDE))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{name_for_tryboot, withdraw_tryboot};
    use crate::bootpart::render::HEAD;

    #[test]
    fn an_autoboot_that_would_mislead_the_trial_is_set_aside_and_comes_back() {
        let boot = tempfile::tempdir().unwrap();
        fs::create_dir(boot.path().join("marco")).unwrap();
        let text = "[all]\ntryboot_a_b=1\n[tryboot]\nboot_partition=3\n";
        fs::write(boot.path().join("autoboot.txt"), text).unwrap();
        name_for_tryboot(boot.path(), HEAD.as_bytes()).unwrap();
        assert!(boot.path().join("tryboot.txt").exists() && !boot.path().join("autoboot.txt").exists());
        withdraw_tryboot(boot.path(), true).unwrap();
        assert_eq!(fs::read_to_string(boot.path().join("autoboot.txt")).unwrap(), text);
        assert!(!boot.path().join("tryboot.txt").exists());
    }

    #[test]
    fn a_card_that_boots_elsewhere_is_refused_and_somebody_elses_tryboot_stays() {
        let boot = tempfile::tempdir().unwrap();
        fs::write(boot.path().join("autoboot.txt"), "[all]\nboot_partition=2\n").unwrap();
        assert!(name_for_tryboot(boot.path(), HEAD.as_bytes()).is_err());
        fs::write(boot.path().join("tryboot.txt"), "arm_64bit=1\n").unwrap();
        withdraw_tryboot(boot.path(), true).unwrap();
        assert!(boot.path().join("tryboot.txt").exists());
    }
}
