//! Compressions of an image and their only decoder. Push and installer read images through the same code. With two
//! decoders the push accepted streams that the installer refused after it had emptied the root.

use std::io::{BufRead, Error, Read, Result};

/// Maximum window of zstd as a power of two: 16 MiB, as set by `--long=24`. `zstd -19` needs 8 MiB; `--ultra -22` and
/// `--long` need 128 MiB. A small Pi cannot spare more memory.
pub const ZSTD_WINDOW_LOG: u32 = 24;
/// Maximum dictionary of xz in bytes. `xz -6` uses 8 MiB, `xz -7` 16 MiB, `xz -9` 64 MiB.
pub const XZ_DICTIONARY: u64 = 16 << 20;
/// Memory limit of the xz decoder in bytes: the dictionary plus 1 MiB for its own state.
pub const XZ_MEMORY: u64 = XZ_DICTIONARY + (1 << 20);

/// Compression of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not compressed, or in an unknown format.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Detects the compression by the first bytes of a stream. Six bytes are enough.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            // A frame, or a skippable frame, which parallel compressors write first.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// Decompresses a stream of this compression.
    ///
    /// # Errors
    /// Returns an error if the decoder cannot be created. Errors in the stream appear while reading.
    pub fn decoder<'a>(self, stream: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
            Self::Xz => {
                // Parallel compressors write several streams in a row. All of them are read.
                let flags = liblzma::stream::CONCATENATED;
                let decoder = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, flags).map_err(Error::other)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(stream, decoder))
            }
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
            Self::None => Box::new(stream),
        })
    }

    /// Returns the name used in the API and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    /// Explains a decoder's error that means a too large window. The sentence contains the command that compresses the
    /// image again. `None` for any other error.
    pub fn explain_window(self, error: &str) -> Option<&'static str> {
        // The libraries have no error code for this. Tests of the callers hold these texts in place.
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

/// Format of an artifact, determined at the push and sent to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// A tarball with this compression.
    Tar(Compression),
    /// A whole-disk image with this compression.
    Disk(Compression),
    /// A zip.
    Zip,
}

impl Packing {
    /// All values, for [`Self::parse`].
    const ALL: [Self; 9] = [
        Self::Tar(Compression::None),
        Self::Tar(Compression::Gzip),
        Self::Tar(Compression::Xz),
        Self::Tar(Compression::Zstd),
        Self::Disk(Compression::None),
        Self::Disk(Compression::Gzip),
        Self::Disk(Compression::Xz),
        Self::Disk(Compression::Zstd),
        Self::Zip,
    ];

    /// Returns the name used in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tar(compression) => compression.as_str(),
            Self::Disk(Compression::None) => "none disk",
            Self::Disk(Compression::Gzip) => "gzip disk",
            Self::Disk(Compression::Xz) => "xz disk",
            Self::Disk(Compression::Zstd) => "zstd disk",
            Self::Zip => "zip",
        }
    }

    /// Parses a name of the API. `None`: the controller sent none, or one that only a newer agent knows.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|packing| packing.as_str() == word)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::{Compression, Packing};

    const TEXT: &[u8] = b"what an image unpacks to, more than a few bytes of it";

    fn gzip() -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(TEXT).unwrap();
        gzip.finish().unwrap()
    }

    fn xz() -> Vec<u8> {
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(TEXT).unwrap();
        xz.finish().unwrap()
    }

    fn zstd() -> Vec<u8> {
        zstd::encode_all(TEXT, 1).unwrap()
    }

    /// Decompresses with readers of several buffer sizes. `None`: refused.
    fn decoded(bytes: &[u8]) -> Option<Vec<u8>> {
        let compression = Compression::detect(bytes);
        let mut outcomes = [1, 7, 1 << 16].map(|size| {
            let mut unpacked = Vec::new();
            let reader = std::io::BufReader::with_capacity(size, bytes);
            compression.decoder(reader).unwrap().read_to_end(&mut unpacked).ok().map(|_| unpacked)
        });
        assert!(outcomes.windows(2).all(|two| two[0] == two[1]), "it depends on the size of what arrives");
        outcomes[0].take()
    }

    #[test]
    fn streams_are_unpacked_to_their_ends_and_no_further() {
        let twice = [TEXT, TEXT].concat();
        for one in [gzip(), xz(), zstd()] {
            assert_eq!(decoded(&one).as_deref(), Some(TEXT));
            assert_eq!(decoded(&[one.as_slice(), &one].concat()), Some(twice.clone()), "what pigz and pxz write");
            assert_eq!(decoded(&one[..one.len() - 1]), None, "it is cut");
            assert_eq!(decoded(&[one.as_slice(), b"more"].concat()), None, "something else follows");
        }
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
        assert_eq!(decoded(&[&skippable, zstd().as_slice()].concat()).as_deref(), Some(TEXT));
    }

    #[test]
    fn padding_of_xz_is_a_multiple_of_four() {
        for (padding, taken) in [(1, false), (2, false), (3, false), (4, true), (6, false), (8, true)] {
            let padded = [xz(), vec![0; padding]].concat();
            assert_eq!(decoded(&padded).is_some(), taken, "{padding}");
            assert_eq!(decoded(&[padded, xz()].concat()).is_some(), taken, "{padding}, between two");
        }
    }

    #[test]
    fn reserved_flags_of_gzip_are_refused() {
        for flag in [0x20, 0x40, 0x80] {
            let mut stream = gzip();
            stream[3] |= flag;
            assert_eq!(decoded(&stream), None, "{flag:#x}");
        }
    }

    #[test]
    fn every_packing_has_a_word_of_its_own() {
        for packing in Packing::ALL {
            assert_eq!(Packing::parse(packing.as_str()), Some(packing));
        }
        assert_eq!((Packing::parse(""), Packing::parse("lz4 disk")), (None, None));
    }

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
