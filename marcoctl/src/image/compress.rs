//! Compression of the tarball, within the limits of a Pi's installer: windows and dictionaries of at most 16 MiB.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use liblzma::stream::{Check, Filters, LzmaOptions, MtStreamBuilder};

/// zstd's window as a power of two: 8 MiB, for any level.
const ZSTD_WINDOW_LOG: u32 = 23;
/// Maximum dictionary of xz in bytes.
const XZ_DICTIONARY: u32 = 16 << 20;

/// A stream into a file, compressed according to the file's name.
pub(super) enum Compressor {
    Plain(BufWriter<File>),
    Gzip(flate2::write::GzEncoder<BufWriter<File>>),
    Xz(liblzma::write::XzEncoder<BufWriter<File>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<File>>),
}

impl Compressor {
    /// Creates the stream. The ending of the name selects the format. `level`: `None` for the format's default.
    pub(super) fn for_name(name: &Path, file: File, level: Option<u32>) -> Result<Self> {
        let text = name.to_string_lossy();
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(if text.ends_with(".tar") {
            Self::Plain(out)
        } else if text.ends_with(".tar.gz") || text.ends_with(".tgz") {
            // gzip and xz end at level 9. The flag also admits zstd's levels.
            let level = flate2::Compression::new(level.unwrap_or(6).min(9));
            // The builder writes neither name nor time, so the same tree gives the same bytes.
            Self::Gzip(flate2::GzBuilder::new().write(out, level))
        } else if text.ends_with(".tar.xz") {
            let mut options = LzmaOptions::new_preset(level.unwrap_or(6).min(9)).context("xz has no such level")?;
            // The presets 8 and 9 have dictionaries of 32 and 64 MiB, which the installer refuses.
            if level.unwrap_or(6) > 7 {
                options.dict_size(XZ_DICTIONARY);
            }
            let mut filters = Filters::new();
            filters.lzma2(&options);
            let threads =
                std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
            let stream = MtStreamBuilder::new().threads(threads).filters(filters).check(Check::Crc64).encoder();
            Self::Xz(liblzma::write::XzEncoder::new_stream(out, stream.context("cannot start xz")?))
        } else if text.ends_with(".tar.zst") {
            let level = i32::try_from(level.unwrap_or(10)).unwrap_or(10);
            let mut encoder = zstd::stream::write::Encoder::new(out, level).context("cannot start zstd")?;
            encoder
                .window_log(ZSTD_WINDOW_LOG)
                .and_then(|()| encoder.include_checksum(true))
                .context("cannot start zstd")?;
            Self::Zstd(encoder)
        } else {
            bail!("{text} does not say how to compress: end the name with .tar, .tar.gz, .tar.xz or .tar.zst");
        })
    }

    /// Writes the end of the stream.
    pub(super) fn finish(self) -> io::Result<()> {
        match self {
            Self::Plain(mut out) => out.flush(),
            Self::Gzip(encoder) => encoder.finish()?.flush(),
            Self::Xz(encoder) => encoder.finish()?.flush(),
            Self::Zstd(encoder) => encoder.finish()?.flush(),
        }
    }
}

impl Write for Compressor {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Xz(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // A flush in the middle of the stream would only cost compression.
        Ok(())
    }
}
