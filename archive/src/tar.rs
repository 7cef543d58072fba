//! Root tarballs: one reader of our own for checking and for unpacking, so that what passed the one cannot surprise the
//! other. It knows ustar, GNU (long names, sparse files) and pax (names, sizes, times, attributes, sparse files).

mod acl;
pub(crate) mod guard;
mod header;
mod pax;
pub(crate) mod reader;
mod sparse;
mod unpack;

use std::io::BufRead;
use std::path::Path;

use crate::facts::{Collector, Facts};
use crate::{Error, Reason, Refused};
use guard::Guard;
use reader::TarReader;
use unpack::Root;

/// Most entries. A desktop system has about 300,000 files.
const MAX_ENTRIES: u64 = 2_000_000;
/// Most bytes unpacked, holes included: larger than the cards that Pis have.
const MAX_UNPACKED: u64 = 256 << 30;
/// How many bytes between two calls of `progress`.
const PROGRESS_STEP: u64 = 1 << 20;

/// What is in a tarball.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TarSummary {
    /// Entries.
    pub entries: u64,
    /// Bytes of its regular files, holes included.
    pub unpacked_bytes: u64,
    /// Owners, device nodes and extended attributes that could not be restored, because this process may not or the
    /// file system cannot. 0 when only checked. As root on a real file system anything else means a broken system.
    pub not_restored: u64,
    /// Whether it is no tarball but a whole-disk image, whose entries are its partitions.
    pub disk: bool,
}

/// Whether this sector is the header of a member.
pub(crate) fn is_header(sector: &[u8]) -> bool {
    sector.try_into().is_ok_and(|block| header::Header::parse(block).is_ok())
}

/// Reads a decompressed tarball through to its end and checks every rule. `progress` gets the unpacked bytes so far, now
/// and then.
///
/// # Errors
/// `Refused` with the first broken rule; `Io` when reading fails.
pub fn check_tar<R: BufRead>(reader: R, progress: &mut dyn FnMut(u64)) -> Result<TarSummary, Error> {
    walk(reader, None, None, progress)
}

/// As [`check_tar`], and what the tarball says about itself as a system.
///
/// # Errors
/// As [`check_tar`].
pub(crate) fn examine_tar<R: BufRead>(reader: R, progress: &mut dyn FnMut(u64)) -> Result<(TarSummary, Facts), Error> {
    let mut collector = Collector::default();
    let summary = walk(reader, None, Some(&mut collector), progress)?;
    Ok((summary, collector.into_facts()))
}

/// Unpacks a decompressed tarball under `root`, which must exist, by the same rules, never through a link out of it.
/// Existing files are replaced. Owners and device nodes are restored when running as root. Nothing is synced.
/// `progress` gets the unpacked bytes so far, now and then.
///
/// # Errors
/// As [`check_tar`]; what was written before stays.
pub fn unpack_tar<R: BufRead>(reader: R, root: &Path, progress: &mut dyn FnMut(u64)) -> Result<TarSummary, Error> {
    walk(reader, Some(Root::open(root)?), None, progress)
}

fn walk<R: BufRead>(
    reader: R,
    mut root: Option<Root>,
    mut collector: Option<&mut Collector>,
    progress: &mut dyn FnMut(u64),
) -> Result<TarSummary, Error> {
    let mut reader = TarReader::new(reader);
    let mut guard = Guard::default();
    let mut summary = TarSummary::default();
    let mut reported = 0;
    let mut report = |done: u64, last: bool| {
        if last || done.saturating_sub(reported) >= PROGRESS_STEP {
            reported = done;
            progress(done);
        }
    };
    while let Some(member) = reader.next_member()? {
        let refused = |reason| Refused::entry(&member.path, reason);
        summary.entries += 1;
        if summary.entries > MAX_ENTRIES {
            return Err(Refused::archive(Reason::TooManyEntries(MAX_ENTRIES)).into());
        }
        let before = summary.unpacked_bytes;
        summary.unpacked_bytes = before.saturating_add(member.size);
        if summary.unpacked_bytes > MAX_UNPACKED {
            return Err(refused(Reason::TooLarge(MAX_UNPACKED)).into());
        }
        let place = guard.admit(&member).map_err(refused)?;
        if let Some(collector) = &mut collector {
            collector.member(&place.path, &member);
        }
        match &mut root {
            None => reader.contents(&mut |offset, block| {
                if let Some(collector) = &mut collector {
                    collector.contents(offset, block);
                }
                report(before.saturating_add(offset), false);
                Ok(())
            })?,
            Some(root) => root.make(&member, &place, &mut reader, &mut |offset| {
                report(before.saturating_add(offset), false);
            })?,
        }
        report(summary.unpacked_bytes, false);
    }
    if summary.entries == 0 {
        return Err(Refused::archive(Reason::Empty).into());
    }
    if let Some(root) = root {
        summary.not_restored = root.finish()?;
    }
    report(summary.unpacked_bytes, true);
    if let Some(collector) = collector {
        collector.finish(&guard);
    }
    Ok(summary)
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod unpack_tests;
