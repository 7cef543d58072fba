//! Signs of life of the database: its last answer, and the success of writes.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::StoreError;

/// Time without any answer, though something was asked, after which the database is silent.
const SILENT: Duration = Duration::from_millis(1500);
/// After a fault of the disk, small writes may succeed while others fail. It counts as healed if none failed for this
/// long.
const QUIET: Duration = Duration::from_secs(5);

/// Time of the last answer, questions under way, and the results of writes.
pub(super) struct Vitals {
    begun: Instant,
    waiting: AtomicUsize,
    last_millis: AtomicU64,
    /// A question was given up in silence, and no answer came since. The silence lasts on between two questions.
    given_up: AtomicBool,
    writes: Mutex<Writes>,
}

#[derive(Default)]
struct Writes {
    wrote: Option<Instant>,
    failed: Option<Failed>,
}

struct Failed {
    at: Instant,
    why: String,
    disk: bool,
}

impl Default for Vitals {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            waiting: AtomicUsize::new(0),
            last_millis: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
            writes: Mutex::default(),
        }
    }
}

impl Vitals {
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// True if something was asked and no answer came for a while.
    pub(super) fn is_silent(&self) -> bool {
        let last = self.last_millis.load(Ordering::Relaxed);
        self.waiting.load(Ordering::Relaxed) > 0 && u128::from(self.now().saturating_sub(last)) >= SILENT.as_millis()
    }

    /// Notes that something is asked, until the result is dropped.
    pub(super) fn asked(self: &Arc<Self>) -> Asked {
        // The first question starts the clock: a database that nobody asked is not silent.
        if self.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
            self.last_millis.store(self.now(), Ordering::Relaxed);
        }
        Asked(Arc::clone(self))
    }

    /// Notes that a write was committed.
    pub(super) fn wrote(&self) {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).wrote = Some(Instant::now());
    }

    /// Notes that a write failed. Failures due to the statement itself, or to another transaction, do not count.
    pub(super) fn write_failed(&self, error: &StoreError) {
        if error.is_contention() || !matches!(error, StoreError::Unavailable(_)) {
            return;
        }
        let failed = Failed { at: Instant::now(), why: crate::chain(error), disk: error.fault().is_some() };
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).failed = Some(failed);
    }

    /// Why writes fail at present. `None` if they succeed.
    pub(super) fn ailment(&self) -> Option<String> {
        if self.is_silent() || self.given_up.load(Ordering::Relaxed) {
            return Some("the database does not answer".to_owned());
        }
        let writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = writes.failed.as_ref()?;
        // After a fault of the disk, one successful write proves little; see `QUIET`.
        let healed =
            writes.wrote.is_some_and(|wrote| wrote > failed.at) && (!failed.disk || failed.at.elapsed() >= QUIET);
        (!healed).then(|| failed.why.clone())
    }
}

/// A question that is under way.
pub(super) struct Asked(Arc<Vitals>);

impl Asked {
    /// Notes that the answer came.
    pub(super) fn answered(&self) {
        self.0.last_millis.store(self.0.now(), Ordering::Relaxed);
        self.0.given_up.store(false, Ordering::Relaxed);
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if self.0.is_silent() {
            self.0.given_up.store(true, Ordering::Relaxed);
        }
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn silence_lasts_until_an_answer() {
        let vitals = Arc::new(Vitals::default());
        let asked = vitals.asked();
        assert_eq!(vitals.ailment(), None);
        tokio::time::sleep(SILENT).await;
        drop(asked);
        // The next question has not waited long, yet the database is as silent as before.
        let asked = vitals.asked();
        assert!(!vitals.is_silent() && vitals.ailment().is_some());
        asked.answered();
        assert_eq!(vitals.ailment(), None);
        drop(asked);
        assert_eq!(vitals.ailment(), None);
    }
}
