//! Write-back at the card's own pace: unpacked bytes go to the card while more arrive. So little is left for the sync
//! at the end, and memory is not filled with bytes that the card has yet to take.

use std::fs::File;
use std::io::Result;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::step;

/// Bytes after which the card is told to write.
const STEP: u64 = 16 << 20;
/// Most bytes that are unpacked and not on the card: seconds of work for a slow card.
const WINDOW: u64 = 64 << 20;

/// Paces the writer of one file system.
pub(super) struct WriteBack {
    ask: Option<SyncSender<u64>>,
    asked: u64,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// Bytes that are on the card; the first error.
    written: Mutex<(u64, Option<std::io::Error>)>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (u64, Option<std::io::Error>)> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriteBack {
    /// Starts for the file system that holds this folder.
    pub(super) fn of_folder(folder: &Path) -> Result<Self> {
        let (path, folder) = (folder.to_owned(), File::open(folder)?);
        // Not `sync_file_range`: it does not reach metadata, and small files are most of a root.
        Self::start(move || {
            step::at("sync", &path, &[])?;
            Ok(rustix::fs::syncfs(&folder)?)
        })
    }

    /// Starts a thread that calls `sync` on request.
    pub(super) fn start(sync: impl Fn() -> Result<()> + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (ask, asked) = sync_channel::<u64>(1);
        let told = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("write-back".to_owned()).spawn(move || {
            for bytes in asked {
                let synced = sync();
                let mut written = told.lock();
                written.0 = bytes;
                if let Err(error) = synced {
                    written.1.get_or_insert(error);
                }
                drop(written);
                told.changed.notify_all();
            }
        })?;
        Ok(Self { ask: Some(ask), asked: 0, shared, thread: Some(thread) })
    }

    /// Reports the bytes that were unpacked in all. Blocks while too many of them are not on the card.
    pub(super) fn unpacked(&mut self, bytes: u64) {
        loop {
            // Never waits here: with one sync under way and one requested, a later call requests the next.
            let due = bytes.saturating_sub(self.asked) >= STEP;
            if due && self.ask.as_ref().is_some_and(|ask| ask.try_send(bytes).is_ok()) {
                self.asked = bytes;
            }
            let written = self.shared.lock();
            let before = written.0;
            // Without a sync under way nothing would end the wait.
            if bytes.saturating_sub(before) <= WINDOW || self.asked <= before {
                return;
            }
            drop(self.shared.changed.wait_while(written, |written| written.0 == before));
        }
    }

    /// Waits for the requested syncs. Returns the first error.
    pub(super) fn finish(mut self) -> Result<()> {
        self.join();
        let error = self.shared.lock().1.take();
        error.map_or(Ok(()), Err)
    }

    fn join(&mut self) {
        // The thread ends when its channel closes.
        drop(self.ask.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}

impl Drop for WriteBack {
    /// The thread holds the file system open, which is unmounted next.
    fn drop(&mut self) {
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::{STEP, WINDOW, WriteBack};

    #[test]
    fn nobody_is_further_ahead_of_the_card_than_the_window() {
        let dir = tempfile::tempdir().unwrap();
        let mut pace = WriteBack::of_folder(dir.path()).unwrap();
        for bytes in (0..=4 * WINDOW).step_by(1 << 20) {
            pace.unpacked(bytes);
            assert!(bytes - pace.shared.lock().0 <= WINDOW);
            assert!(bytes - pace.asked < WINDOW);
        }
        // A hole may be longer than the window.
        pace.unpacked(100 * WINDOW);
        assert_eq!(pace.asked, 100 * WINDOW);
        pace.unpacked(100 * WINDOW + STEP - 1);
        pace.finish().unwrap();
    }
}
