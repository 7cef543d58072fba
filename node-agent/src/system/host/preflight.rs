//! Checks that an update can begin, with everything that is known before it. Nothing is written.

use std::path::Path;

use super::board::cell;
use crate::system::{Board, Card, Refusal, drivers};

/// Bytes that must be free on the recovery partition for another installer set.
const SET_ROOM: u64 = 64 << 20;
/// Bytes of memory that the installer needs: its unpacked set, an image's compression window, and itself.
const MEMORY: u64 = 200 << 20;
/// Unix time of 2022-12-01: boot loaders of a Pi 4 read `autoboot.txt` from then on.
const PI4_LOADER: u32 = 1_669_852_800;

/// Runs all checks, the most certain reason first. `stock`: result of planning the installer's layout on a
/// stock card; `None` for other cards. An emulated board has no firmware to check.
pub(super) fn check(
    sysroot: &Path,
    board: &Board,
    card: Option<&Card>,
    stock: Option<Result<(), Refusal>>,
    emulated: bool,
) -> Result<(), Refusal> {
    let Some(card) = card else {
        return refuse(
            "LAYOUT_NOT_RESIDENT",
            "the root of this machine is neither on a card that the Marco installer has laid out nor on a stock one (a \
             mounted FAT boot partition and a root, nothing else): install it with a card of `marcoctl card write`"
                .into(),
        );
    };
    if !emulated {
        firmware(sysroot, board)?;
        under_voltage(sysroot)?;
    }
    if let Some(plan) = stock {
        plan?;
    }
    room(&card.recovery)?;
    crate::system::check_settings(&card.recovery)?;
    if board.memory_bytes < MEMORY {
        let message = format!(
            "the board has {} MiB of memory, and the installer needs {} MiB",
            board.memory_bytes >> 20,
            MEMORY >> 20
        );
        return refuse("NOT_ENOUGH_MEMORY", message);
    }
    wired(sysroot)
}

fn refuse(reason: &'static str, message: String) -> Result<(), Refusal> {
    Err(Refusal { reason, message })
}

/// Checks that a trial boot works: the kernel must pass on the reboot's argument, and the firmware must obey it.
fn firmware(sysroot: &Path, board: &Board) -> Result<(), Refusal> {
    let loader = sysroot.join("proc/device-tree/chosen/bootloader");
    if cell(&loader.join("partition")).is_none() || cell(&loader.join("tryboot")).is_none() {
        let message = "the firmware does not say what it booted, so a trial boot could not be told from any other: this \
                       is no Raspberry Pi, or its firmware is too old";
        return refuse("FIRMWARE_TOO_OLD", message.into());
    }
    // Only the vendor's kernel has it, and only that kernel passes on the argument of a reboot.
    if !sysroot.join("dev/vcio").exists() {
        let message = "the running kernel has no Raspberry Pi firmware interface (/dev/vcio), and so cannot ask for a \
                       trial boot: use the vendor's kernel (linux-image-rpi, linux-rpi) instead of a generic one";
        return refuse("TRIAL_BOOT_UNUSABLE", message.into());
    }
    match cell(&loader.join("build-timestamp")) {
        // Only a Pi 4 can have a boot loader that old.
        Some(built) if board.family == "pi4" && built < PI4_LOADER => {
            let message = "the boot loader in the board's EEPROM is older than 2022-12-01, and does not know \
                           autoboot.txt's sections: run rpi-eeprom-update";
            refuse("BOOT_LOADER_TOO_OLD", message.into())
        }
        _ => Ok(()),
    }
}

/// Says what a trial needs and the running kernel does not show. The new system's kernel may differ.
pub(super) fn trial_lacks(sysroot: &Path) -> Option<&'static str> {
    let found = std::fs::read_dir(sysroot.join("sys/class/watchdog")).is_ok_and(|mut devices| devices.next().is_some());
    if !found {
        return Some(
            "no watchdog: a new system whose kernel hangs on trial waits until the power is switched off and on",
        );
    }
    let release = std::fs::read_to_string(sysroot.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let built_in = sysroot.join(drivers::MODULES).join(release.trim()).join(drivers::BUILT_IN);
    // An unreadable list tells nothing.
    let is_module = std::fs::read_to_string(built_in).is_ok_and(|list| !drivers::has_watchdog(&list));
    is_module.then_some(
        "the kernel has the watchdog's driver as a module: a new system with such a kernel that hangs on trial before the \
         driver is loaded waits until the power is switched off and on",
    )
}

/// Bit 0 of the firmware's throttling state means under-voltage at this moment.
pub(super) fn under_voltage(sysroot: &Path) -> Result<(), Refusal> {
    let path = sysroot.join("sys/devices/platform/soc/soc:firmware/get_throttled");
    let state = std::fs::read_to_string(path).unwrap_or_default();
    let state = u32::from_str_radix(state.trim().trim_start_matches("0x"), 16).unwrap_or_default();
    // Kernels without that file report the state as an alarm of the driver `rpi_volt`.
    let alarm = |folder: &Path| {
        let read = |name| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        read("name").trim() == "rpi_volt" && read("in0_lcrit_alarm").trim() == "1"
    };
    let monitors = std::fs::read_dir(sysroot.join("sys/class/hwmon")).into_iter().flatten().flatten();
    if state & 1 != 0 || monitors.map(|entry| entry.path()).any(|folder| alarm(&folder)) {
        let message =
            "the board's power supply is too weak at this moment (under-voltage): writing a card now may ruin it";
        return refuse("UNDER_VOLTAGE", message.into());
    }
    Ok(())
}

fn room(recovery: &Path) -> Result<(), Refusal> {
    match rustix::fs::statvfs(recovery).map(|found| found.f_bavail.saturating_mul(found.f_frsize)) {
        Ok(room) if room >= SET_ROOM => Ok(()),
        Ok(room) => {
            let message =
                format!("the recovery partition has {room} bytes free, and an installer set may take {SET_ROOM}");
            refuse("NO_ROOM", message)
        }
        Err(error) => {
            refuse("RECOVERY_PARTITION_UNREADABLE", format!("the recovery partition cannot be read: {error}"))
        }
    }
}

/// The installer has drivers and keys for a wired network only.
fn wired(sysroot: &Path) -> Result<(), Refusal> {
    let interfaces = std::fs::read_dir(sysroot.join("sys/class/net")).into_iter().flatten().flatten();
    let usable = |folder: &Path| {
        // An entry without a device is a bridge, a tunnel or the loopback.
        folder.join("device").exists()
            && !folder.join("wireless").exists()
            && !folder.join("phy80211").exists()
            && std::fs::read_to_string(folder.join("carrier")).is_ok_and(|carrier| carrier.trim() == "1")
    };
    if interfaces.map(|entry| entry.path()).any(|folder| usable(&folder)) {
        return Ok(());
    }
    let message = "no wired network interface has a carrier, and the installer needs one: plug in a cable";
    refuse("NO_WIRED_NETWORK", message.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tempfile::TempDir;

    use super::check;
    use crate::system::{Board, Card};

    fn put(root: &Path, path: &str, bytes: impl AsRef<[u8]>) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// A Pi 4 that passes all checks.
    fn good() -> (TempDir, Board, Card) {
        let root = TempDir::new().unwrap();
        let loader = "proc/device-tree/chosen/bootloader";
        for (name, value) in [("partition", 4_u32), ("tryboot", 0), ("build-timestamp", 1_700_000_000)] {
            put(root.path(), &format!("{loader}/{name}"), value.to_be_bytes());
        }
        put(root.path(), "dev/vcio", "");
        put(root.path(), "sys/class/net/eth0/device/uevent", "");
        put(root.path(), "sys/class/net/eth0/carrier", "1\n");
        put(root.path(), "sys/class/net/wlan0/device/uevent", "");
        put(root.path(), "sys/class/net/wlan0/wireless/x", "");
        put(root.path(), "sys/class/net/wlan0/carrier", "1\n");
        let board = Board { family: "pi4".into(), memory_bytes: 1 << 30, ..Board::default() };
        let path = root.path().to_owned();
        (root, board, Card { recovery: path.clone(), boot: path.clone(), root: path.clone(), home: path })
    }

    #[test]
    fn a_board_in_order_may_be_updated() {
        let (root, board, card) = good();
        assert_eq!(check(root.path(), &board, Some(&card), None, false), Ok(()));
    }

    #[test]
    fn each_fault_has_a_reason_of_its_own() {
        let reason =
            |root: &Path, board: &Board, card: Option<&Card>| check(root, board, card, None, false).unwrap_err().reason;
        let (root, board, card) = good();
        assert_eq!(reason(root.path(), &board, None), "LAYOUT_NOT_RESIDENT");
        let little = Board { memory_bytes: 128 << 20, ..board.clone() };
        assert_eq!(reason(root.path(), &little, Some(&card)), "NOT_ENOUGH_MEMORY");
        put(root.path(), "marco/install.toml", "[root]\ntype = \"ntfs\"\n");
        assert_eq!(reason(root.path(), &board, Some(&card)), "SETTINGS_WRONG");
        put(root.path(), "marco/install.toml", "[root]\nof_a_newer_agent = 1\n");
        assert_eq!(check(root.path(), &board, Some(&card), None, false), Ok(()));
        put(root.path(), "sys/class/net/eth0/carrier", "0\n");
        assert_eq!(reason(root.path(), &board, Some(&card)), "NO_WIRED_NETWORK", "wireless does not count");
        put(root.path(), "sys/class/hwmon/hwmon1/name", "rpi_volt\n");
        put(root.path(), "sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n");
        assert_eq!(reason(root.path(), &board, Some(&card)), "UNDER_VOLTAGE");
        let old = 1_600_000_000_u32.to_be_bytes();
        put(root.path(), "proc/device-tree/chosen/bootloader/build-timestamp", old);
        assert_eq!(reason(root.path(), &board, Some(&card)), "BOOT_LOADER_TOO_OLD");
        let five = Board { family: "pi5".into(), ..board.clone() };
        assert_eq!(reason(root.path(), &five, Some(&card)), "UNDER_VOLTAGE", "only a Pi 4 has such an old one");
        fs::remove_file(root.path().join("dev/vcio")).unwrap();
        assert_eq!(reason(root.path(), &board, Some(&card)), "TRIAL_BOOT_UNUSABLE");
        fs::remove_dir_all(root.path().join("proc/device-tree")).unwrap();
        assert_eq!(reason(root.path(), &board, Some(&card)), "FIRMWARE_TOO_OLD");
    }

    #[test]
    fn an_emulated_board_is_not_asked_for_its_firmware() {
        let (root, board, card) = good();
        fs::remove_dir_all(root.path().join("proc/device-tree")).unwrap();
        assert_eq!(check(root.path(), &board, Some(&card), None, true), Ok(()));
    }

    #[test]
    fn kernel_without_a_watchdog_is_told() {
        let root = tempfile::tempdir().unwrap();
        assert!(super::trial_lacks(root.path()).is_some_and(|said| said.contains("no watchdog")));
        fs::create_dir_all(root.path().join("sys/class/watchdog")).unwrap();
        assert!(super::trial_lacks(root.path()).is_some(), "no driver is loaded");
        fs::create_dir_all(root.path().join("sys/class/watchdog/watchdog0")).unwrap();
        assert_eq!(super::trial_lacks(root.path()), None);
        let modules = root.path().join("lib/modules/6.1-arm64");
        for folder in [&root.path().join("proc/sys/kernel"), &modules] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(root.path().join("proc/sys/kernel/osrelease"), "6.1-arm64\n").unwrap();
        fs::write(modules.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        assert!(super::trial_lacks(root.path()).is_some_and(|said| said.contains("as a module")));
        fs::write(modules.join("modules.builtin"), "kernel/drivers/watchdog/bcm2835_wdt.ko\n").unwrap();
        assert_eq!(super::trial_lacks(root.path()), None);
    }
}
