//! The kind of an image: a tarball or a disk, and its compression.

use std::io::Read as _;

use marco_archive::disk::{FRONT, Needs, is_disk, needs};
use marco_archive::{Compression, Packing, foreign};

use super::InstallError;
use crate::download::Download;

/// The kind of an image, judged before anything is erased. The push has read the whole image, so its verdict counts. An
/// older controller does not pass it on, and then the first chunk decides.
#[derive(Debug)]
pub(super) struct Verdict {
    /// Its compression.
    pub(super) compression: Compression,
    /// It is the image of a whole disk, and no tarball.
    pub(super) disk: bool,
    /// Its first bytes, unpacked, as far as the first chunk goes and a disk's table may reach.
    pub(super) front: Vec<u8>,
}

impl Verdict {
    /// Judges a download by the controller's word, else by its first chunk.
    pub(super) fn of(download: &Download, first: &[u8]) -> Result<Self, InstallError> {
        let by_itself = Compression::detect(first);
        // A frame that decoders skip, at the front of a compressed disk, once made it a tarball here.
        let (compression, told) = match download.packing {
            Some(Packing::Tar(compression)) => (compression, Some(false)),
            Some(Packing::Disk(compression)) => (compression, Some(true)),
            Some(Packing::Zip) => return Err(InstallError::image("it is a zip of boot files, and no image")),
            None => (by_itself, None),
        };
        let front = front(compression, first);
        let disk = match told {
            Some(disk) => disk,
            None => {
                // Only here: a push refuses foreign formats itself.
                foreign::refuse(&front).map_err(|refused| InstallError::image(refused.to_string()))?;
                is_disk(&front)
            }
        };
        Ok(Self { compression, disk, front })
    }

    /// Returns the room that a disk's file systems need: as the push saw it, else by the table.
    pub(super) fn needs(&self, download: &Download) -> Result<Needs, InstallError> {
        let seen = download.facts.as_ref().map(|facts| facts.needs).unwrap_or_default();
        if !self.disk || seen != Needs::default() {
            return Ok(seen);
        }
        // A first chunk that unpacks to less than the table says nothing of it.
        if self.front.len() < FRONT { Ok(Needs::default()) } else { Ok(needs(&self.front)?) }
    }
}

/// Unpacks the first bytes of an image, at most [`FRONT`].
fn front(compression: Compression, first: &[u8]) -> Vec<u8> {
    let mut front = Vec::new();
    if let Ok(decoder) = compression.decoder(first) {
        // The chunk ends in the middle of the stream: bytes before the error count.
        let _ = decoder.take(u64::try_from(FRONT).unwrap_or_default()).read_to_end(&mut front);
    }
    front
}
