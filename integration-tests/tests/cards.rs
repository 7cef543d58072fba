//! Cards written by `marcoctl card write`, read by the code that reads them on a Pi.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use integration_tests::image::{make_bootcode, sha256};
use integration_tests::process::{binary, run, tool};
use integration_tests::seconds;
use marco_archive::switch::LENGTH;
use node_agent::bootpart::{BootPart, DefaultBoot, Prefix};
use node_agent::identity::JoinFile;
use node_agent::system::Board;

/// Writes a card to a file, and copies its first partition with mtools. Returns the partition's folder and the zip's
/// digest.
async fn card(folder: &Path) -> Result<(PathBuf, String)> {
    let path = |name: &str| folder.join(name).display().to_string();
    let zip = make_bootcode("card")?;
    fs::write(folder.join("set.zip"), &zip)?;
    fs::write(folder.join("token"), "mj1.a.b.c\n")?;
    let (card, set, token) = (path("card.img"), path("set.zip"), path("token"));
    let arguments = ["card", "write", &card, "--bootcode", &set, "--token-file", &token, "--size", "512MiB"];
    let further = ["--join", "lab.example:1346", "--node-name", "pi-07"];
    run(&binary("marcoctl")?, &[arguments.as_slice(), &further].concat(), seconds(60)).await?.success()?;
    let part = folder.join("p1");
    fs::create_dir(&part)?;
    // The first partition begins at 4 MiB.
    let image = format!("{card}@@4M");
    let copy = ["-s", "-i", &image, "::*", part.to_str().context("a folder without a name")?];
    run(&tool("mcopy")?, &copy, seconds(60)).await?.success()?;
    Ok((part, sha256(&zip)))
}

fn board(family: &str) -> Board {
    Board { family: family.to_owned(), ..Board::default() }
}

#[tokio::test]
async fn the_agent_finds_the_set_and_its_record_on_a_written_card() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (part, digest) = card(folder.path()).await?;
    let boot = BootPart::new(&part, &board("pi4"));
    assert_eq!(boot.holds(&digest)?, Some(Prefix::B0));
    assert_eq!(boot.present()?, Some(Prefix::B0));
    assert!(!boot.is_stock());
    assert_eq!(boot.read_job()?, None);
    assert_eq!(sha256(&fs::read(boot.fallback_zip())?), digest);
    assert_eq!(boot.stage(&boot.fallback_zip(), &digest)?, Prefix::B0, "nothing has to be written");
    let (_, join) = JoinFile::find(std::slice::from_ref(&part))?.context("there is no join file")?;
    assert_eq!((join.controllers, join.name.as_str()), (vec!["lab.example:1346".to_owned()], "pi-07"));
    assert_eq!(join.token, "mj1.a.b.c");

    // A damaged set does not count as present.
    fs::write(part.join("b0/initramfs8"), "damaged")?;
    assert_eq!(boot.holds(&digest)?, None);
    Ok(())
}

#[tokio::test]
async fn a_written_card_is_switched_in_place() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (part, _) = card(folder.path()).await?;
    let boot = BootPart::new(&part, &board("pi4"));
    let texts =
        || -> Result<[Vec<u8>; 2]> { Ok([fs::read(part.join("config.txt"))?, fs::read(part.join("autoboot.txt"))?]) };
    let written = texts()?;
    // marcoctl writes the same bytes as the agent: the installer is the default.
    boot.set_boot_partition(DefaultBoot::Installer)?;
    assert_eq!(texts()?, written);

    let other = make_bootcode("other")?;
    let zip = folder.path().join("other.zip");
    fs::write(&zip, &other)?;
    let prefix = boot.stage(&zip, &sha256(&other))?;
    assert_eq!(prefix, Prefix::B1);
    boot.name_for_tryboot(prefix)?;
    boot.set_boot_partition(DefaultBoot::System)?;
    for text in texts()? {
        assert_eq!(text.len(), LENGTH);
    }
    let config = String::from_utf8(fs::read(part.join("config.txt"))?)?;
    assert!(config.contains("[all]\nos_prefix=b0/\n") && config.contains("[tryboot]\nos_prefix=b1/\n"), "{config}");
    boot.make_default(prefix)?;
    assert_eq!(boot.present()?, Some(Prefix::B1));
    Ok(())
}
