//! Replaces a Raspberry Pi's firmware in an emulated machine, which has none. Only the kernel's command line enables
//! it, and a real board refuses it, since its own firmware reports the boot.
//!
//! - `marco.test_firmware=PARTITION,TRYBOOT`: the boot, `1,0` or `4,1`.
//! - `marco.test_board=FAMILY` and `marco.test_serial=HEX`: the board.
//! - `marco.join=BASE64`: a join file, for a disk without a recovery partition.
//!
//! Right before a restart the agent writes `marco-test-firmware: tryboot` or `marco-test-firmware: reboot` to the
//! console. The emulator reads there what to boot next.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Board, Booted, Reboot};

/// The settings on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TestFirmware {
    /// The boot that the emulator reports.
    pub(crate) booted: Booted,
    family: Option<String>,
    serial: Option<String>,
    /// A join file for a blank disk.
    pub(crate) join: Option<String>,
    console: PathBuf,
}

impl TestFirmware {
    /// Reads `/proc/cmdline` below this root. `None`: not enabled, or a real board.
    pub(crate) fn find(sysroot: &Path) -> Option<Self> {
        // The command line of a real board is on the card, which an image can write.
        if sysroot.join("proc/device-tree/chosen/bootloader").exists() {
            return None;
        }
        Self::parse(&std::fs::read_to_string(sysroot.join("proc/cmdline")).ok()?, &sysroot.join("dev/console"))
    }

    fn parse(cmdline: &str, console: &Path) -> Option<Self> {
        // The last one counts, as for most of the kernel's own parameters.
        let word = |key: &str| cmdline.split_whitespace().rev().find_map(|word| word.strip_prefix(key));
        let (partition, tryboot) = word("marco.test_firmware=")?.split_once(',')?;
        let join = word("marco.join=").and_then(|text| STANDARD.decode(text).ok());
        Some(Self {
            booted: Booted { partition: partition.parse().ok()?, tryboot: tryboot == "1" },
            family: word("marco.test_board=").map(str::to_owned),
            serial: word("marco.test_serial=").map(str::to_owned),
            join: join.and_then(|bytes| String::from_utf8(bytes).ok()),
            console: console.to_owned(),
        })
    }

    /// Replaces the facts of the board by those on the command line.
    pub(crate) fn board(&self, found: Board) -> Board {
        let mut board = found;
        if let Some(family) = &self.family {
            board.model = format!("Marco test board ({family})");
            board.family.clone_from(family);
        }
        if let Some(serial) = &self.serial {
            board.serial.clone_from(serial);
        }
        board
    }

    /// Writes the kind of restart to the console. A failure is only logged: the machine goes down anyway.
    pub(crate) fn announce(&self, how: Reboot) {
        let word = match how {
            Reboot::Plain => "reboot",
            Reboot::TryBoot => "tryboot",
        };
        let said = std::fs::OpenOptions::new()
            .write(true)
            .open(&self.console)
            .and_then(|mut console| console.write_all(format!("\nmarco-test-firmware: {word}\n").as_bytes()));
        if let Err(error) = said {
            tracing::warn!(error = %error, "console not writable");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::TestFirmware;
    use crate::system::{Board, Booted, Reboot};

    #[test]
    fn the_command_line_alone_switches_it_on_and_a_real_board_refuses_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::create_dir_all(root.path().join("dev")).unwrap();
        fs::write(root.path().join("dev/console"), "").unwrap();
        fs::write(root.path().join("proc/cmdline"), "console=ttyS0 quiet\n").unwrap();
        assert_eq!(TestFirmware::find(root.path()), None);
        let line = "console=ttyS0 marco.test_firmware=4,1 marco.test_board=pi4 marco.test_serial=10000000abcdef01\n";
        fs::write(root.path().join("proc/cmdline"), line).unwrap();
        let found = TestFirmware::find(root.path()).unwrap();
        assert_eq!(found.booted, Booted { partition: 4, tryboot: true });
        let board = found.board(Board::default());
        assert_eq!((board.family.as_str(), board.serial.as_str()), ("pi4", "10000000abcdef01"));
        assert_eq!(board.device_tree(), Some("bcm2711-rpi-4-b.dtb"));
        found.announce(Reboot::TryBoot);
        assert_eq!(fs::read_to_string(root.path().join("dev/console")).unwrap(), "\nmarco-test-firmware: tryboot\n");
        fs::create_dir_all(root.path().join("proc/device-tree/chosen/bootloader")).unwrap();
        assert_eq!(TestFirmware::find(root.path()), None);
    }
}
