//! The agent's log: on the console, its last part in memory and, for the installer, in a file on the card. For a node
//! that was never online, that file is the only record of the reason.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

use crate::bootpart::write_whole;
use crate::system::STARTED_AGAIN;

/// Most bytes that are kept.
const KEPT: usize = 128 * 1024;

/// The last part of the log. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Logbook(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    last: VecDeque<u8>,
    file: Option<PathBuf>,
    changed: bool,
}

impl Logbook {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the log to this file from now on, after the log of earlier boots in it.
    pub fn keep_in(&self, file: &Path) {
        let mut book = self.book();
        let mut before = std::fs::read(file).unwrap_or_default();
        if !before.is_empty() {
            before.extend_from_slice(STARTED_AGAIN.as_bytes());
        }
        // In front: lines that were logged before the card was found are newer than the file.
        for byte in before.into_iter().rev() {
            book.last.push_front(byte);
        }
        book.file = Some(file.to_owned());
        book.bound();
    }

    /// The kept part of the log.
    pub fn last(&self) -> Vec<u8> {
        self.book().last.make_contiguous().to_vec()
    }

    /// Writes the log to its file, unless it is unchanged.
    pub fn write(&self) {
        // The lock is not held during the write: a slow card must not block every log message.
        let (file, bytes) = {
            let mut book = self.book();
            let Some(file) = book.file.clone().filter(|_| book.changed) else { return };
            book.changed = false;
            (file, book.last.make_contiguous().to_vec())
        };
        if let Err(error) = write_whole(&file, &bytes) {
            // Only to the console: a log message would cause the next write.
            let _ = writeln!(io::stderr(), "log not kept: {error}");
        }
    }
}

impl Book {
    fn add(&mut self, bytes: &[u8]) {
        self.last.extend(bytes);
        self.bound();
    }

    /// Drops the oldest lines beyond [`KEPT`]. Never a part of a line.
    fn bound(&mut self) {
        self.changed = true;
        let excess = self.last.len().saturating_sub(KEPT);
        if excess > 0 {
            let line = self.last.iter().skip(excess).position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            self.last.drain(..excess + line);
        }
    }
}

impl Write for Logbook {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The console may be gone. The log must still reach the card.
        let _ = io::stderr().write_all(bytes);
        self.book().add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Logbook {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::{KEPT, Logbook};

    #[test]
    fn the_last_part_is_kept_over_boots_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("install.log");
        let mut first = Logbook::default();
        writeln!(first, "before there is a card").unwrap();
        first.keep_in(&file);
        first.write();
        assert_eq!(first.last(), b"before there is a card\n");
        let mut second = Logbook::default();
        second.keep_in(&file);
        writeln!(second, "second boot").unwrap();
        second.write();
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text, "before there is a card\n--- started again ---\nsecond boot\n");
        for _ in 0..20_000 {
            second.book().add(b"one more line\n");
        }
        second.write();
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.len() <= KEPT && text.len() > KEPT / 2, "{}", text.len());
        assert!(text.starts_with("one more line\n") && text.ends_with("one more line\n"));
    }
}
