//! Compares an installed Pi, file by file, with the tree that its image was made of.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Paths that the installer personalises, so that they may differ from the image or be added to it. Each stands for
/// itself and everything below it.
pub const PERSONALISED: [&str; 9] = [
    "etc/fstab",
    "etc/hostname",
    "etc/hosts",
    "etc/machine-id",
    "etc/marco",
    "etc/marco-release",
    "etc/ssh",
    "usr/bin/marco-agent",
    "var/lib/marco-agent",
];

/// File that the installer adds to the boot partition: the name of the boot set.
const ADDED_TO_BOOT: &str = "marco-release";
/// Folder of the boot files in an image; the installer moves them to the boot partition.
const BOOT: &str = "boot/firmware";

/// Compares a virtual Pi's `root` and `boot` with the source tree of an image, and returns the number of equal entries.
/// The error lists the differences.
pub fn compare_with_source(source: &Path, pi: &Path) -> Result<usize> {
    let (root, boot) = (pi.join("root"), pi.join("boot"));
    let mut differences = Vec::new();
    let mut same = 0;
    let wanted = list(source)?;
    for path in &wanted {
        let inside_boot = path.strip_prefix(BOOT).ok().filter(|inside| !inside.as_os_str().is_empty());
        let (installed, fat) = match inside_boot {
            Some(inside) => (boot.join(inside), true),
            None => (root.join(path), false),
        };
        // The installer writes the Pi's own root device into `cmdline.txt`.
        if personalised(path) || inside_boot == Some(Path::new("cmdline.txt")) {
            continue;
        }
        match difference(&source.join(path), &installed, fat)? {
            None => same += 1,
            Some(what) => differences.push(format!("{}: {what}", path.display())),
        }
    }
    // A file that is left over from the system before is as wrong as a missing one.
    let extra = list(&root)?.into_iter().filter(|path| !wanted.contains(path) && !parent_of_personalised(path));
    differences.extend(extra.map(|path| format!("{}: not in the image", path.display())));
    let boot_files = list(&boot)?.into_iter().filter(|path| path != Path::new(ADDED_TO_BOOT));
    let boot_files: BTreeSet<PathBuf> = boot_files.map(|path| Path::new(BOOT).join(path)).collect();
    differences
        .extend(boot_files.difference(&wanted).map(|path| format!("{}: on p4, not in the image", path.display())));
    if differences.is_empty() {
        return Ok(same);
    }
    let shown: Vec<String> = differences.iter().take(20).cloned().collect();
    bail!("{} differs from {} in {} places:\n{}", pi.display(), source.display(), differences.len(), shown.join("\n"))
}

fn personalised(path: &Path) -> bool {
    PERSONALISED.iter().any(|own| path.starts_with(own))
}

fn parent_of_personalised(path: &Path) -> bool {
    personalised(path) || PERSONALISED.iter().any(|own| Path::new(own).starts_with(path))
}

/// All entries below a folder, relative to it.
pub fn list(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).with_context(|| format!("listing {}", next.display()))? {
            let entry = entry?;
            found.insert(entry.path().strip_prefix(folder)?.to_owned());
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(found)
}

fn difference(wanted: &Path, found: &Path, fat: bool) -> Result<Option<String>> {
    let Ok(there) = fs::symlink_metadata(found) else { return Ok(Some("missing".to_owned())) };
    let should = fs::symlink_metadata(wanted)?;
    if should.file_type() != there.file_type() {
        return Ok(Some("of another kind".to_owned()));
    }
    if should.is_symlink() {
        let (should, there) = (fs::read_link(wanted)?, fs::read_link(found)?);
        return Ok((should != there).then(|| format!("points to {}, not to {}", there.display(), should.display())));
    }
    // FAT stores neither modes nor owners.
    if !fat {
        let (should_be, is) = (should.permissions().mode(), there.permissions().mode());
        if should_be != is {
            return Ok(Some(format!("mode {is:o}, not {should_be:o}")));
        }
        if (should.uid(), should.gid()) != (there.uid(), there.gid()) {
            return Ok(Some(format!("owner {}:{}", there.uid(), there.gid())));
        }
        // Times of folders change when the installer adds its files.
        if should.is_file() && should.mtime() != there.mtime() {
            return Ok(Some(format!("changed at {}, not at {}", there.mtime(), should.mtime())));
        }
        if should.is_file() && should.nlink() != there.nlink() {
            return Ok(Some(format!("{} hard links, not {}", there.nlink(), should.nlink())));
        }
    }
    let other = should.is_file() && fs::read(wanted)? != fs::read(found)?;
    Ok(other.then(|| "other bytes".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::compare_with_source;
    use crate::image::lay_out_root;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    /// Lays out a correctly installed Pi.
    fn installed(pi: &Path) {
        lay_out_root(&pi.join("root"), "a").unwrap();
        fs::rename(pi.join("root/boot/firmware"), pi.join("boot")).unwrap();
        fs::create_dir(pi.join("root/boot/firmware")).unwrap();
    }

    /// Copies the modification times: two trees laid out one after the other differ in them.
    fn same_times(from: &Path, to: &Path) {
        for path in super::list(from).unwrap() {
            if let (Ok(source), true) = (fs::metadata(from.join(&path)), to.join(&path).is_file()) {
                let file = fs::File::options().append(true).open(to.join(&path)).unwrap();
                file.set_modified(source.modified().unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (source, pi) = (dir.path().join("source"), dir.path().join("pi"));
        lay_out_root(&source, "a").unwrap();
        installed(&pi);
        same_times(&source, &pi.join("root"));
        assert!(compare_with_source(&source, &pi).unwrap() > 20);

        type Damage = (&'static str, fn(&Path));
        let damages: [Damage; 6] = [
            ("noise: other bytes", |pi| {
                let path = pi.join("root/usr/lib/marker/noise");
                let modified = fs::metadata(&path).unwrap().modified().unwrap();
                let mut bytes = fs::read(&path).unwrap();
                bytes[77] ^= 1;
                fs::write(&path, bytes).unwrap();
                fs::File::options().append(true).open(&path).unwrap().set_modified(modified).unwrap();
            }),
            ("root: mode", |pi| fs::set_permissions(pi.join("root/root"), fs::Permissions::from_mode(0o755)).unwrap()),
            ("empty: missing", |pi| fs::remove_file(pi.join("root/usr/lib/marker/empty")).unwrap()),
            ("stale: not in the image", |pi| fs::write(pi.join("root/usr/stale"), "x").unwrap()),
            ("kernel8.img: other bytes", |pi| fs::write(pi.join("boot/kernel8.img"), "x").unwrap()),
            ("old.img: on p4", |pi| fs::write(pi.join("boot/old.img"), "x").unwrap()),
        ];
        for (what, damage) in damages {
            damage(&pi);
            let error = compare_with_source(&source, &pi).unwrap_err().to_string();
            assert!(error.contains(what), "{what} is not in: {error}");
        }
    }
}
