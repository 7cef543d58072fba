//! How a tarball may be compressed, by its first bytes, and how much memory unpacking it may take: the controller
//! refuses at the push what a Pi could not unpack.

/// Largest window of zstd, as a power of two: 16 MiB, as `--long=24` makes it. `zstd -19` needs 8 MiB; `--ultra -22` and
/// `--long` need 128 MiB.
pub const ZSTD_WINDOW_LOG: u32 = 24;
/// Largest dictionary of xz in bytes. `xz -6` has 8 MiB, `xz -7` this one, `xz -9` 64 MiB.
pub const XZ_DICTIONARY: u64 = 16 << 20;
/// Memory that a decoder of xz may take: the dictionary, and a little for itself.
pub const XZ_MEMORY: u64 = XZ_DICTIONARY + (1 << 20);

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all, or in a way that is not known here.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// By the first bytes of the stream; six are enough.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            // A frame, or one of the frames that are skipped, which parallel compressors put first.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// The word for it in the API and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    /// What to do about a stream whose decoder says this, when that is a window that is too large; a whole sentence
    /// with the command that compresses it again.
    pub fn explain_window(self, error: &str) -> Option<&'static str> {
        // The words of the two libraries; a test of this crate's users sees to it that they stay so.
        match self {
            Self::Zstd if error.contains("requires too much memory") => Some(
                "its zstd window is larger than 16 MiB, more than a small Pi can spare; compress it again: \
                 zstd -d --long=31 --stdout IMAGE | zstd -19 --long=24 -o NEW",
            ),
            Self::Xz if error.contains("memory limit") => Some(
                "its xz dictionary is larger than 16 MiB, more than a small Pi can spare; compress it again: \
                 xz -dc IMAGE | xz --lzma2=dict=16MiB > NEW",
            ),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Compression;

    #[test]
    fn a_stream_is_known_by_its_first_bytes() {
        for (start, compression) in [
            (&[0x1f, 0x8b, 8, 0, 0, 0][..], Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd, 4, 0], Compression::Zstd),
            (&[0x50, 0x2a, 0x4d, 0x18, 4, 0], Compression::Zstd),
            (b"./\0\0\0\0", Compression::None),
            (&[0x1f], Compression::None),
        ] {
            assert_eq!(Compression::detect(start), compression);
        }
    }
}
