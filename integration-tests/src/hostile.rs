//! Archives that somebody made on purpose, byte by byte, because the crates that write archives refuse to.

mod tarball;
mod zipfile;

use anyhow::Result;
use marco_proto::v1::artifact::{Kind, Purpose};

/// An archive that must be refused.
#[derive(Debug)]
pub struct Hostile {
    /// What is wrong with it.
    pub what: &'static str,
    /// As what it is pushed.
    pub kind: Kind,
    /// For a bootcode: to start what.
    pub purpose: Purpose,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// All of them.
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
