use std::fs;

use tempfile::TempDir;

use super::{Boot, Mixed, Model, Outcome, PI_4, Partitions, boot};

const AUTOBOOT: &str = "[all]\ntryboot_a_b=1\nboot_partition=4\n[tryboot]\nboot_partition=1\n";

/// A card with a complete system in p4 and complete sets in b0 and b1 of p1, of which b0 is the default.
struct Card(TempDir);

impl Card {
    fn new() -> Self {
        let card = Self(TempDir::new().unwrap());
        card.put("p1/autoboot.txt", AUTOBOOT);
        card.put("p1/config.txt", "[all]\nos_prefix=b0/\ninitramfs old.img followkernel\n[tryboot]\nos_prefix=b1/\ninitramfs init.img followkernel\n");
        for set in ["p1/b0", "p1/b1", "p4"] {
            for file in ["kernel8.img", "bcm2711-rpi-4-b.dtb", "cmdline.txt", "init.img", "overlays/README"] {
                card.put(&format!("{set}/{file}"), set);
            }
        }
        card.put("p1/b0/old.img", "p1/b0");
        card.put("p4/config.txt", "arm_64bit=1\n");
        card
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.0.path().join(path)).unwrap();
    }

    fn boot(&self, tryboot: bool) -> Outcome {
        self.boot_on(&PI_4, tryboot)
    }

    fn boot_on(&self, model: &Model, tryboot: bool) -> Outcome {
        let (recovery, system) = (self.0.path().join("p1"), self.0.path().join("p4"));
        boot(model, Partitions { recovery: &recovery, boot: &system }, tryboot)
    }

    fn booted(&self, tryboot: bool) -> Boot {
        match self.boot(tryboot) {
            Outcome::Booted(boot) => boot,
            Outcome::Dead(reason) => panic!("dead: {reason}"),
        }
    }

    fn dead(&self, tryboot: bool) -> String {
        match self.boot(tryboot) {
            Outcome::Dead(reason) => reason,
            Outcome::Booted(boot) => panic!("booted: {boot:?}"),
        }
    }
}

#[test]
fn the_default_partition_boots() {
    let boot = Card::new().booted(false);
    assert_eq!((boot.partition, boot.tryboot), (4, false));
    assert_eq!(boot.kernel.to_str(), Some("kernel8.img"));
    assert_eq!(boot.mixed, []);
}

#[test]
fn a_trial_boot_takes_the_other_partition() {
    let boot = Card::new().booted(true);
    assert_eq!((boot.partition, boot.tryboot), (1, true));
}

#[test]
fn a_trial_boot_of_p1_takes_the_set_named_for_it() {
    let boot = Card::new().booted(true);
    assert_eq!(boot.prefix, "b1/");
    assert_eq!(boot.cmdline, "p1/b1");
    assert_eq!(boot.initramfs.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(), ["b1/init.img"]);
}

#[test]
fn with_the_installer_as_default_a_trial_boot_takes_the_system() {
    let card = Card::new();
    card.put("p1/autoboot.txt", "[all]\ntryboot_a_b=1\nboot_partition=1\n[tryboot]\nboot_partition=4\n");
    assert_eq!((card.booted(false).partition, card.booted(false).prefix.as_str()), (1, "b0/"));
    assert_eq!(card.booted(true).partition, 4);
}

#[test]
fn without_autoboot_the_first_fat_boots() {
    let card = Card::new();
    card.remove("p1/autoboot.txt");
    assert_eq!((card.booted(false).partition, card.booted(false).prefix.as_str()), (1, "b0/"));
}

#[test]
fn a_torn_autoboot_boots_the_first_fat() {
    for torn in ["", "[al", "[all]\ntryboot_a_b=1\nboot_part", "\0\0\0\0\0\0\0\0"] {
        let card = Card::new();
        card.put("p1/autoboot.txt", torn);
        assert_eq!(card.booted(false).partition, 1, "{torn:?}");
    }
}

#[test]
fn only_the_first_512_bytes_of_autoboot_count() {
    let card = Card::new();
    // The settings begin behind the first 512 bytes.
    card.put("p1/autoboot.txt", &format!("{}\n{AUTOBOOT}", "#".repeat(511)));
    assert_eq!(card.booted(false).partition, 1);
}

#[test]
fn without_tryboot_a_b_a_trial_boot_reads_tryboot_txt() {
    let card = Card::new();
    card.put("p1/autoboot.txt", "boot_partition=4\n");
    assert!(card.dead(true).contains("tryboot.txt"));
    card.put("p4/tryboot.txt", "os_prefix=new/\n");
    for file in ["kernel8.img", "bcm2711-rpi-4-b.dtb", "cmdline.txt", "overlays/README"] {
        card.put(&format!("p4/new/{file}"), "new");
    }
    assert_eq!(card.booted(true).prefix, "new/");
    assert_eq!(card.booted(false).prefix, "");
}

#[test]
fn a_prefix_without_kernel_or_device_tree_is_ignored() {
    for missing in ["kernel8.img", "bcm2711-rpi-4-b.dtb"] {
        let card = Card::new();
        card.remove(&format!("p1/b1/{missing}"));
        assert!(card.dead(true).contains("kernel"), "p1 itself has no kernel to fall back to");
        for file in ["kernel8.img", "bcm2711-rpi-4-b.dtb", "cmdline.txt", "init.img"] {
            card.put(&format!("p1/{file}"), "stale");
        }
        let boot = card.booted(true);
        assert_eq!((boot.prefix.as_str(), boot.cmdline.as_str()), ("", "stale"));
        assert_eq!(boot.mixed, [Mixed::PrefixIgnored]);
    }
}

#[test]
fn overlays_come_from_the_root_unless_the_set_has_their_readme() {
    let card = Card::new();
    card.remove("p1/b1/overlays/README");
    assert_eq!(card.booted(true).mixed, [Mixed::OverlaysFromRoot]);
}

#[test]
fn configuration_never_comes_from_a_prefix() {
    let card = Card::new();
    // The firmware reads these files only in the root of a partition.
    card.put("p1/b0/config.txt", "kernel=other.img\n");
    card.put("p1/b0/autoboot.txt", "boot_partition=1\n");
    assert_eq!(card.booted(false).partition, 4);
    card.remove("p1/autoboot.txt");
    assert_eq!(card.booted(false).kernel.to_str(), Some("b0/kernel8.img"));
    card.remove("p1/config.txt");
    assert!(card.dead(false).contains("config.txt"));
}

#[test]
fn filters_of_other_boards_do_not_apply() {
    let card = Card::new();
    card.put("p4/config.txt", "[pi5]\nkernel=kernel_2712.img\n[none]\nkernel=no.img\n[all]\n[pi4]\nkernel=mine.img\n");
    card.put("p4/mine.img", "kernel");
    assert_eq!(card.booted(false).kernel.to_str(), Some("mine.img"));
}

#[test]
fn the_last_value_wins() {
    let card = Card::new();
    card.put("p4/config.txt", "kernel=kernel8.img\nkernel=gone.img\n");
    assert!(card.dead(false).contains("kernel"));
}

#[test]
fn a_32_bit_kernel_boots_when_there_is_no_other_or_it_is_asked_for() {
    let card = Card::new();
    card.put("p4/kernel7l.img", "kernel");
    card.put("p4/config.txt", "arm_64bit=0\n");
    assert_eq!(card.booted(false).kernel.to_str(), Some("kernel7l.img"));
}

#[test]
fn what_the_kernel_needs_must_be_there() {
    for missing in ["kernel8.img", "bcm2711-rpi-4-b.dtb", "cmdline.txt", "config.txt"] {
        let card = Card::new();
        card.remove(&format!("p4/{missing}"));
        card.dead(false);
    }
    let card = Card::new();
    card.remove("p1/b1/init.img");
    assert!(card.dead(true).contains("init.img"));
}

#[test]
fn a_partition_that_is_not_fat_is_dead() {
    let card = Card::new();
    card.put("p1/autoboot.txt", "boot_partition=2\n");
    assert!(card.dead(false).contains("not FAT"));
}

#[test]
fn each_board_takes_its_own_kernel_and_device_tree() {
    let card = Card::new();
    let pi3 = Model { family: "pi3", device_tree: Some("bcm2710-rpi-3-b.dtb") };
    assert!(matches!(card.boot_on(&pi3, false), Outcome::Dead(reason) if reason.contains("bcm2710-rpi-3-b.dtb")));
    let own = Model { family: "", device_tree: None };
    let Outcome::Booted(boot) = card.boot_on(&own, true) else { panic!("a machine with a device tree of its own") };
    assert_eq!((boot.prefix.as_str(), boot.device_tree), ("b1/", None));
    assert_eq!(card.booted(true).device_tree.unwrap().to_str(), Some("b1/bcm2711-rpi-4-b.dtb"));
    card.put("p4/kernel.img", "ARMv6");
    card.put("p4/bcm2708-rpi-zero.dtb", "tree");
    let zero = Model { family: "pi1", device_tree: Some("bcm2708-rpi-zero.dtb") };
    let Outcome::Booted(boot) = card.boot_on(&zero, false) else { panic!("a Zero boots its own kernel") };
    assert_eq!(boot.kernel.to_str(), Some("kernel.img"));
}

#[test]
fn watchdog_of_a_trial_boot_is_told_to_the_kernel_before_its_own_line() {
    let card = Card::new();
    card.put("p1/autoboot.txt", "[all]\ntryboot_a_b=1\nboot_partition=1\n[tryboot]\nboot_partition=4\n");
    card.put("p4/config.txt", "arm_64bit=1\n[tryboot]\nkernel_watchdog_timeout=15\n[all]\n");
    card.put("p4/cmdline.txt", "watchdog.open_timeout=600 quiet");
    let boot = card.booted(true);
    assert_eq!(boot.watchdog.map(|limit| limit.as_secs()), Some(15));
    assert_eq!(boot.cmdline, "watchdog.open_timeout=15 watchdog.open_timeout=600 quiet", "the kernel takes the last");
    card.put("p1/autoboot.txt", "[all]\ntryboot_a_b=1\nboot_partition=4\n[tryboot]\nboot_partition=1\n");
    assert_eq!(card.booted(false).cmdline, "watchdog.open_timeout=600 quiet");
}
