//! The header that a controller sends before an artifact.

use bytes::Bytes;
use marco_archive::Facts;
use marco_archive::disk::Needs;
use marco_proto::v1::{DownloadHeader, ImageFacts};
use sha2::{Digest, Sha256};

/// Largest accepted chunk in bytes. A chunk is held in memory as a whole.
const LARGEST_CHUNK: u64 = 64 * 1024 * 1024;

/// Facts of an image, from the wire format.
pub(super) fn facts(sent: ImageFacts) -> Facts {
    let ImageFacts { refusal, boot_files, texts, boot_bytes, root_bytes } = sent;
    Facts {
        refusal: (!refusal.is_empty()).then_some(refusal),
        boot_files: boot_files.into_iter().collect(),
        texts: texts.into_iter().collect(),
        needs: Needs { boot: boot_bytes, root: root_bytes },
    }
}

/// A consistent header. The list of chunk digests comes from an authenticated controller. The digest of the whole is
/// the requested one, and is checked too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) size: u64,
    chunk_size: u64,
    digests: Bytes,
}

impl Header {
    /// Checks a header against the requested artifact.
    pub(super) fn check(sent: DownloadHeader, sha256: &str) -> Result<Self, String> {
        let (size, chunk_size) = (sent.size_bytes, u64::from(sent.chunk_size));
        // Otherwise the download would fail only after its last byte.
        if sent.sha256 != sha256 {
            return Err(format!("the controller sends {} instead of {sha256}", sent.sha256.escape_debug()));
        }
        if chunk_size == 0 || chunk_size > LARGEST_CHUNK {
            return Err(format!("chunks of {chunk_size} bytes are not taken"));
        }
        let digests = u64::try_from(sent.chunk_sha256.len()).unwrap_or(u64::MAX);
        // `checked_mul`: a size near 2^64 must not overflow.
        if Some(digests) != size.div_ceil(chunk_size).checked_mul(32) {
            return Err("the list of the chunks' digests does not fit the size".into());
        }
        Ok(Self { size, chunk_size, digests: sent.chunk_sha256 })
    }

    /// First byte of a chunk.
    pub(super) fn start(&self, chunk: u64) -> u64 {
        chunk.saturating_mul(self.chunk_size).min(self.size)
    }

    /// Length of a chunk in bytes; 0 behind the last one.
    pub(super) fn length(&self, chunk: u64) -> usize {
        usize::try_from(self.start(chunk.saturating_add(1)) - self.start(chunk)).unwrap_or_default()
    }

    /// True if these are the chunk's bytes.
    pub(super) fn matches(&self, chunk: u64, bytes: &[u8]) -> bool {
        let from = usize::try_from(chunk).ok().and_then(|chunk| chunk.checked_mul(32));
        let digest = from.and_then(|from| self.digests.get(from..from.checked_add(32)?));
        bytes.len() == self.length(chunk) && digest == Some(Sha256::digest(bytes).as_slice())
    }
}

#[cfg(test)]
mod tests {
    use marco_proto::v1::DownloadHeader;

    use super::Header;

    fn sent(size: u64, chunk: u32, digests: usize) -> DownloadHeader {
        let chunk_sha256 = vec![0; digests].into();
        let sha256 = "aa".into();
        DownloadHeader { size_bytes: size, sha256, chunk_size: chunk, chunk_sha256, ..DownloadHeader::default() }
    }

    #[test]
    fn the_last_chunk_is_shorter() {
        let header = Header::check(sent(10, 4, 96), "aa").unwrap();
        assert_eq!([0, 1, 2, 3].map(|chunk| header.length(chunk)), [4, 4, 2, 0]);
        assert_eq!(Header::check(sent(0, 4, 0), "aa").unwrap().length(0), 0);
    }

    #[test]
    fn a_header_that_makes_no_sense_is_refused() {
        for (header, asked) in [
            (sent(10, 4, 96), "bb"),
            (sent(10, 0, 96), "aa"),
            (sent(10, u32::MAX, 32), "aa"),
            (sent(10, 4, 95), "aa"),
            (sent(u64::MAX, 4, 96), "aa"),
        ] {
            assert!(Header::check(header, asked).is_err());
        }
    }
}
