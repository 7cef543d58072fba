//! Malicious archives, written byte by byte, because the crates that write archives refuse to.

mod tarball;
mod zipfile;

use anyhow::Result;
use marco_proto::v1::artifact::{Kind, Purpose};

/// An archive that must be refused.
#[derive(Debug)]
pub struct Hostile {
    /// The fault, for failure messages.
    pub what: &'static str,
    /// The kind of artifact under which it is pushed.
    pub kind: Kind,
    /// Purpose of a bootcode; unspecified for an image.
    pub purpose: Purpose,
    /// The archive's bytes.
    pub bytes: Vec<u8>,
}

/// All malicious archives.
pub fn archives() -> Result<Vec<Hostile>> {
    let zips = zipfile::archives()?.into_iter().map(|(what, bytes)| Hostile {
        what,
        kind: Kind::Bootcode,
        purpose: Purpose::Installer,
        bytes,
    });
    let tarballs = tarball::archives()?.into_iter().map(|(what, bytes)| Hostile {
        what,
        kind: Kind::Image,
        purpose: Purpose::Unspecified,
        bytes,
    });
    Ok(zips.chain(tarballs).collect())
}
