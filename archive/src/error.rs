//! Why an archive is not taken.

use std::fmt;
use std::io;

/// What may go wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive breaks a rule; trying again will not help.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Reading the archive or writing its files failed.
    #[error("cannot {action}")]
    Io {
        /// What was being done, for example `read the archive` or `create "etc/passwd"`.
        action: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

/// What a failed read of the stream means: a decompressor says with these kinds that its input is not whole.
pub(crate) fn read_error(err: io::Error) -> Error {
    match err.kind() {
        io::ErrorKind::UnexpectedEof => Refused::archive(Reason::Truncated).into(),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            Refused::archive(Reason::Damaged(err.to_string())).into()
        }
        _ => Error::io("read the archive")(err),
    }
}

/// The rule that an archive breaks, and by which entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The entry's name, with everything unprintable escaped; `None`: the archive as a whole.
    pub entry: Option<String>,
    /// The rule.
    pub reason: Reason,
}

impl Refused {
    pub(crate) fn archive(reason: Reason) -> Self {
        Self { entry: None, reason }
    }

    pub(crate) fn entry(name: &[u8], reason: Reason) -> Self {
        // A hostile name ends up in logs and on terminals: short, and nothing but printable ASCII.
        let shown = name.get(..200).unwrap_or(name);
        Self { entry: Some(shown.escape_ascii().to_string()), reason }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.entry {
            Some(entry) => write!(f, "the archive is refused: entry \"{entry}\": {}", self.reason),
            None => write!(f, "the archive is refused: {}", self.reason),
        }
    }
}

impl std::error::Error for Refused {}

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Not an archive of the expected format, or damaged.
    #[error("it is damaged or not of this format: {0}")]
    Damaged(String),
    /// The stream ends before the archive does.
    #[error("it is cut short")]
    Truncated,
    /// There is nothing in it.
    #[error("it is empty")]
    Empty,
    /// More entries than allowed.
    #[error("it has more than {0} entries")]
    TooManyEntries(u64),
    /// Unpacks to more bytes than allowed.
    #[error("it unpacks to more than {0} bytes")]
    TooLarge(u64),
    /// Packs so well that it can only be a bomb.
    #[error("it unpacks to more than {0} times its size")]
    Ratio(u64),
    /// The name is empty.
    #[error("the name is empty")]
    EmptyName,
    /// The name is longer than allowed.
    #[error("the name is longer than {0} bytes")]
    LongName(usize),
    /// The path has more parts than allowed.
    #[error("the path has more than {0} parts")]
    Depth(usize),
    /// The name begins with a slash or a drive letter.
    #[error("the path is absolute")]
    AbsolutePath,
    /// The name has a `..`.
    #[error("the path has a \"..\"")]
    ParentPath,
    /// The name has a `.` or an empty part.
    #[error("the path has an empty part or a \".\"")]
    OddPath,
    /// The name has a backslash.
    #[error("the name has a backslash")]
    Backslash,
    /// The name has a control character or a NUL.
    #[error("the name has a control character")]
    ControlCharacter,
    /// The name is not UTF-8.
    #[error("the name is not UTF-8")]
    NotUtf8,
    /// The name cannot stand on a FAT file system.
    #[error("FAT cannot hold the name: {0}")]
    FatName(&'static str),
    /// Two entries have the same name, or names that FAT takes for the same.
    #[error("the name is there twice (FAT does not tell upper from lower case)")]
    Duplicate,
    /// One name is both a file and a folder.
    #[error("the name is both a file and a folder")]
    FileAndFolder,
    /// A boot zip takes plain files and folders only.
    #[error("it is neither a plain file nor a folder")]
    NotAFile,
    /// Encrypted.
    #[error("it is encrypted")]
    Encrypted,
    /// Packed with a method that is not allowed.
    #[error("compression method {0} is not allowed (store and deflate are)")]
    Method(u16),
    /// A zip's two descriptions of an entry differ.
    #[error("the local header and the central directory disagree about {0}")]
    HeaderMismatch(&'static str),
    /// Bytes of a zip belong to two entries, or to none.
    #[error("its entries overlap or leave gaps")]
    Overlap,
    /// The contents do not match their checksum.
    #[error("the checksum does not match")]
    Checksum,
    /// A tar entry of a kind that a system does not have.
    #[error("entries of kind {0:?} are not allowed")]
    Kind(char),
    /// A hard link to something that this archive did not make as a regular file.
    #[error("the hard link's target is not an earlier regular file of this archive")]
    HardLink,
    /// A path that leads through a symbolic link of this archive that points out of the root.
    #[error("the path leads through a symbolic link of the archive that points out of it")]
    ThroughLink,
    /// A size that two headers give differently.
    #[error("its headers disagree about the size")]
    SizeMismatch,
    /// More names to remember than allowed.
    #[error("its links and folders take more than {0} bytes to remember")]
    TooManyNames(usize),
    /// An extended header or long name that is too large.
    #[error("its extended header is larger than {0} bytes")]
    LongHeader(u64),
    /// A map of a sparse file that does not fit the file.
    #[error("the map of the sparse file is wrong")]
    Sparse,
    /// Something that is neither a tarball nor a disk image: what it is, and what to do.
    #[error("this is {0}")]
    Foreign(String),
    /// It is whole, and no system that a Pi could start: why, and what to do.
    #[error("{0}")]
    NotASystem(String),
    /// A set of boot files lacks something.
    #[error("the boot files lack {0}")]
    Lacks(String),
    /// A set of boot files has a configuration that cannot work.
    #[error("config.txt: {0}")]
    Config(String),
}
