//! The recovery partition (p1) of a card in layout resident: staging an installer set, switching to it, confirming it.
//!
//! All functions block: call them off the runtime.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable;
use crate::step;
use crate::system::Board;

mod file;
mod job;
pub mod render;
mod stock;
mod went_back;
mod writable;

pub(crate) use file::{read_from_card, write_whole};
use file::{read_json, remove_file, sha256_of_card, write_json};
pub use job::{InstallJob, Instruction, JOB_VERSION};
pub use writable::Writable;

/// The partition could not be read or written, or does not hold the written data.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file or folder could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// The operation that failed, as a verb: `read`, `make`.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// This board cannot boot the set.
    #[error("the boot files are refused: {0}")]
    Refused(String),
    /// The data read back differs from the data written.
    #[error("{path} does not hold what was written to it: the card may be failing")]
    NotWritten {
        /// The file.
        path: PathBuf,
    },
}

impl BootError {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Stable word for programs, used as the reason of an execution's error.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Io { .. } => "BOOT_PARTITION_IO",
            Self::Refused(_) => "BOOTCODE_REFUSED",
            Self::NotWritten { .. } => "BOOT_PARTITION_NOT_WRITTEN",
        }
    }
}

/// Folder of an installer set on p1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefix {
    /// `b0/`
    B0,
    /// `b1/`
    B1,
}

impl Prefix {
    /// Value for `os_prefix=`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::B0 => "b0/",
            Self::B1 => "b1/",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::B0 => Self::B1,
            Self::B1 => Self::B0,
        }
    }

    /// File that records the zip of the set. It is not within the set: a publisher's zip could overwrite it there.
    fn record(self) -> &'static str {
        match self {
            Self::B0 => "marco/b0.json",
            Self::B1 => "marco/b1.json",
        }
    }
}

/// System that boots by default. A trial boot takes the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultBoot {
    /// The installed system: `boot_partition=4`, in a trial 1.
    System,
    /// The installer: `boot_partition=1`, in a trial 4.
    Installer,
}

/// Record of a complete set. It is written last: a set without a record is incomplete.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// SHA-256 of the zip that the set comes from.
    sha256: String,
    /// SHA-256 of each file, by its path within the set.
    files: BTreeMap<String, String>,
}

/// The recovery partition, mounted.
#[derive(Debug, Clone)]
pub struct BootPart {
    recovery: PathBuf,
    family: String,
    device_tree: Option<&'static str>,
}

impl BootPart {
    /// The partition that is mounted at `recovery` ([`Card::recovery`](crate::system::Card)), of this board.
    pub fn new(recovery: impl Into<PathBuf>, board: &Board) -> Self {
        Self { recovery: recovery.into(), family: board.family.clone(), device_tree: board.device_tree() }
    }

    /// Installer zip on the card, for the case that no controller has one.
    pub fn fallback_zip(&self) -> PathBuf {
        self.recovery.join("marco/fallback.zip")
    }

    /// The agent's folder on the partition.
    pub fn marco_dir(&self) -> PathBuf {
        self.recovery.join("marco")
    }

    /// Folder of the complete set with this digest. `None`: the card holds none. Reads the whole set, past the page
    /// cache.
    pub fn holds(&self, sha256: &str) -> Result<Option<Prefix>, BootError> {
        for prefix in [Prefix::B0, Prefix::B1] {
            let Some(record) = self.record(prefix)? else { continue };
            if record.sha256 == sha256 && self.compare(prefix, &record.files).is_ok() {
                return Ok(Some(prefix));
            }
        }
        Ok(None)
    }

    /// The default set, if it is complete for this board. In the installer this is the running set.
    pub fn present(&self) -> Result<Option<Prefix>, BootError> {
        Ok(self.default_prefix()?.filter(|prefix| self.lines(*prefix).is_ok()))
    }

    /// Unpacks the zip with digest `sha256` into the set that is not the default, and reads it back past the page
    /// cache. Does nothing if the card already holds that set. The zip is checked before anything is written.
    pub fn stage(&self, zip: &Path, sha256: &str) -> Result<Prefix, BootError> {
        let _lock = self.lock()?;
        if let Some(prefix) = self.holds(sha256)? {
            return Ok(prefix);
        }
        let open = || File::open(zip).map_err(BootError::io("open", zip));
        let summary = marco_archive::check_zip(open()?).map_err(|error| refused(error, zip))?;
        marco_archive::check_installer_set(&summary).map_err(|error| BootError::Refused(error.to_string()))?;
        let files: BTreeMap<String, String> =
            summary.files.iter().map(|file| (file.name.clone(), hex::encode(file.sha256))).collect();
        self.check_board(|name| files.contains_key(name), summary.config_txt.as_deref().unwrap_or_default())?;

        let prefix = self.default_prefix()?.map_or(Prefix::B0, Prefix::other);
        let (folder, record) = (self.recovery.join(prefix.as_str()), self.recovery.join(prefix.record()));
        // A power cut from here on leaves a set without a record, which no one takes for complete.
        remove_file(&record)?;
        step::at("empty", &folder, &[]).map_err(BootError::io("empty", &folder))?;
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(BootError::io("empty", &folder)(error)),
            _ => std::fs::create_dir_all(&folder).map_err(BootError::io("make", &folder))?,
        }
        step::at("unpack", &folder, &[]).map_err(BootError::io("unpack", &folder))?;
        marco_archive::unpack_zip(open()?, &folder).map_err(|error| refused(error, &folder))?;
        step::at("sync", &folder, &[]).map_err(BootError::io("sync", &folder))?;
        let synced = File::open(&folder).and_then(|folder| Ok(rustix::fs::syncfs(folder)?));
        synced.map_err(BootError::io("sync", &folder))?;
        self.compare(prefix, &files)?;
        write_json(&record, &Record { sha256: sha256.to_owned(), files })?;
        Ok(prefix)
    }

    /// Makes this set the one that a trial boot of the installer takes.
    pub fn name_for_tryboot(&self, prefix: Prefix) -> Result<(), BootError> {
        let _lock = self.lock()?;
        if self.is_stock() {
            return stock::name_for_tryboot(&self.recovery, &render::config_txt((prefix, &self.lines(prefix)?), None)?);
        }
        // Both blocks are in one text: only a single write in place survives a power cut.
        let default = self.default_prefix()?.unwrap_or(prefix);
        let (default_lines, lines) = (self.lines(default)?, self.lines(prefix)?);
        let trial = (prefix != default).then_some((prefix, lines.as_slice()));
        file::write_in_place(&self.recovery.join("config.txt"), &render::config_txt((default, &default_lines), trial)?)
    }

    /// Makes this set the one that every boot of the installer takes.
    pub fn make_default(&self, prefix: Prefix) -> Result<(), BootError> {
        let _lock = self.lock()?;
        if self.is_stock() {
            stock::set_config_aside(&self.recovery)?;
        }
        file::write_in_place(
            &self.recovery.join("config.txt"),
            &render::config_txt((prefix, &self.lines(prefix)?), None)?,
        )
    }

    /// Sets the default system.
    pub fn set_boot_partition(&self, default: DefaultBoot) -> Result<(), BootError> {
        let _lock = self.lock()?;
        file::write_in_place(&self.recovery.join("autoboot.txt"), &render::autoboot_txt(default))
    }

    /// Default system by the card's present contents. If `autoboot.txt` is missing or unclear, the firmware takes the
    /// first FAT: the installer. A stock card has one system only.
    pub fn default_boot(&self) -> Result<DefaultBoot, BootError> {
        if self.is_stock() {
            return Ok(DefaultBoot::System);
        }
        let path = self.recovery.join("autoboot.txt");
        // Past the page cache: on a failing card the cache may hold what the firmware will not read.
        let text = read_from_card(&path).map_err(BootError::io("read back", path))?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let config = marco_archive::config_txt::ConfigTxt::parse(&text);
        let partition = config.get("boot_partition", &marco_archive::config_txt::Conditions::default());
        let is_system = partition.is_some_and(|number| number.trim().parse() == Ok(marco_archive::switch::SYSTEM));
        Ok(if is_system { DefaultBoot::System } else { DefaultBoot::Installer })
    }

    /// Removes the job, and the data that an installation kept from the old system for the new one.
    pub fn clear_job(&self) -> Result<(), BootError> {
        let _lock = self.lock()?;
        stock::withdraw_tryboot(&self.recovery, self.is_stock())?;
        remove_file(&self.keep_file())?;
        remove_file(&self.job_file())
    }

    /// True if this is the only boot partition of a stock card: its `config.txt` is not the agent's.
    pub fn is_stock(&self) -> bool {
        durable::read(&self.recovery.join("config.txt")).is_ok_and(|text| !text.starts_with(render::HEAD.as_bytes()))
    }

    /// File for data that outlives an installation. It holds secrets, so it goes with the job.
    pub(crate) fn keep_file(&self) -> PathBuf {
        self.marco_dir().join("keep.json")
    }

    /// Writes `installer-config.txt` as the 2015 system did: `export OS_IMG=NAME`, with an empty name for no image.
    pub fn write_installer_config(&self, image: Option<&str>) -> Result<(), BootError> {
        let _lock = self.lock()?;
        let name = image.unwrap_or_default();
        // The 2015 format gives names without the suffix.
        let name = name.strip_suffix(".tar.gz").unwrap_or(name);
        write_whole(&self.recovery.join("installer-config.txt"), format!("export OS_IMG={name}\n").as_bytes())
    }

    /// Copies the node's key and certificates from `identity_dir` to `marco/` for the installer. On a stock card every
    /// user of the machine can read them there, so call it only right before the machine goes down.
    pub fn stage_identity(&self, identity_dir: &Path) -> Result<(), BootError> {
        let _lock = self.lock()?;
        // A renewal at this moment must not leave the key of one certificate beside another.
        let _held = durable::hold(identity_dir).map_err(BootError::io("lock", identity_dir))?;
        for name in IDENTITY {
            let from = identity_dir.join(name);
            let bytes = durable::read(&from).map_err(BootError::io("read", &from))?;
            write_whole(&self.marco_dir().join(name), &bytes)?;
        }
        Ok(())
    }

    /// Removes the copies of [`Self::stage_identity`].
    pub fn remove_identity(&self) -> Result<(), BootError> {
        // Checked before the lock, which mounts the partition for writing.
        if !IDENTITY.iter().any(|name| self.marco_dir().join(name).exists()) {
            return Ok(());
        }
        let _lock = self.lock()?;
        IDENTITY.iter().try_for_each(|name| remove_file(&self.marco_dir().join(name)))
    }

    /// Holds the partition open for writing. A running system has it mounted read-only, and every write goes through
    /// [`Writable`].
    pub fn open_for_writing(&self) -> Result<Writable, BootError> {
        self.lock()
    }

    /// Locks the partition, also against a thread of this agent that still writes for a cancelled task.
    fn lock(&self) -> Result<Writable, BootError> {
        let writable = Writable::open(&self.recovery)?;
        let folder = self.marco_dir();
        std::fs::create_dir_all(&folder).map_err(BootError::io("make", folder))?;
        Ok(writable)
    }

    /// Folder of the set that every boot of the installer takes. `None`: `config.txt` names no set of the agent's.
    fn default_prefix(&self) -> Result<Option<Prefix>, BootError> {
        let path = self.recovery.join("config.txt");
        let config = match durable::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(BootError::io("read", path)(error)),
        };
        let conditions = marco_archive::config_txt::Conditions::default();
        let config = marco_archive::config_txt::ConfigTxt::parse(&config);
        let prefix = config.get("os_prefix", &conditions).map(str::trim);
        Ok([Prefix::B0, Prefix::B1].into_iter().find(|known| Some(known.as_str()) == prefix))
    }

    /// Lines of the set's own `config.txt` that p1's takes over.
    fn lines(&self, prefix: Prefix) -> Result<Vec<String>, BootError> {
        let folder = self.recovery.join(prefix.as_str());
        let path = folder.join("config.txt");
        let config = durable::read(&path).map_err(BootError::io("read", path))?;
        let config = String::from_utf8_lossy(&config);
        self.check_board(|name| folder.join(name).is_file(), &config)
    }

    /// Same, from the text of the set's configuration. Returns an error for a set that this board cannot boot.
    fn check_board(&self, has: impl Fn(&str) -> bool, config: &str) -> Result<Vec<String>, BootError> {
        let lines = render::set_lines(config, &self.family, self.device_tree);
        let named = |key: &str| lines.iter().rev().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let kernel = match named("kernel") {
            Some(name) => has(name).then_some(name),
            None => render::kernels(&self.family).iter().copied().find(|name| has(name)),
        };
        let kernel = kernel.ok_or_else(|| BootError::Refused("they have no kernel for this board".into()))?.to_owned();
        if let Some(missing) = named("device_tree").filter(|name| !has(name)) {
            return Err(BootError::Refused(format!("they have no device tree for this board ({missing})")));
        }
        // Always explicit: otherwise a kernel named in the other block of p1's `config.txt` would count.
        let explicit = format!("kernel={kernel}");
        Ok(if lines.contains(&explicit) { lines } else { lines.into_iter().chain([explicit]).collect() })
    }

    fn record(&self, prefix: Prefix) -> Result<Option<Record>, BootError> {
        read_json(&self.recovery.join(prefix.record()))
    }

    /// Checks that the card itself holds exactly these contents.
    fn compare(&self, prefix: Prefix, files: &BTreeMap<String, String>) -> Result<(), BootError> {
        for (name, digest) in files {
            let path = self.recovery.join(prefix.as_str()).join(name);
            if sha256_of_card(&path).map_err(BootError::io("read back", &path))? != *digest {
                return Err(BootError::NotWritten { path });
            }
        }
        Ok(())
    }
}

/// Files of a node's identity.
pub(crate) const IDENTITY: [&str; 3] = ["node.key", "node.crt", "ca.crt"];

fn refused(error: marco_archive::Error, path: &Path) -> BootError {
    match error {
        marco_archive::Error::Refused(refused) => BootError::Refused(refused.to_string()),
        marco_archive::Error::Io { source, .. } => BootError::io("unpack", path)(source),
    }
}

#[cfg(test)]
mod tests;
