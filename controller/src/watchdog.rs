//! Detects that this controller does no work: a loop that stands still, beats that fail, writes that fail, a wrong
//! clock. It logs that, reports it in the health service, and sends the nodes to another controller if that helps them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::sessions::Sessions;
use crate::store::Store;

/// A loop without a completed round for this long has failed. After the same time other controllers take this one for
/// dead and end its sessions.
const STILL: Duration = Duration::from_secs(15);
/// Interval of the checks.
const LOOK: Duration = Duration::from_millis(500);
/// Interval at which it asks if another controller serves, while this one does not. Two positive answers in a row are
/// required: after an outage of the database one controller is back up to seconds before the other.
const ASK: Duration = Duration::from_secs(5);

/// Times at which the last rounds of a loop ended.
#[derive(Debug, Clone, Copy)]
struct Rounds {
    /// The last round, successful or not.
    ended: Instant,
    /// The last successful round.
    done: Instant,
}

/// A loop's handle, by which it reports its rounds.
#[derive(Debug, Clone)]
pub struct Pulse {
    name: &'static str,
    rounds: Arc<Mutex<Rounds>>,
}

impl Pulse {
    /// The pulse of a loop that starts now.
    pub fn new(name: &'static str) -> Self {
        let now = Instant::now();
        Self { name, rounds: Arc::new(Mutex::new(Rounds { ended: now, done: now })) }
    }

    /// Reports the end of a round.
    pub fn beat<T, E>(&self, round: &Result<T, E>) {
        self.beat_at(Instant::now(), round.is_ok());
    }

    fn beat_at(&self, now: Instant, done: bool) {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        // A failed round still shows that the loop runs.
        rounds.ended = now;
        if done {
            rounds.done = now;
        }
    }

    fn rounds(&self) -> Rounds {
        *self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The loops that a working controller needs.
#[derive(Debug, Clone)]
pub struct Pulses {
    /// Assigns what is due.
    pub dispatcher: Pulse,
    /// Writes this controller's sign of life into the store.
    pub beat: Pulse,
    /// Fires schedules.
    pub scheduler: Pulse,
}

impl Default for Pulses {
    fn default() -> Self {
        Self { dispatcher: Pulse::new("dispatcher"), beat: Pulse::new("beat"), scheduler: Pulse::new("scheduler") }
    }
}

/// The state of this controller's loops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Well,
    /// Rounds end with errors: the database is away, perhaps for this controller only.
    Failing(&'static str),
    /// A round does not end at all: the loop hangs.
    Still(&'static str),
}

impl Pulses {
    fn condition(&self, now: Instant) -> Condition {
        let pulses = [&self.dispatcher, &self.beat, &self.scheduler];
        // Monotonic time: a clock that is set must not send nodes away.
        let late = |at: Instant| now.saturating_duration_since(at) >= STILL;
        // A hang goes first, because it alone sends the nodes away at once. It also looks like a failure: no round
        // succeeded.
        if let Some(pulse) = pulses.iter().find(|pulse| late(pulse.rounds().ended)) {
            return Condition::Still(pulse.name);
        }
        match pulses.iter().find(|pulse| late(pulse.rounds().done)) {
            Some(pulse) => Condition::Failing(pulse.name),
            None => Condition::Well,
        }
    }
}

/// Asks if another controller serves.
pub type Others = Arc<dyn Fn() -> BoxFuture<'static, bool> + Send + Sync>;

/// Checks the clock; `None`: it can be right.
pub type CheckClock = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// Watches over the loops of a controller.
pub struct Watchdog {
    /// Knows if writes fail.
    pub store: Store,
    /// The sessions whose nodes are sent away.
    pub sessions: Arc<Sessions>,
    /// The loops to watch.
    pub pulses: Pulses,
    /// State of the health service; false: not serving.
    pub serving: watch::Sender<bool>,
    /// Asked while rounds fail. If every controller waits for the database, the nodes stay.
    pub others: Others,
    /// Checked each time. Nodes are not sent away for a wrong clock: controllers on one database share one clock.
    pub clock: CheckClock,
}

/// The state at the last check, so that only changes are logged.
#[derive(Debug)]
struct Seen {
    condition: Condition,
    ails: bool,
    clock_is_wrong: bool,
    asked: Option<Instant>,
    /// The last answer of `others`.
    others_served: bool,
}

impl Default for Seen {
    fn default() -> Self {
        Self { condition: Condition::Well, ails: false, clock_is_wrong: false, asked: None, others_served: false }
    }
}

impl Watchdog {
    /// Checks until cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let mut seen = Seen::default();
        loop {
            // Dropping the wait or the look on a stop loses nothing.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.look(&mut seen, Instant::now()) => {}
            }
        }
    }

    async fn look(&self, seen: &mut Seen, now: Instant) {
        let condition = self.pulses.condition(now);
        let ailment = self.store.ailment();
        report(seen.condition, condition);
        // Only reported: other controllers write to the same database, so nodes gain nothing by moving.
        match (&ailment, seen.ails) {
            (Some(why), false) => tracing::error!(error = why.as_str(), "writes fail"),
            (None, true) => tracing::info!("writes succeed again"),
            _ => {}
        }
        let clock = (self.clock)();
        match (&clock, seen.clock_is_wrong) {
            (Some(why), false) => tracing::error!(error = why.as_str(), "the clock is wrong"),
            (None, true) => tracing::info!("the clock can be right again"),
            _ => {}
        }
        (seen.condition, seen.ails, seen.clock_is_wrong) = (condition, ailment.is_some(), clock.is_some());
        self.serving.send_if_modified(|serving| {
            let well = condition == Condition::Well && ailment.is_none() && clock.is_none();
            std::mem::replace(serving, well) != well
        });
        let away = match condition {
            Condition::Well => {
                seen.others_served = false;
                false
            }
            // A loop that hangs is this controller's own trouble, so the others are not asked.
            Condition::Still(_) => true,
            // Once sent away they stay away until the loops are well: going back and forth would cost a dial each time.
            Condition::Failing(_) if self.sessions.is_away() => true,
            Condition::Failing(_) if seen.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK) => {
                seen.asked = Some(now);
                let others_serve = (self.others)().await;
                std::mem::replace(&mut seen.others_served, others_serve) && others_serve
            }
            Condition::Failing(_) => false,
        };
        // Only changes, so that the log has one line for each.
        if away != self.sessions.is_away() {
            let nodes = self.sessions.live().len();
            self.sessions.send_away(away);
            if away {
                tracing::error!(nodes, "nodes are sent to other controllers");
            } else {
                tracing::info!("nodes are let in again");
            }
        }
    }
}

fn report(was: Condition, condition: Condition) {
    if was == condition {
        return;
    }
    match condition {
        Condition::Well => tracing::info!("all loops complete their rounds again"),
        Condition::Failing(part) => tracing::error!(part, "no round succeeded for 15 s"),
        Condition::Still(part) => tracing::error!(part, "no round ended for 15 s: it stands still"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    use crate::sessions::{End, Handle};
    use marco_proto::names::NodeId;

    #[test]
    fn a_loop_that_stands_still_is_told_from_one_that_fails() {
        let pulses = Pulses::default();
        let after = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(pulses.condition(after(14)), Condition::Well);
        pulses.dispatcher.beat_at(after(14), true);
        pulses.beat.beat_at(after(14), false);
        pulses.scheduler.beat_at(after(14), true);
        assert_eq!(pulses.condition(after(16)), Condition::Failing("beat"));
        assert_eq!(pulses.condition(after(30)), Condition::Still("dispatcher"));
        for pulse in [&pulses.dispatcher, &pulses.beat, &pulses.scheduler] {
            pulse.beat_at(after(30), true);
        }
        assert_eq!(pulses.condition(after(31)), Condition::Well);
    }

    struct Bench {
        watchdog: Watchdog,
        clock_is_wrong: Arc<AtomicBool>,
        seen: Seen,
        begun: Instant,
        serving: watch::Receiver<bool>,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        async fn new(serves: bool) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(&format!("sqlite://{}/marco.db", folder.path().display())).await.unwrap();
            let (sender, serving) = watch::channel(true);
            let others: Others = Arc::new(move || Box::pin(std::future::ready(serves)));
            let (pulses, sessions) = (Pulses::default(), Arc::default());
            let clock_is_wrong: Arc<AtomicBool> = Arc::default();
            let wrong = Arc::clone(&clock_is_wrong);
            let clock: CheckClock = Arc::new(move || wrong.load(Ordering::Relaxed).then(|| "it says 1970".to_owned()));
            let watchdog = Watchdog { store, sessions, pulses, serving: sender, others, clock };
            Self { watchdog, clock_is_wrong, seen: Seen::default(), begun: Instant::now(), serving, _folder: folder }
        }

        /// Checks once, at this many seconds after the start. `round` is the result of the rounds that just ended;
        /// `None`: none ended.
        async fn look(&mut self, seconds: u64, round: Option<bool>) {
            let (pulses, now) = (&self.watchdog.pulses, self.begun + Duration::from_secs(seconds));
            for pulse in [&pulses.dispatcher, &pulses.beat, &pulses.scheduler] {
                if let Some(done) = round {
                    pulse.beat_at(now, done);
                }
            }
            self.watchdog.look(&mut self.seen, now).await;
        }

        fn session(&self, epoch: i64) -> Option<Handle> {
            self.watchdog.sessions.open(&NodeId::parse("pi-1").unwrap(), epoch, "0a")
        }
    }

    #[tokio::test]
    async fn nodes_of_a_controller_that_stands_still_are_sent_away_and_let_in_again() {
        let mut bench = Bench::new(false).await;
        let handle = bench.session(1).unwrap();
        bench.look(10, None).await;
        assert!(handle.end.borrow().is_none() && *bench.serving.borrow());
        bench.look(16, None).await;
        assert_eq!(*handle.end.borrow(), Some(End::Away));
        assert!(!*bench.serving.borrow());
        assert!(bench.session(2).is_none(), "none is let in meanwhile");
        bench.look(17, Some(true)).await;
        assert!(*bench.serving.borrow());
        assert!(bench.session(3).is_some());
    }

    #[tokio::test]
    async fn controller_with_a_wrong_clock_is_not_serving() {
        let mut bench = Bench::new(true).await;
        let handle = bench.session(1).unwrap();
        bench.clock_is_wrong.store(true, Ordering::Relaxed);
        bench.look(1, Some(true)).await;
        assert!(!*bench.serving.borrow());
        assert_eq!(*handle.end.borrow(), None, "nodes stay: no other controller has another clock");
        bench.clock_is_wrong.store(false, Ordering::Relaxed);
        bench.look(2, Some(true)).await;
        assert!(*bench.serving.borrow());
    }

    #[tokio::test]
    async fn nodes_stay_when_another_controller_is_back_first() {
        let mut bench = Bench::new(true).await;
        let handle = bench.session(1).unwrap();
        for seconds in [5, 10, 16, 20] {
            bench.look(seconds, Some(false)).await;
        }
        bench.look(21, Some(true)).await;
        for seconds in [37, 41] {
            bench.look(seconds, Some(false)).await;
        }
        assert_eq!(*handle.end.borrow(), None);
        bench.look(42, Some(false)).await;
        assert_eq!(*handle.end.borrow(), Some(End::Away));
    }

    #[tokio::test]
    async fn nodes_stay_while_no_controller_reaches_the_database() {
        for (serves, end) in [(false, None), (true, Some(End::Away))] {
            let mut bench = Bench::new(serves).await;
            let handle = bench.session(1).unwrap();
            for seconds in [5, 10, 16, 22, 30] {
                bench.look(seconds, Some(false)).await;
            }
            assert_eq!(*handle.end.borrow(), end, "another serves: {serves}");
            assert!(!*bench.serving.borrow());
        }
    }
}
