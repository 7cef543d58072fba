use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use marco_archive::switch::LENGTH;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{BootError, BootPart, DefaultBoot, InstallJob, Instruction, JOB_VERSION, Prefix};
use crate::system::Board;

struct Card {
    dir: TempDir,
    part: BootPart,
}

impl Card {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let board = Board { family: "pi4".into(), ..Board::default() };
        Self { part: BootPart::new(dir.path(), &board), dir }
    }

    /// An installer's zip, and its digest.
    fn zip(&self, name: &str, kernel: &str, without: &str) -> (PathBuf, String) {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (file, text) in [
            ("kernel8.img", kernel),
            ("cmdline.txt", "console=tty1"),
            ("config.txt", "auto_initramfs=0\ninitramfs i.img followkernel\n"),
            ("i.img", "initramfs"),
            ("bcm2711-rpi-4-b.dtb", "device tree"),
            ("bcm2712-rpi-5-b.dtb", "device tree"),
            ("overlays/README", "readme"),
            ("overlays/overlay_map.dtb", "map"),
        ] {
            if file != without {
                zip.start_file(file, zip::write::SimpleFileOptions::default()).unwrap();
                zip.write_all(text.as_bytes()).unwrap();
            }
        }
        let bytes = zip.finish().unwrap().into_inner();
        let path = self.dir.path().join(name);
        fs::write(&path, &bytes).unwrap();
        (path, hex::encode(Sha256::digest(&bytes)))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }
}

#[test]
fn a_set_goes_where_the_default_is_not() {
    let card = Card::new();
    let (zip, digest) = card.zip("a.zip", "one", "");
    assert_eq!(card.part.stage(&zip, &digest).unwrap(), Prefix::B0);
    card.part.make_default(Prefix::B0).unwrap();
    let (zip, digest) = card.zip("b.zip", "two", "");
    assert_eq!(card.part.stage(&zip, &digest).unwrap(), Prefix::B1);
    // The running installer's set is never overwritten, the other one is.
    let (zip, digest) = card.zip("c.zip", "three", "");
    assert_eq!(card.part.stage(&zip, &digest).unwrap(), Prefix::B1);
    assert_eq!((card.read("b0/kernel8.img").as_str(), card.read("b1/kernel8.img").as_str()), ("one", "three"));
}

#[test]
fn a_set_that_the_card_holds_is_not_written_again() {
    let card = Card::new();
    let (zip, digest) = card.zip("a.zip", "one", "");
    let prefix = card.part.stage(&zip, &digest).unwrap();
    card.part.make_default(prefix).unwrap();
    let before = fs::metadata(card.dir.path().join("b0/kernel8.img")).unwrap().ino();
    // Without the zip, any attempt to unpack it fails.
    fs::remove_file(&zip).unwrap();
    assert_eq!(card.part.holds(&digest).unwrap(), Some(prefix));
    assert_eq!(card.part.stage(&zip, &digest).unwrap(), prefix);
    assert_eq!(fs::metadata(card.dir.path().join("b0/kernel8.img")).unwrap().ino(), before);
}

#[test]
fn a_set_that_was_damaged_is_not_trusted() {
    let card = Card::new();
    let (zip, digest) = card.zip("a.zip", "one", "");
    card.part.stage(&zip, &digest).unwrap();
    fs::write(card.dir.path().join("b0/kernel8.img"), "bad").unwrap();
    assert_eq!(card.part.holds(&digest).unwrap(), None);
    card.part.stage(&zip, &digest).unwrap();
    assert_eq!(card.read("b0/kernel8.img"), "one");
}

#[test]
fn a_set_for_another_board_or_without_a_part_is_refused_before_anything_is_written() {
    for without in ["bcm2711-rpi-4-b.dtb", "kernel8.img", "i.img", "overlays/README", "cmdline.txt"] {
        let card = Card::new();
        let (zip, digest) = card.zip("a.zip", "one", without);
        assert!(matches!(card.part.stage(&zip, &digest), Err(BootError::Refused(_))), "without {without}");
        // A refused set must not cost the card the idle set that it had.
        assert!(!card.dir.path().join("b0").exists(), "without {without}");
    }
}

#[test]
fn a_switch_is_one_write_of_the_same_length_into_the_same_file() {
    let card = Card::new();
    // On a FAT, the same file with the same length means that only its one sector changes.
    let identity = |name: &str| {
        let found = fs::metadata(card.dir.path().join(name)).unwrap();
        (found.ino(), found.len())
    };
    card.part.set_boot_partition(DefaultBoot::System).unwrap();
    let before = identity("autoboot.txt");
    assert_eq!(before.1, u64::try_from(LENGTH).unwrap());
    assert!(
        card.read("autoboot.txt").starts_with("[all]\ntryboot_a_b=1\nboot_partition=4\n[tryboot]\nboot_partition=1\n")
    );
    card.part.set_boot_partition(DefaultBoot::Installer).unwrap();
    assert_eq!(identity("autoboot.txt"), before);
    assert!(
        card.read("autoboot.txt").starts_with("[all]\ntryboot_a_b=1\nboot_partition=1\n[tryboot]\nboot_partition=4\n")
    );

    let (zip, digest) = card.zip("a.zip", "one", "");
    card.part.stage(&zip, &digest).unwrap();
    card.part.make_default(Prefix::B0).unwrap();
    let before = identity("config.txt");
    let (zip, digest) = card.zip("b.zip", "two", "");
    let prefix = card.part.stage(&zip, &digest).unwrap();
    card.part.name_for_tryboot(prefix).unwrap();
    assert_eq!(identity("config.txt"), before);
    assert!(card.read("config.txt").contains("[tryboot]\nos_prefix=b1/\n"));
    card.part.make_default(prefix).unwrap();
    assert_eq!(identity("config.txt"), before);
    assert!(card.read("config.txt").contains("[all]\nos_prefix=b1/\n"));
}

#[test]
fn default_boot_is_what_the_firmware_would_boot() {
    let card = Card::new();
    let autoboot = card.dir.path().join("autoboot.txt");
    fs::write(card.dir.path().join("config.txt"), crate::bootpart::render::HEAD).unwrap();
    assert_eq!(card.part.default_boot().unwrap(), DefaultBoot::Installer, "nothing says otherwise");
    for default in [DefaultBoot::System, DefaultBoot::Installer] {
        card.part.set_boot_partition(default).unwrap();
        assert_eq!(card.part.default_boot().unwrap(), default);
    }
    for torn in
        ["", "[all]\ntryboot_a_b=1\nboot_part", "[all]\nboot_partition=", "[tryboot]\nboot_partition=4\n", "\0\0"]
    {
        fs::write(&autoboot, torn).unwrap();
        assert_eq!(card.part.default_boot().unwrap(), DefaultBoot::Installer, "{torn:?}");
    }
    fs::remove_file(&autoboot).unwrap();
    // A read error is no answer: an agent that guessed could remove what an installer needs.
    fs::create_dir(&autoboot).unwrap();
    assert!(card.part.default_boot().is_err());
    // A stock card has no other system.
    fs::write(card.dir.path().join("config.txt"), "arm_64bit=1\n").unwrap();
    assert_eq!(card.part.default_boot().unwrap(), DefaultBoot::System);
}

#[test]
fn a_job_is_read_back_and_a_torn_one_is_none() {
    let card = Card::new();
    let job = InstallJob {
        version: JOB_VERSION,
        instruction: Instruction::Install { image: "image".into(), sha256: "00".into(), raw: false },
        execution: "operations/x/executions/pi-01".into(),
        attempt: 1,
        sequence: 2,
        boot_id: "b".into(),
        controllers: vec!["a:1346".into()],
        enroll: String::new(),
        node: "pi-01".into(),
        discard_home: false,
        trials: 0,
        prefix: Prefix::B1,
        disk: None,
    };
    assert_eq!(card.part.read_job().unwrap(), None);
    card.part.write_job(&job).unwrap();
    assert_eq!(card.part.read_job().unwrap().as_ref(), Some(&job));
    let path = card.dir.path().join("marco/install.json");
    let before = fs::read(&path).unwrap();
    // Another execution's job is not changed.
    card.part.count_trial("operations/y/executions/pi-01", 7).unwrap();
    assert_eq!(fs::read(&path).unwrap(), before);
    card.part.count_trial(&job.execution, 2).unwrap();
    assert_eq!(card.part.read_job().unwrap(), Some(InstallJob { trials: 2, ..job }));
    let whole = fs::read(&path).unwrap();
    let changed = before.iter().zip(&whole).filter(|(before, after)| before != after).count();
    // A single byte differs, so the write is atomic within its sector.
    assert_eq!((whole.len(), changed), (before.len(), 1));
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(card.part.read_job().unwrap(), None);
    fs::write(card.part.keep_file(), "secret").unwrap();
    card.part.clear_job().unwrap();
    assert!(!path.exists() && !card.part.keep_file().exists());
}

#[test]
fn the_installer_of_2015_finds_its_image() {
    let card = Card::new();
    card.part.write_installer_config(Some("ArchLinuxARM-rpi-2-latest.tar.gz")).unwrap();
    assert_eq!(card.read("installer-config.txt"), "export OS_IMG=ArchLinuxARM-rpi-2-latest\n");
}

#[test]
fn an_identity_is_staged_for_its_owner_only_and_removed() {
    let card = Card::new();
    let identity = TempDir::new().unwrap();
    for name in super::IDENTITY {
        fs::write(identity.path().join(name), name).unwrap();
    }
    card.part.stage_identity(identity.path()).unwrap();
    let key = card.dir.path().join("marco/node.key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    card.part.remove_identity().unwrap();
    assert!(!key.exists());
}

#[test]
fn recorded_job_is_read_and_written_as_it_was() {
    let card = Card::new();
    let path = card.dir.path().join("marco/install.json");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let today = include_str!("../../testdata/card/install-1.json");
    fs::write(&path, today).unwrap();
    let job = card.part.read_job().unwrap().unwrap();
    assert_eq!((job.version, job.attempt, job.node.as_str(), job.prefix), (1, 7, "pi-01", Prefix::B1));
    card.part.write_job(&job).unwrap();
    assert_eq!(card.read("marco/install.json"), today, "an older installer refuses a field that it does not know");

    // A newer agent's job: its unknown fields change nothing, and are still there after a trial is counted.
    let next = include_str!("../../testdata/card/install-next.json");
    fs::write(&path, next).unwrap();
    assert_eq!(card.part.read_job().unwrap().as_ref(), Some(&job));
    card.part.count_trial(&job.execution, 1).unwrap();
    assert_eq!(card.read("marco/install.json"), next.replace("\"trials\": 0", "\"trials\": 1"));
    assert_eq!(card.part.read_job().unwrap(), Some(InstallJob { trials: 1, ..job }));

    // An installer does not begin a job that it cannot do.
    for other in [today.replacen('{', "{ \"version\": 2,", 1), today.replace("\"install\"", "\"install-delta\"")] {
        fs::write(&path, other).unwrap();
        assert_eq!(card.part.read_job().unwrap(), None);
    }
}

#[test]
fn recorded_sets_and_marks_are_read() {
    let card = Card::new();
    fs::create_dir_all(card.dir.path().join("marco")).unwrap();
    for set in [include_str!("../../testdata/card/set-1.json"), include_str!("../../testdata/card/set-next.json")] {
        fs::write(card.dir.path().join("marco/b1.json"), set).unwrap();
        let sha256 = "0b5f2c7f0d5e4a3b2c1d0e9f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b";
        assert_eq!(card.part.holds(sha256).unwrap(), Some(Prefix::B1));
    }
}
