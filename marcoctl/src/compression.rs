//! Compressed streams, told by their first bytes.

use std::io::{self, BufRead, Read};

use anyhow::Context as _;

/// The largest window of zstd that is taken, as a power of two: 128 MiB, more than any packer of Debian's uses.
const WINDOW_LOG_MAX: u32 = 27;

/// What a stream is compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// zstd.
    Zstd,
}

impl Compression {
    /// By the first bytes of a stream.
    pub(crate) fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// Reads a stream uncompressed, whatever it is compressed with.
pub(crate) fn decoder<'a>(mut stream: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match Compression::of(stream.fill_buf()?) {
        Compression::Plain => Box::new(stream),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        Compression::Xz => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(stream)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

/// The bytes uncompressed.
pub(crate) fn decoded(bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    if Compression::of(&bytes) == Compression::Plain {
        return Ok(bytes);
    }
    let mut plain = Vec::with_capacity(bytes.len().saturating_mul(3));
    decoder(bytes.as_slice())
        .and_then(|mut decoder| decoder.read_to_end(&mut plain))
        .context("cannot decompress it")?;
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::{Compression, decoded};

    #[test]
    fn every_compression_is_told_and_undone() {
        let text = b"module ".repeat(1000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&text).unwrap();
        for (bytes, compression) in [
            (text.clone(), Compression::Plain),
            (gzip.finish().unwrap(), Compression::Gzip),
            (xz.finish().unwrap(), Compression::Xz),
            (zstd::encode_all(text.as_slice(), 1).unwrap(), Compression::Zstd),
        ] {
            assert_eq!(Compression::of(&bytes), compression);
            assert_eq!(decoded(bytes).unwrap(), text, "{compression:?}");
        }
    }
}
