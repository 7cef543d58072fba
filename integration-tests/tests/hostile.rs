//! Hostile archives against the unpackers themselves, as on a node whose controller was compromised.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use integration_tests::image::lay_out_root;
use integration_tests::tree::list;
use integration_tests::{hostile, seconds};
use marco_archive::{Error, unpack_tar, unpack_zip};
use marco_proto::v1::artifact::Kind;

/// Environment variable with the folder of archives, for the process that unpacks them.
const FOLDER: &str = "MARCO_TEST_HOSTILE_FOLDER";
/// Most bytes of memory that unpacking may take, for any archive.
const MEMORY: u64 = 128 << 20;

fn decompressed(file: File) -> Result<Box<dyn Read>> {
    let mut file = BufReader::new(file);
    let start = std::io::BufRead::fill_buf(&mut file)?.iter().take(4).copied().collect::<Vec<_>>();
    // By magic numbers, as the installer does: a name may lie.
    Ok(match start.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::Decoder::with_buffer(file)?;
            decoder.window_log_max(marco_archive::compression::ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        _ => Box::new(file),
    })
}

/// Unpacks each archive of a folder into a root of its own. Fails if one is accepted, or if anything outside its root
/// changes.
fn unpack_all(folder: &Path) -> Result<()> {
    for path in list(folder)? {
        let (name, path) = (path.display().to_string(), folder.join(&path));
        let place = tempfile::tempdir()?;
        // Files around the root, at places that each `..` could reach: all must stay unchanged.
        let root = place.path().join("a/b/c/root");
        fs::create_dir_all(&root)?;
        for trap in ["evil", "tmp", "etc", "shadow"] {
            fs::write(place.path().join("a/b/c").join(trap), "untouched")?;
        }
        let before = list(place.path())?;
        let begun = Instant::now();
        let unpacked = if name.starts_with("zip") {
            unpack_zip(File::open(&path)?, &root).map(|_| ())
        } else {
            // The root is not empty: an entry must not follow links that are there already.
            lay_out_root(&root, "before")?;
            decompressed(File::open(&path)?)
                .map(|reader| unpack_tar(BufReader::new(reader), &root, &mut |_| ()).map(|_| ()))
                .unwrap_or(Ok(()))
        };
        ensure!(begun.elapsed() < seconds(10), "{name} took {:?}", begun.elapsed());
        match unpacked {
            Err(Error::Refused(_) | Error::Io { .. }) => {}
            Ok(()) => ensure!(refused_elsewhere(&name), "{name} was unpacked"),
        }
        let after = list(place.path())?;
        let strays: Vec<&PathBuf> = after.difference(&before).filter(|path| !path.starts_with("a/b/c/root")).collect();
        ensure!(strays.is_empty(), "{name} wrote {strays:?}");
        for trap in ["evil", "tmp", "etc", "shadow"] {
            let text = fs::read_to_string(place.path().join("a/b/c").join(trap))?;
            ensure!(text == "untouched", "{name} changed {trap}");
        }
    }
    Ok(())
}

/// True for archives that are harmless once unpacked, and refused for other reasons. There are none at present.
fn refused_elsewhere(_name: &str) -> bool {
    false
}

fn worst_memory() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Unpacks in a process of its own, so that its peak memory is that of unpacking alone.
#[tokio::test]
async fn hostile_archives_write_nothing_outside_the_root_and_take_little_memory() -> Result<()> {
    if let Some(folder) = std::env::var_os(FOLDER) {
        unpack_all(Path::new(&folder))?;
        let worst = worst_memory()?;
        ensure!(worst < MEMORY, "{worst} bytes at the worst");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let cases = hostile::archives()?;
    assert!(cases.len() >= 60, "only {} hostile archives", cases.len());
    for (number, case) in cases.iter().enumerate() {
        let kind = if case.kind == Kind::Bootcode { "zip" } else { "tar" };
        // The name is in each failure, so that no number must be looked up.
        let name = case.what.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
        fs::write(folder.path().join(format!("{kind}-{number:02}-{name}")), &case.bytes)?;
    }
    let child = tokio::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "hostile_archives_write_nothing_outside_the_root_and_take_little_memory", "--nocapture"])
        .env(FOLDER, folder.path())
        .kill_on_drop(true)
        .output()
        .await?;
    let said = [child.stdout, child.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(child.status.success(), "{said}");
    Ok(())
}
