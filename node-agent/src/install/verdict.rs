//! The kind of an image: a tarball or a disk, and its compression.

use std::io::Read as _;

use marco_archive::disk::{FRONT, Needs, is_disk, needs};
use marco_archive::{Compression, Packing, foreign};

use super::InstallError;
use crate::download::Download;

/// An image, judged before anything is erased. The push has read all of it, so its verdict counts; an older controller does
/// not pass it on, and then the first chunk decides.
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
    /// Of a download whose first chunk is here.
    pub(super) fn of(download: &Download, first: &[u8]) -> Result<Self, InstallError> {
        let by_itself = Compression::detect(first);
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
                foreign::refuse(&front).map_err(|refused| InstallError::image(refused.to_string()))?;
                is_disk(&front)
            }
        };
        Ok(Self { compression, disk, front })
    }

    /// The room that a disk's file systems need: as the push saw them, else by what its table says.
    pub(super) fn needs(&self, download: &Download) -> Result<Needs, InstallError> {
        let seen = download.facts.as_ref().map(|facts| facts.needs).unwrap_or_default();
        if !self.disk || seen != Needs::default() {
            return Ok(seen);
        }
        // A first chunk that unpacks to less than the table says nothing of it.
        if self.front.len() < FRONT { Ok(Needs::default()) } else { Ok(needs(&self.front)?) }
    }
}

/// The first bytes of an image, unpacked.
fn front(compression: Compression, first: &[u8]) -> Vec<u8> {
    let mut front = Vec::new();
    if let Ok(decoder) = compression.decoder(first) {
        // A stream that breaks off here still tells what came before.
        let _ = decoder.take(u64::try_from(FRONT).unwrap_or_default()).read_to_end(&mut front);
    }
    front
}
