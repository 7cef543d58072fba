//! Debian packages: an `ar` archive with a compressed tarball inside (deb(5)). They are unpacked by the same guard as
//! images, so a package cannot write outside its folder.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::compression::decoder;

/// Lists the named packages, and the packages in the named folders, sorted within each folder.
pub(super) fn files(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in named {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", path.display()))?.path();
            if entry.extension().is_some_and(|ending| ending == "deb") {
                found.push(entry);
            }
        }
        if found.is_empty() {
            bail!("there is no .deb in {}", path.display());
        }
        // readdir(3) has no order. The first source of a file wins, so the order must be the same every time.
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

/// Unpacks the files of a package under `place`.
pub(super) fn unpack(package: &Path, place: &Path) -> Result<()> {
    let mut archive = ar::Archive::new(BufReader::new(File::open(package)?));
    while let Some(member) = archive.next_entry() {
        let member = member.context("it is no Debian package")?;
        if member.header().identifier().starts_with(b"data.tar") {
            let stream = decoder(BufReader::new(member))?;
            marco_archive::unpack_tar(BufReader::new(stream), place, &mut |_| {})?;
            return Ok(());
        }
    }
    bail!("it has no data.tar: it is no Debian package");
}
