//! A disk that fails: a library that is preloaded into a process, and makes the system calls of its database fail.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

/// The library's source. Only a preloaded library reaches the calls of SQLite and Postgres, which are C.
const SOURCE: &str = include_str!("failing.c");
/// Environment variable with the path of the file that says what fails.
const FILE: &str = "MARCO_FAULT_FILE";

/// The library, and the file that tells it what fails.
#[derive(Debug, Clone)]
pub struct Failing {
    library: PathBuf,
    file: PathBuf,
    of: &'static str,
}

impl Failing {
    /// Compiles the library in a folder that the process of the database can read. `of`: a part of the paths of the files
    /// that it affects.
    #[allow(clippy::disallowed_methods, reason = "test harness: nothing of the product, and there is no runtime here")]
    pub fn build(folder: &Path, of: &'static str) -> Result<Self> {
        let (source, library) = (folder.join("failing.c"), folder.join("failing.so"));
        fs::write(&source, SOURCE)?;
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status()?;
        ensure!(built.success(), "the library cannot be compiled");
        Ok(Self { library, file: folder.join("fails"), of })
    }

    /// The environment of the process.
    pub fn environment(&self) -> [(&'static str, OsString); 3] {
        [
            ("LD_PRELOAD", self.library.clone().into()),
            (FILE, self.file.clone().into()),
            ("MARCO_FAULT_OF", self.of.into()),
        ]
    }

    /// In the process itself: the file that its environment names.
    pub fn file() -> Option<PathBuf> {
        std::env::var_os(FILE).map(PathBuf::from)
    }

    /// From now on `what` fails: `fsync`, `write` or `readonly`.
    pub fn fail(&self, what: &str) -> Result<()> {
        Ok(fs::write(&self.file, what)?)
    }

    /// All works again.
    pub fn heal(&self) -> Result<()> {
        Ok(fs::remove_file(&self.file)?)
    }
}
