//! Sources of the files: roots of file systems, and unpacked packages. Links are resolved inside their root.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use super::package;

/// Maximum number of links on one path: the kernel's limit.
const MAX_LINKS: usize = 40;

/// Layered folders: the first one that has a path wins. Packages come before roots.
#[derive(Debug)]
pub(crate) struct Source {
    roots: Vec<PathBuf>,
    /// Number of unpacked packages at the front of `roots`.
    packages: usize,
    _unpacked: Option<TempDir>,
}

impl Source {
    /// Opens roots, and unpacks packages (files, or folders of them) into a temporary folder.
    pub(crate) fn open(roots: &[PathBuf], packages: &[PathBuf], progress: &mut dyn FnMut(&Path)) -> Result<Self> {
        for root in roots {
            if !root.is_dir() {
                bail!("{} is no folder", root.display());
            }
        }
        let files = package::files(packages)?;
        let mut all = Vec::new();
        let unpacked = if files.is_empty() {
            None
        } else {
            let folder = tempfile::Builder::new().prefix("marco-packages-").tempdir();
            let folder = folder.context("cannot make a temporary folder (TMPDIR says where)")?;
            for (number, file) in files.iter().enumerate() {
                progress(file);
                // A folder per package: two packages may contain the same path, and the first one wins.
                let place = folder.path().join(number.to_string());
                std::fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
                package::unpack(file, &place).with_context(|| format!("cannot unpack {}", file.display()))?;
                all.push(place);
            }
            Some(folder)
        };
        let packages = all.len();
        all.extend(roots.iter().cloned());
        Ok(Self { roots: all, packages, _unpacked: unpacked })
    }

    /// Returns all roots, packages first.
    pub(crate) fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    /// Returns true if the root with this index is an unpacked package.
    pub(crate) fn is_package(&self, number: usize) -> bool {
        number < self.packages
    }

    /// Finds a path of the system in the roots. `/sbin` and `/lib` are links into `/usr` on some systems and in some
    /// packages, so both places are tried.
    pub(crate) fn find(&self, path: &str) -> Option<PathBuf> {
        let relative = path.trim_start_matches('/');
        let other = match relative.strip_prefix("usr/") {
            Some(short) => short.to_owned(),
            None => format!("usr/{relative}"),
        };
        self.roots
            .iter()
            .find_map(|root| resolve(root, Path::new(relative)).or_else(|| resolve(root, Path::new(&other))))
    }

    /// Reads a file of the system. `None`: it does not exist.
    pub(crate) fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.find(path).filter(|found| found.is_file()).map(|found| read(&found)).transpose()
    }
}

/// Reads a file. The error names it.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Resolves a path below a root as a process in that root would: links stay inside. `None`: nothing exists there.
pub(crate) fn resolve(root: &Path, path: &Path) -> Option<PathBuf> {
    let mut ahead: VecDeque<OsString> = parts(path).collect();
    let mut place = PathBuf::new();
    let mut links = 0;
    while let Some(part) = ahead.pop_front() {
        // `..` at the root stays at the root, as in the kernel.
        if part == ".." {
            place.pop();
            continue;
        }
        let next = place.join(&part);
        let kind = std::fs::symlink_metadata(root.join(&next)).ok()?.file_type();
        if !kind.is_symlink() {
            place = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        let target = std::fs::read_link(root.join(&next)).ok()?;
        // An absolute link means the system's root, not the root of this machine.
        if target.is_absolute() {
            place = PathBuf::new();
        }
        for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
            ahead.push_front(part);
        }
    }
    Some(root.join(place))
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::{Source, resolve};

    #[test]
    fn links_never_lead_out_of_the_root() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        std::fs::create_dir_all(path.join("usr/lib")).unwrap();
        std::fs::write(path.join("usr/lib/libc.so"), "here").unwrap();
        symlink("/usr/lib", path.join("lib")).unwrap();
        symlink("../../../../../../lib/libc.so", path.join("usr/lib/libc.so.6")).unwrap();
        symlink("round", path.join("round")).unwrap();
        symlink("/etc/hostname", path.join("outside")).unwrap();
        assert_eq!(resolve(path, Path::new("/lib/libc.so.6")), Some(path.join("usr/lib/libc.so")));
        assert_eq!(resolve(path, Path::new("round")), None);
        assert_eq!(resolve(path, Path::new("outside")), None);
    }

    #[test]
    fn a_merged_and_an_unmerged_usr_are_the_same() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (root, place) in [(&old, "sbin"), (&new, "usr/sbin")] {
            std::fs::create_dir_all(root.path().join(place)).unwrap();
            std::fs::write(root.path().join(place).join("mke2fs"), "program").unwrap();
            let source = Source::open(&[root.path().to_owned()], &[], &mut |_| {}).unwrap();
            for asked in ["/sbin/mke2fs", "/usr/sbin/mke2fs"] {
                assert_eq!(source.read(asked).unwrap().unwrap(), b"program", "{place}: {asked}");
            }
        }
    }
}
