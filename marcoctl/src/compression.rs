//! Decompression of files on this machine, with the format detected by the first bytes.

use std::io::{self, BufRead, Read};

use anyhow::Context as _;
use marco_archive::Compression;

/// Maximum window of zstd as a power of two: 128 MiB. Debian's packers use less.
const WINDOW_LOG_MAX: u32 = 27;

/// Wraps a stream so that it reads uncompressed bytes. Works for every format that [`Compression`] knows.
pub(crate) fn decoder<'a>(mut stream: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match Compression::detect(stream.fill_buf()?) {
        Compression::None => Box::new(stream),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        Compression::Xz => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(stream)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
            // Unlike `Compression::decoder`, this accepts large windows: it runs on the operator's machine, not on a
            // small Pi.
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

/// Decompresses a buffer. Uncompressed bytes are returned as they are.
pub(crate) fn decoded(bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    if Compression::detect(&bytes) == Compression::None {
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

    use marco_archive::Compression;

    use super::decoded;

    #[test]
    fn every_compression_is_told_and_undone() {
        let text = b"module ".repeat(1000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&text).unwrap();
        for (bytes, compression) in [
            (text.clone(), Compression::None),
            (gzip.finish().unwrap(), Compression::Gzip),
            (xz.finish().unwrap(), Compression::Xz),
            (zstd::encode_all(text.as_slice(), 1).unwrap(), Compression::Zstd),
        ] {
            assert_eq!(Compression::detect(&bytes), compression);
            assert_eq!(decoded(bytes).unwrap(), text, "{compression:?}");
        }
    }
}
