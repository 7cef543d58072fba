//! Root tarballs. One reader of our own serves checking and unpacking, so both see the same members in the same bytes.
//! It reads ustar, GNU (long names, sparse files) and pax (names, sizes, times, attributes, sparse files).

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

/// Maximum number of entries. A desktop system has about 300,000 files.
const MAX_ENTRIES: u64 = 2_000_000;
/// Maximum of unpacked bytes, holes included. This is larger than any card used in a Pi.
const MAX_UNPACKED: u64 = 256 << 30;
/// Bytes between two calls of `progress`.
const PROGRESS_STEP: u64 = 1 << 20;

/// Totals of a tarball.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TarSummary {
    /// Number of entries.
    pub entries: u64,
    /// Bytes of the regular files, holes included.
    pub unpacked_bytes: u64,
    /// Owners, device nodes and extended attributes that could not be restored, because the process lacks the privilege
    /// or the file system lacks the feature. 0 after a check without unpacking. As root on a real file system, any
    /// other value means a broken system.
    pub not_restored: u64,
    /// True for a whole-disk image. Its partitions are then counted as entries.
    pub disk: bool,
}

/// Returns true if this sector is a valid tar header.
pub(crate) fn is_header(sector: &[u8]) -> bool {
    sector.try_into().is_ok_and(|block| header::Header::parse(block).is_ok())
}

/// Reads a decompressed tarball to its end and checks every rule. `progress` receives the unpacked bytes so far, once
/// per MiB and at the end.
///
/// # Errors
/// `Refused` with the first broken rule; `Io` if reading fails.
pub fn check_tar<R: BufRead>(reader: R, progress: &mut dyn FnMut(u64)) -> Result<TarSummary, Error> {
    walk(reader, None, None, progress)
}

/// Like [`check_tar`], and also collects the facts by which the tarball is judged as a system.
///
/// # Errors
/// As [`check_tar`].
pub(crate) fn examine_tar<R: BufRead>(reader: R, progress: &mut dyn FnMut(u64)) -> Result<(TarSummary, Facts), Error> {
    let mut collector = Collector::default();
    let summary = walk(reader, None, Some(&mut collector), progress)?;
    Ok((summary, collector.into_facts()))
}

/// Unpacks a decompressed tarball under `root`, which must exist. The rules of [`check_tar`] apply, and nothing is
/// written outside of `root`. Existing files are replaced. Owners and device nodes are restored only when running as
/// root. Nothing is synced. `progress` receives the unpacked bytes so far, once per MiB and at the end.
///
/// # Errors
/// As for [`check_tar`]. Files that were already written stay.
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
        // The size is added before the contents are read. A header that claims terabytes is refused at once.
        let before = summary.unpacked_bytes;
        summary.unpacked_bytes = before.saturating_add(member.size);
        if summary.unpacked_bytes > MAX_UNPACKED {
            return Err(refused(Reason::TooLarge(MAX_UNPACKED)).into());
        }
        let place = guard.admit(&member).map_err(refused)?;
        if let Some(collector) = &mut collector {
            collector.member(&place, &member);
        }
        // Facts are collected only at the push. The agent that unpacks gets them with the artifact.
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
    // Only now is the guard complete: a link may point to a file that comes later in the archive.
    if let Some(collector) = collector {
        collector.finish(&guard);
    }
    Ok(summary)
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod unpack_tests;
