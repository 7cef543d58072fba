//! Cards written as image files, and checked with other projects' tools.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::process::Command;

use crate::controller::{Controller, Facts};
use crate::devices::may_mount;
use crate::made::{self, AMD64, elf, write};
use crate::running::{alone, at_terminal};

async fn set(folder: &Path) -> PathBuf {
    let (root, agent, zip) = (folder.join("root"), folder.join("agent"), folder.join("set.zip"));
    made::kernel(&root);
    made::programs(&root);
    write(folder, "agent", &elf(AMD64, ""));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let arguments = ["bootcode", "build", "--root", &path(&root), "--agent", &path(&agent), "-o", &path(&zip)];
    let run = alone(&arguments).await;
    assert_eq!(run.code, 0, "{run:?}");
    zip
}

/// Runs a program, which must succeed, and returns its output.
async fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().await.unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Copies p1 to a file of its own, for tools without an offset.
fn first_partition(card: &Path) -> PathBuf {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::open(card).unwrap();
    let mut bytes = vec![0; 256 << 20];
    file.read_exact_at(&mut bytes, 4 << 20).unwrap();
    let part = card.with_extension("p1");
    std::fs::write(&part, bytes).unwrap();
    part
}

#[tokio::test]
async fn a_card_starts_the_installer_and_joins() {
    let folder = TempDir::new().unwrap();
    let zip = set(folder.path()).await;
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    write(folder.path(), "token", b"mj1.a.b.c\n");
    write(folder.path(), "install.toml", b"[boot]\nsize = \"64MiB\"\n");
    write(folder.path(), "firmware/start4.elf", b"firmware");
    let card = path("card.img");
    let arguments = [
        "card",
        "write",
        &card,
        "--bootcode",
        zip.to_str().unwrap(),
        "--token-file",
        &path("token"),
        "--size",
        "1GiB",
        "--join",
        "lab.example:1346",
        "--node-name",
        "pi-07",
        "--install-config",
        &path("install.toml"),
        "--ssh",
        "--firmware",
        &path("firmware"),
    ];
    let run = alone(&arguments).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stdout.contains("is written and verified"), "{run:?}");

    let table = tool("/usr/sbin/sfdisk", &["-l", &card]).await;
    let line = table.lines().find(|line| line.contains("card.img1")).unwrap();
    assert_eq!(line.split_whitespace().skip(1).take(5).collect::<Vec<_>>(), ["*", "8192", "532479", "524288", "256M"]);
    assert!(!table.contains("card.img2"), "{table}");
    let part = first_partition(Path::new(&card));
    // fsck.vfat -n exits with an error if it would repair anything.
    tool("/usr/sbin/fsck.vfat", &["-n", part.to_str().unwrap()]).await;
    let image = format!("{card}@@4M");
    let text = async |name: &str| tool("mtype", &["-i", &image, &format!("::{name}")]).await;
    assert!(text("config.txt").await.contains("os_prefix=b0/\ncmdline=cmdline.txt\nauto_initramfs=0\n"));
    let autoboot = text("autoboot.txt").await;
    assert!(
        autoboot.starts_with("[all]\ntryboot_a_b=1\nboot_partition=1\n[tryboot]\nboot_partition=4\n"),
        "{autoboot}"
    );
    // 511 bytes, so that the agent's first switch is a write in place.
    assert_eq!(autoboot.len(), 511);
    let join = text("marco/join.toml").await;
    assert_eq!(join, "controllers = [\"lab.example:1346\"]\ntoken = \"mj1.a.b.c\"\nname = \"pi-07\"\n");
    assert_eq!(text("marco/install.toml").await, "[boot]\nsize = \"64MiB\"\n");
    assert_eq!((text("start4.elf").await, text("ssh").await), ("firmware".to_owned(), String::new()));
    let listing = tool("mdir", &["-i", &image, "::"]).await;
    // mtools shows 1980-01-01 for a file without a time.
    assert!(listing.contains("Volume in drive : is RECOVERY") && !listing.contains("1980-01-01"), "{listing}");
    tool("mcopy", &["-i", &image, "::b0/initramfs", &path("initramfs")]).await;
    let mut whole = zip::ZipArchive::new(std::fs::File::open(&zip).unwrap()).unwrap();
    let mut wanted = Vec::new();
    std::io::Read::read_to_end(&mut whole.by_name("initramfs").unwrap(), &mut wanted).unwrap();
    assert!(std::fs::read(path("initramfs")).unwrap() == wanted, "the initramfs differs");

    let again = alone(&arguments).await;
    assert!(again.code == 2 && again.stderr.contains("card.img exists"), "{again:?}");

    // The file was readable by others and now contains a token.
    std::fs::set_permissions(&card, std::fs::Permissions::from_mode(0o664)).unwrap();
    let over = alone(&[arguments.as_slice(), &["--yes"]].concat()).await;
    assert_eq!(over.code, 0, "{over:?}");
    assert_eq!(std::fs::metadata(&card).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn files_for_the_first_boot_go_onto_the_card_as_they_are() {
    let folder = TempDir::new().unwrap();
    let zip = set(folder.path()).await;
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    write(folder.path(), "token", b"mj1.a.b.c\n");
    write(folder.path(), "given/userconf.txt", b"pi:hash");
    write(folder.path(), "given/room=a1/user-data", b"#cloud-config\n");
    let (card, token, given) = (path("card.img"), path("token"), path("given"));
    let mut arguments = vec!["card", "write", &card, "--bootcode", zip.to_str().unwrap(), "--token-file", &token];
    arguments.extend(["--size", "512MiB", "--first-boot", &given]);
    let run = alone(&arguments).await;
    assert_eq!(run.code, 0, "{run:?}");
    let image = format!("{card}@@4M");
    let text = async |name: &str| tool("mtype", &["-i", &image, &format!("::marco/first-boot/{name}")]).await;
    assert_eq!(
        (text("userconf.txt").await.as_str(), text("room=a1/user-data").await.as_str()),
        ("pi:hash", "#cloud-config\n")
    );
    tool("/usr/sbin/fsck.vfat", &["-n", first_partition(Path::new(&card)).to_str().unwrap()]).await;

    // A typing error in a name: no system would read the file.
    write(folder.path(), "given/room=a1/user.data", b"");
    std::fs::remove_file(&card).unwrap();
    let run = alone(&arguments).await;
    assert!(run.code == 1 && run.stderr.contains("known are custom.toml, meta-data"), "{run:?}");
    assert!(!Path::new(&card).exists(), "a card was written all the same");
}

#[tokio::test]
async fn several_cards_share_one_token_with_as_many_uses() {
    let controller = Controller::start(Facts::default()).await;
    let folder = TempDir::new().unwrap();
    let zip = set(folder.path()).await;
    let card = folder.path().join("card.img");
    let arguments = [
        "-o",
        "json",
        "card",
        "write",
        card.to_str().unwrap(),
        "--bootcode",
        zip.to_str().unwrap(),
        "--count",
        "2",
        "--size",
        "512M",
        "--label",
        "room=a1",
    ];
    let run = controller.run(&arguments).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.json()["token"], "joinTokens/t1");
    assert_eq!(run.json()["controllers"], serde_json::json!([]), "the loopback is of no use to a Pi");
    for number in 1..=2 {
        let image = format!("{}@@4M", folder.path().join(format!("card-{number}.img")).display());
        let join = tool("mtype", &["-i", &image, "::marco/join.toml"]).await;
        assert_eq!(join, "controllers = []\ntoken = \"the-secret\"\n");
    }
}

#[tokio::test]
async fn what_is_no_set_or_no_disk_is_refused() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "bad.zip", b"no zip");
    write(folder.path(), "token", b"t");
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = async |target: &str| {
        alone(&["card", "write", target, "--bootcode", &path("bad.zip"), "--token-file", &path("token"), "--yes"]).await
    };
    let run = write(&path("card.img")).await;
    assert!(run.code == 1 && run.stderr.contains("cannot be put on a card"), "{run:?}");
    assert!(!folder.path().join("card.img").exists());
    let run = write("/dev/null").await;
    assert!(run.code == 1 && run.stderr.contains("neither a disk nor a file"), "{run:?}");
    // A missing device must not become an image file below /dev.
    let run = write("/dev/nothing-there").await;
    assert!(run.code == 1 && run.stderr.contains("cannot look at"), "{run:?}");
}

/// A loop device of a file. Dropping it detaches it.
struct Loop(String);

impl Loop {
    async fn new(file: &Path) -> Self {
        std::fs::File::create(file).unwrap().set_len(512 << 20).unwrap();
        Self(tool("/usr/sbin/losetup", &["--find", "--show", file.to_str().unwrap()]).await.trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        #[expect(clippy::disallowed_methods, reason = "what is dropped cannot wait for a runtime; it answers at once")]
        let mut losetup = std::process::Command::new("/usr/sbin/losetup");
        let _ = losetup.args(["--detach", &self.0]).status();
    }
}

#[tokio::test]
async fn a_device_is_written_only_after_yes_was_typed() {
    if !may_mount("a_device_is_written_only_after_yes_was_typed") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let zip = set(folder.path()).await;
    write(folder.path(), "token", b"mj1.a.b.c\n");
    let (token, file) = (folder.path().join("token"), folder.path().join("device"));
    let device = Loop::new(&file).await;
    let mut arguments = vec!["card", "write", &device.0, "--bootcode", zip.to_str().unwrap()];
    arguments.extend(["--token-file", token.to_str().unwrap()]);
    let holds_a_card = || {
        let mut start = [0; 512];
        std::io::Read::read_exact(&mut std::fs::File::open(&file).unwrap(), &mut start).unwrap();
        start[510..] == [0x55, 0xaa]
    };

    // Without a terminal there is no answer.
    let run = alone(&arguments).await;
    assert!(run.code == 2 && run.stderr.contains("everything on it would be lost"), "{run:?}");
    for answer in ["no", "y", "YES", ""] {
        let run = at_terminal(&[("Write \"yes\" to go on: ", answer)], &arguments).await;
        assert!(run.code == 1 && run.stdout.contains("nothing was written"), "{answer}: {run:?}");
        assert!(run.stdout.contains(&format!("{}: ", device.0)) && run.stdout.contains("512.00 MiB"), "{run:?}");
    }
    assert!(!holds_a_card());
    let run = at_terminal(&[("Write \"yes\" to go on: ", "yes")], &arguments).await;
    assert!(run.code == 0 && run.stdout.contains(&format!("{} is written and verified", device.0)), "{run:?}");
    assert!(holds_a_card());
}

#[tokio::test]
async fn between_two_cards_the_next_one_is_asked_for() {
    if !may_mount("between_two_cards_the_next_one_is_asked_for") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let zip = set(folder.path()).await;
    write(folder.path(), "token", b"mj1.a.b.c\n");
    let token = folder.path().join("token");
    let device = Loop::new(&folder.path().join("device")).await;
    let mut arguments = vec!["card", "write", &device.0, "--bootcode", zip.to_str().unwrap(), "--count", "2"];
    arguments.extend(["--token-file", token.to_str().unwrap(), "--node-name", "pi"]);
    let run = alone(&arguments).await;
    assert!(run.code == 2 && run.stderr.contains("need a terminal"), "{run:?}");
    let go_on = "Write \"yes\" to go on: ";
    let next = format!("Put the next card into {} (2 of 2) and press Enter: ", device.0);
    let run = at_terminal(&[(go_on, "yes"), (&next, ""), (go_on, "yes")], &arguments).await;
    assert_eq!(run.code, 0, "{run:?}");
    // Both cards are written to the same device, so only the second one can be read.
    assert_eq!(run.stdout.matches("is written and verified").count(), 2, "{run:?}");
    let join = tool("mtype", &["-i", &format!("{}@@4M", device.0), "::marco/join.toml"]).await;
    assert!(join.contains("name = \"pi-2\""), "{join}");
    let run = at_terminal(&[(go_on, "yes"), (&next, ""), (go_on, "no")], &arguments).await;
    assert!(run.code == 1 && run.stdout.matches("is written and verified").count() == 1, "{run:?}");
}
