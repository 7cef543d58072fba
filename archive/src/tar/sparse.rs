//! Maps of sparse files: the list of stored parts (GNU tar's manual, "Storing Sparse Files").

use super::header::{BLOCK, Block, number};
use super::pax::decimal;
use crate::Reason;

/// Maximum number of parts of one file. A map of this length takes 4 MiB.
const MAX_PARTS: usize = 1 << 18;

/// A stored part: offset in the file and length, both in bytes.
pub(super) type Part = (u64, u64);

/// A map while it is read. Parts must be in order, must not overlap, and must lie within the file.
#[derive(Debug)]
pub(super) struct Map {
    parts: Vec<Part>,
    size: u64,
    end: u64,
    stored: u64,
}

impl Map {
    pub(super) fn new(size: u64) -> Self {
        Self { parts: Vec::new(), size, end: 0, stored: 0 }
    }

    pub(super) fn push(&mut self, offset: u64, length: u64) -> Result<(), Reason> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size).ok_or(Reason::Sparse)?;
        // Unordered parts are refused. With overlaps, the result would depend on the order of writing.
        if offset < self.end || self.parts.len() >= MAX_PARTS {
            return Err(Reason::Sparse);
        }
        self.end = end;
        self.stored += length;
        // GNU tar ends a map with an empty part that marks the size of the file.
        if length > 0 {
            self.parts.push((offset, length));
        }
        Ok(())
    }

    /// Returns the parts. Fails unless their total length equals `stored`, the bytes in the archive.
    pub(super) fn finish(self, stored: u64) -> Result<Vec<Part>, Reason> {
        if self.stored == stored { Ok(self.parts) } else { Err(Reason::Sparse) }
    }

    /// Reads the entries of an old GNU header (`first`) or of a continuation block. Returns true if another block
    /// follows.
    pub(super) fn push_gnu(&mut self, block: &Block, first: bool) -> Result<bool, Reason> {
        // Offsets from GNU tar's `struct oldgnu_header` and `struct sparse_header`: 4 and 21 entries of 24 bytes.
        let (from, count) = if first { (386, 4) } else { (0, 21) };
        let flag = from + count * 24;
        for at in (from..flag).step_by(24) {
            let field = |at: usize| block.get(at..at + 12).unwrap_or_default();
            if field(at).first() == Some(&0) {
                break;
            }
            self.push(number(field(at))?, number(field(at + 12))?)?;
        }
        Ok(block.get(flag).is_some_and(|&flag| flag != 0))
    }

    /// Reads a map of format 0.1: decimal numbers separated by commas.
    pub(super) fn push_list(&mut self, list: &[u8]) -> Result<(), Reason> {
        let mut numbers = list.split(|&byte| byte == b',').filter(|text| !text.is_empty());
        while let Some(offset) = numbers.next() {
            self.push(decimal(offset)?, decimal(numbers.next().ok_or(Reason::Sparse)?)?)?;
        }
        Ok(())
    }
}

/// Reads a map of format 1.0, which precedes the data: one decimal number per line, padded to whole blocks.
#[derive(Debug, Default)]
pub(super) struct TextMap {
    line: Vec<u8>,
    count: Option<u64>,
    offset: Option<u64>,
}

impl TextMap {
    /// Reads a block. Returns true if the map is complete.
    pub(super) fn push(&mut self, block: &[u8; BLOCK], map: &mut Map) -> Result<bool, Reason> {
        for &byte in block {
            if self.count == Some(0) {
                // The map is complete. The rest of the block is padding.
                return Ok(true);
            }
            if byte != b'\n' {
                self.line.push(byte);
                // 20 digits hold every 64-bit number. A longer line would let the archive choose our memory use.
                if self.line.len() > 20 {
                    return Err(Reason::Sparse);
                }
                continue;
            }
            let number = decimal(&std::mem::take(&mut self.line)).map_err(|_| Reason::Sparse)?;
            match (self.count, self.offset.take()) {
                (None, _) => self.count = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(count), Some(offset)) => {
                    map.push(offset, number)?;
                    self.count = Some(count - 1);
                }
            }
        }
        Ok(self.count == Some(0))
    }
}
