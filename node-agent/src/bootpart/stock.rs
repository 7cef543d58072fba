//! The boot partition of a stock card, which has no other. The installer's set lies beside the system's boot files, and
//! a complete `tryboot.txt` starts it once. The files that the firmware and the system boot from do not change.

use std::path::Path;

use marco_archive::config_txt::{Conditions, ConfigTxt};

use super::file::{read_whole, remove_file};
use super::{BootError, render, write_whole};

const TRYBOOT: &str = "tryboot.txt";
const AUTOBOOT: &str = "autoboot.txt";
/// Copies of the owner's files.
const TRYBOOT_ASIDE: &str = "marco/tryboot.stock";
const AUTOBOOT_ASIDE: &str = "marco/autoboot.stock";
const CONFIG_ASIDE: &str = "marco/config.stock";

/// Makes a trial boot start this configuration. An `autoboot.txt` that leads a trial boot elsewhere and the owner's own
/// `tryboot.txt` are set aside first. Returns an error for a card that boots from another partition.
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
    if let Some(text) = read_whole(&boot.join(TRYBOOT))?.filter(|text| !is_ours(text)) {
        // The copy is the owner's file. The present file is the owner's too if the copy is its beginning: then a power
        // cut left the copy incomplete. Otherwise a power cut left the present file half overwritten by the agent's.
        let aside = read_whole(&boot.join(TRYBOOT_ASIDE))?;
        if aside.is_none_or(|aside| text.starts_with(&aside)) {
            write_whole(&boot.join(TRYBOOT_ASIDE), &text)?;
        }
    }
    write_whole(&boot.join(TRYBOOT), config)
}

/// True for the agent's `tryboot.txt`, or the beginning of one that a power cut left.
fn is_ours(text: &[u8]) -> bool {
    let head = render::HEAD.as_bytes();
    text.starts_with(head) || head.starts_with(text)
}

/// Keeps a copy of the system's own `config.txt` for the owner, before the installer's replaces it.
pub(super) fn set_config_aside(boot: &Path) -> Result<(), BootError> {
    match read_whole(&boot.join("config.txt"))? {
        Some(text) => write_whole(&boot.join(CONFIG_ASIDE), &text),
        None => Ok(()),
    }
}

/// Undoes [`name_for_tryboot`]. On a card that is still stock, the owner's files come back.
pub(super) fn withdraw_tryboot(boot: &Path, still_stock: bool) -> Result<(), BootError> {
    if read_whole(&boot.join(TRYBOOT))?.is_some_and(|text| is_ours(&text)) {
        remove_file(&boot.join(TRYBOOT))?;
    }
    for (name, aside) in [(TRYBOOT, TRYBOOT_ASIDE), (AUTOBOOT, AUTOBOOT_ASIDE)] {
        if let Some(text) = read_whole(&boot.join(aside))? {
            // On a laid-out card the owner's files would start a system that is gone.
            if still_stock {
                write_whole(&boot.join(name), &text)?;
            }
            remove_file(&boot.join(aside))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{name_for_tryboot, withdraw_tryboot};
    use crate::bootpart::render::HEAD;

    /// A card with an owner's `tryboot.txt`.
    fn card(text: &str) -> tempfile::TempDir {
        let boot = tempfile::tempdir().unwrap();
        fs::create_dir(boot.path().join("marco")).unwrap();
        fs::write(boot.path().join("tryboot.txt"), text).unwrap();
        boot
    }

    #[test]
    fn somebody_elses_tryboot_is_set_aside_and_comes_back() {
        let theirs = "arm_64bit=1\nos_prefix=new/\n";
        let boot = card(theirs);
        let read = |name: &str| fs::read_to_string(boot.path().join(name)).ok();
        let ours = format!("{HEAD}os_prefix=b0/\n");
        // Twice, as after a power cut.
        for _ in 0..2 {
            name_for_tryboot(boot.path(), ours.as_bytes()).unwrap();
            assert_eq!(read("tryboot.txt").as_deref(), Some(ours.as_str()));
            assert_eq!(read("marco/tryboot.stock").as_deref(), Some(theirs));
        }
        withdraw_tryboot(boot.path(), true).unwrap();
        assert_eq!((read("tryboot.txt").as_deref(), read("marco/tryboot.stock")), (Some(theirs), None));
        withdraw_tryboot(boot.path(), true).unwrap();
        assert_eq!(read("tryboot.txt").as_deref(), Some(theirs));

        // On a card that Marco has laid out, the owner's file would start a system that is gone.
        name_for_tryboot(boot.path(), ours.as_bytes()).unwrap();
        withdraw_tryboot(boot.path(), false).unwrap();
        assert_eq!((read("tryboot.txt"), read("marco/tryboot.stock")), (None, None));
    }

    #[test]
    fn what_a_cut_left_of_either_file_is_not_taken_for_the_whole() {
        let theirs = "arm_64bit=1\nos_prefix=new/\n";
        let ours = format!("{HEAD}os_prefix=b0/\n");
        // Cut while the owner's file was set aside, or while the agent's was written over it: nothing yet, a part of
        // it, or the sectors' old contents.
        let (torn, garbage) = (HEAD.get(..5).unwrap(), "\0\0\0\0");
        for (aside, tryboot) in [("arm_64", theirs), (theirs, ""), (theirs, torn), (theirs, garbage)] {
            let boot = card(tryboot);
            fs::write(boot.path().join("marco/tryboot.stock"), aside).unwrap();
            name_for_tryboot(boot.path(), ours.as_bytes()).unwrap();
            withdraw_tryboot(boot.path(), true).unwrap();
            assert_eq!(fs::read_to_string(boot.path().join("tryboot.txt")).unwrap(), theirs, "{tryboot:?}");
        }
    }

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
