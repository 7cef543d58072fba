//! Reasons for refusing an archive.

use std::fmt;
use std::io;

/// A failure to check or to unpack an archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive breaks a rule. A retry does not help.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Reading the archive or writing its files failed.
    #[error("cannot {action}")]
    Io {
        /// The action that failed, for example `read the archive` or `create "etc/passwd"`.
        action: String,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

/// Maps a failed read of the stream to a reason. A decompressor reports incomplete or invalid input with these kinds.
pub(crate) fn read_error(err: io::Error) -> Error {
    match err.kind() {
        io::ErrorKind::UnexpectedEof => Refused::archive(Reason::Truncated).into(),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            Refused::archive(Reason::Damaged(err.to_string())).into()
        }
        _ => Error::io("read the archive")(err),
    }
}

/// The rule that an archive breaks, and the entry that breaks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The entry's name, with every unprintable byte escaped, at most 200 bytes of it. `None`: the archive as a whole.
    pub entry: Option<String>,
    /// The broken rule.
    pub reason: Reason,
}

impl Refused {
    pub(crate) fn archive(reason: Reason) -> Self {
        Self { entry: None, reason }
    }

    pub(crate) fn entry(name: &[u8], reason: Reason) -> Self {
        // A hostile name ends up in logs and on terminals: keep it short, and printable ASCII only.
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

/// A rule that an archive can break. The payload is the limit, or the detail for the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Not an archive of the expected format, or damaged.
    #[error("it is damaged or not of this format: {0}")]
    Damaged(String),
    /// The stream ends before the archive does.
    #[error("it is cut short")]
    Truncated,
    /// The archive has no entries.
    #[error("it is empty")]
    Empty,
    /// More entries than allowed.
    #[error("it has more than {0} entries")]
    TooManyEntries(u64),
    /// Unpacks to more bytes than allowed.
    #[error("it unpacks to more than {0} bytes")]
    TooLarge(u64),
    /// Compression ratio above the limit: a decompression bomb.
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
    /// VFAT cannot store the name.
    #[error("FAT cannot hold the name: {0}")]
    FatName(&'static str),
    /// Two entries have equal names, or names that differ only in case, which FAT does not distinguish.
    #[error("the name is there twice (FAT does not tell upper from lower case)")]
    Duplicate,
    /// One name is both a file and a folder.
    #[error("the name is both a file and a folder")]
    FileAndFolder,
    /// An entry of a boot zip is neither a regular file nor a folder.
    #[error("it is neither a plain file nor a folder")]
    NotAFile,
    /// The entry is encrypted.
    #[error("it is encrypted")]
    Encrypted,
    /// The compression method is neither store nor deflate. The payload is the method's number in the zip format.
    #[error("compression method {0} is not allowed (store and deflate are)")]
    Method(u16),
    /// The local header and the central directory of a zip give different values for this field.
    #[error("the local header and the central directory disagree about {0}")]
    HeaderMismatch(&'static str),
    /// Bytes of a zip belong to two entries, or to no entry.
    #[error("its entries overlap or leave gaps")]
    Overlap,
    /// The contents do not match their CRC-32.
    #[error("the checksum does not match")]
    Checksum,
    /// A tar entry of an unsupported kind. The payload is the header's type flag.
    #[error("entries of kind {0:?} are not allowed")]
    Kind(char),
    /// The target of a hard link is a folder, or not an earlier entry of the same archive.
    #[error("the hard link's target is not an earlier regular file of this archive")]
    HardLink,
    /// A path leads through a symbolic link of the archive that points out of the root.
    #[error("the path leads through a symbolic link of the archive that points out of it")]
    ThroughLink,
    /// Two headers give different sizes for one entry.
    #[error("its headers disagree about the size")]
    SizeMismatch,
    /// The names of links and folders need more memory than allowed.
    #[error("its links and folders take more than {0} bytes to remember")]
    TooManyNames(usize),
    /// An extended header or a long name is larger than allowed.
    #[error("its extended header is larger than {0} bytes")]
    LongHeader(u64),
    /// The map of a sparse file does not match the file.
    #[error("the map of the sparse file is wrong")]
    Sparse,
    /// The file is of a known format that is neither a tarball nor a disk image. The text names the format and the
    /// remedy.
    #[error("this is {0}")]
    Foreign(String),
    /// The archive is intact, but no Pi could start from it. The text gives the reason and the remedy.
    #[error("{0}")]
    NotASystem(String),
    /// A required boot file is missing.
    #[error("the boot files lack {0}")]
    Lacks(String),
    /// `config.txt` has a setting that cannot work.
    #[error("config.txt: {0}")]
    Config(String),
}
