//! A partition, read and written through its disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;

/// A range of a disk, accessed like a disk of its own.
#[derive(Debug)]
pub(crate) struct Part {
    disk: File,
    start: u64,
    length: u64,
    at: u64,
}

impl Part {
    pub(crate) fn of(disk: File, start: u64, length: u64) -> Self {
        Self { disk, start, length, at: 0 }
    }

    /// Returns the number of bytes that fit before the end, at most `wanted`.
    fn room(&self, wanted: usize) -> usize {
        usize::try_from(self.length.saturating_sub(self.at)).unwrap_or(usize::MAX).min(wanted)
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = self.room(buffer.len());
        let read = self.disk.read_at(buffer.get_mut(..room).unwrap_or_default(), self.start + self.at)?;
        self.at += u64::try_from(read).unwrap_or_default();
        Ok(read)
    }
}

impl Write for Part {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let room = self.room(buffer.len());
        let written = self.disk.write_at(buffer.get(..room).unwrap_or_default(), self.start + self.at)?;
        self.at += u64::try_from(written).unwrap_or_default();
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Nothing is buffered. The caller syncs the disk once at the end.
        Ok(())
    }
}

impl Seek for Part {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.filter(|at| *at <= self.length).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
