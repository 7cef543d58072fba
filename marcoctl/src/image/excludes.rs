//! Paths that are left out of an image.

use std::path::Path;

use anyhow::{Context as _, Result};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// Contents that exist only on a running system, or that file system tools create.
const DEFAULTS: [&str; 6] = ["/proc/*", "/sys/*", "/dev/*", "/run/*", "/tmp/*", "lost+found"];

/// Files that belong to one machine. Two nodes with the same key or id would be taken for one.
const IDENTITY: [&str; 10] = [
    "/var/lib/marco-agent/*",
    "/etc/ssh/ssh_host_*",
    "/etc/machine-id",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/lib/urandom/random-seed",
    "/boot/marco/*",
    "/boot/firmware/marco/*",
    "/etc/marco/token",
];

/// A set of patterns for paths.
#[derive(Debug)]
pub(super) struct Excludes(GlobSet);

impl Excludes {
    /// Compiles the operator's patterns and, unless disabled, the default ones.
    pub(super) fn new(patterns: &[String], defaults: bool, identity: bool) -> Result<Self> {
        let mut set = GlobSetBuilder::new();
        let mut all: Vec<&str> = patterns.iter().map(String::as_str).collect();
        all.extend(DEFAULTS.into_iter().filter(|_| defaults));
        all.extend(IDENTITY.into_iter().filter(|_| identity));
        for pattern in all {
            let anchored = match pattern.trim_end_matches('/').strip_prefix('/') {
                Some(rest) => rest.to_owned(),
                None => format!("**/{}", pattern.trim_end_matches('/')),
            };
            // `*` does not match a slash, as in a shell.
            let glob = GlobBuilder::new(&anchored).literal_separator(true).build();
            set.add(glob.with_context(|| format!("--exclude {pattern:?} is no pattern"))?);
        }
        Ok(Self(set.build().context("the patterns cannot be used together")?))
    }

    /// Returns true if this path below the root is left out, with everything below it.
    pub(super) fn has(&self, path: &Path) -> bool {
        self.0.is_match(path)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Excludes;

    #[test]
    fn patterns_count_from_the_root_or_from_anywhere() {
        let excludes = Excludes::new(&["*.pyc".to_owned(), "/var/cache/".to_owned()], true, true).unwrap();
        for out in ["a.pyc", "usr/lib/a.pyc", "var/cache", "proc/1", "home/lost+found", "etc/ssh/ssh_host_rsa_key"] {
            assert!(excludes.has(Path::new(out)), "{out}");
        }
        for inside in ["proc", "srv/var/cache", "srv/proc/1", "etc/ssh/sshd_config", "var/lib/marco-agent"] {
            assert!(!excludes.has(Path::new(inside)), "{inside}");
        }
        let all = Excludes::new(&[], false, false).unwrap();
        assert!(!all.has(Path::new("proc/1")) && !all.has(Path::new("etc/machine-id")));
        assert!(Excludes::new(&["[".to_owned()], true, true).is_err());
    }
}
