//! The one reconciler. It takes no input: each round reads store, sessions and clock, and does what is due. A change of
//! the store or a tick only wakes it, so restart, reconnect and the normal path are the same code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use marco_proto::names::NodeId;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::operation::NodeState;
use crate::sessions::{Command, End, Sessions};
use crate::store::{Store, StoreError};
use crate::watchdog::Pulses;

/// Longest time between two rounds, before jitter. Scheduled times are kept to this precision.
const TICK: Duration = Duration::from_secs(1);
/// Pause after a change, so that one round handles several changes.
const SETTLE: Duration = Duration::from_millis(15);
/// Interval of the sweep, which checks that live sessions are still admitted. A quarantine takes effect within 5 s on
/// every controller.
const SWEEP: Duration = Duration::from_secs(2);
/// Least time between two log messages about failed rounds.
const COMPLAIN: Duration = Duration::from_secs(60);

/// The reconciler of one controller.
pub struct Dispatcher {
    store: Store,
    sessions: Arc<Sessions>,
    clock: Arc<dyn Clock>,
    controller: String,
    address: String,
    /// A claim failed, but may be committed nevertheless: the answer to the commit was lost.
    unsure: AtomicBool,
    /// Signs of life for the watchdog.
    pulses: Pulses,
}

impl Dispatcher {
    /// A dispatcher for the sessions of the controller with this id. Other controllers and nodes find it at `address`.
    pub fn new(
        store: Store,
        sessions: Arc<Sessions>,
        clock: Arc<dyn Clock>,
        controller: String,
        address: String,
    ) -> Self {
        Self { store, sessions, clock, controller, address, unsure: AtomicBool::new(false), pulses: Pulses::default() }
    }

    /// Reports the rounds to a watchdog.
    #[must_use]
    pub fn watched(self, pulses: Pulses) -> Self {
        Self { pulses, ..self }
    }

    /// Runs rounds until cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let mut changes = self.store.subscribe_changes();
        let mut swept = None::<tokio::time::Instant>;
        let mut complained = None::<tokio::time::Instant>;
        loop {
            // Before the round: a change that comes during it wakes the next one.
            changes.mark_unchanged();
            let sweep = swept.is_none_or(|last| last.elapsed() >= SWEEP);
            let done = self.round(sweep).await;
            self.pulses.dispatcher.beat(&done);
            if done.is_err() {
                // A round that the store's absence ends early never reaches the beat. The beat failed then; without
                // this the watchdog would say that it stands still.
                self.pulses.beat.beat(&done);
            }
            let away = is_away(&done);
            if sweep && !away {
                swept = Some(tokio::time::Instant::now());
            }
            match done {
                Ok(()) => {
                    if complained.take().is_some() {
                        tracing::info!("the store answers again");
                    }
                }
                Err(error) if complained.is_none_or(|last| last.elapsed() >= COMPLAIN) => {
                    tracing::error!(
                        error = &*crate::chain(&error),
                        "a dispatch round failed; it is tried again each second"
                    );
                    complained = Some(tokio::time::Instant::now());
                }
                Err(_) => {}
            }
            // Each arm only wakes, so dropping the others loses nothing for longer than a tick. Changes wake nothing
            // while the store is away: that would only repeat the failure faster.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(jittered(TICK)) => {}
                changed = changes.changed(), if !away => match changed {
                    Ok(()) => tokio::time::sleep(SETTLE).await,
                    Err(_) => return,
                },
            }
        }
    }

    /// One round. Public so that tests can step through time with a manual clock.
    ///
    /// # Errors
    /// Returns the first error of the store. Finished steps stay done, and the next round goes on. Only a
    /// store that is away ends a round early: a failure of one step must not keep the others from being done.
    #[tracing::instrument(level = "debug", skip_all, name = "round")]
    pub async fn round(&self, sweep: bool) -> Result<(), StoreError> {
        let done = self.steps(sweep).await;
        if is_away(&done) {
            // Reports could not be stored, nor could other controllers send beats. Their silence proves nothing now.
            self.store.interrupt_watch();
        }
        done
    }

    async fn steps(&self, sweep: bool) -> Result<(), StoreError> {
        let now = self.clock.now();
        // First, because the steps below judge silence only if this process has listened long enough.
        let listening = self.store.keep_watch(now);
        let mut failed = None;
        for operation in kept(self.store.move_windows(now).await, &mut failed)? {
            tracing::info!(%operation, "a maintenance window opened or closed");
        }
        kept(self.store.begin_due(now).await, &mut failed)?;
        kept(self.store.release_due(now).await, &mut failed)?;
        kept(self.store.expire(now).await, &mut failed)?;
        for changed in kept(self.store.cancel_outside_scope(now).await, &mut failed)? {
            tracing::warn!(execution = %changed.execution, "a node does not lie any more within the scope of its operation");
        }
        kept(self.store.power_off_done(listening, now).await, &mut failed)?;
        for overdue in kept(self.store.mark_overdue(now).await, &mut failed)? {
            let state = overdue.state.as_str();
            tracing::warn!(execution = %overdue.execution, state, why = overdue.why, "an execution is overdue");
        }
        for changed in kept(self.store.give_up(now).await, &mut failed)? {
            tracing::warn!(execution = %changed.execution, "an overdue execution was given up");
        }
        if sweep {
            kept(self.sweep(now).await, &mut failed)?;
        }
        // Before anything is assigned: a rollout with too many failures must not take another node.
        for (operation, why) in kept(self.store.pause_rollouts(now).await, &mut failed)? {
            tracing::warn!(%operation, why = %why, "an operation paused by itself");
        }
        kept(self.assign(now).await, &mut failed)?;
        kept(self.cancel(now).await, &mut failed)?;
        for operation in kept(self.store.finish_operations(now).await, &mut failed)? {
            tracing::info!(%operation, "an operation ended");
        }
        failed.map_or(Ok(()), Err)
    }

    async fn assign(&self, now: chrono::DateTime<chrono::Utc>) -> Result<(), StoreError> {
        let ready = self.sessions.live().into_iter().filter(|live| live.ready);
        let live: Vec<(NodeId, i64)> = ready.map(|live| (live.node, live.epoch)).collect();
        if live.is_empty() {
            return Ok(());
        }
        if self.unsure.load(Ordering::Relaxed) {
            for (assignment, epoch) in self.store.unanswered(&self.controller).await? {
                let node = assignment.execution.node.clone();
                self.sessions.send(&node, epoch, Command::Assign(Box::new(assignment)));
            }
            self.unsure.store(false, Ordering::Relaxed);
        }
        let claimed = self.store.claim(&self.controller, &live, now).await;
        if claimed.is_err() {
            self.unsure.store(true, Ordering::Relaxed);
        }
        for assignment in claimed? {
            let node = assignment.execution.node.clone();
            let Some((_, epoch)) = live.iter().find(|(id, _)| *id == node) else { continue };
            tracing::info!(execution = %assignment.execution, attempt = assignment.attempt, "assigned");
            // An assignment that is not sent is not lost: the node's next Hello does not list it, so it becomes PENDING
            // again.
            self.sessions.send(&node, *epoch, Command::Assign(Box::new(assignment)));
        }
        Ok(())
    }

    async fn cancel(&self, now: chrono::DateTime<chrono::Utc>) -> Result<(), StoreError> {
        let live = self.sessions.live();
        if live.is_empty() {
            return Ok(());
        }
        for execution in self.store.cancels_due(&self.controller, now).await? {
            if let Some(session) = live.iter().find(|session| session.node == execution.node) {
                self.sessions.send(&session.node, session.epoch, Command::Cancel(execution));
            }
        }
        for execution in self.store.queries_due(&self.controller).await? {
            if let Some(session) = live.iter().find(|session| session.node == execution.node && session.ready) {
                self.sessions.send(&session.node, session.epoch, Command::Query(execution));
            }
        }
        Ok(())
    }

    /// Sends the beat of this controller. Ends the sessions of nodes that were quarantined, deleted, or lost their
    /// certificate, on this or another controller. Also notes which nodes are connected, cancels executions of deleted
    /// nodes, and ends the sessions of dead controllers.
    async fn sweep(&self, now: chrono::DateTime<chrono::Utc>) -> Result<(), StoreError> {
        // First, and on its own: a step that fails must not make the other controllers take this one for dead. The
        // watchdog learns of a failed beat too.
        let beat = self.store.beat(&self.controller, &self.address, now).await;
        self.pulses.beat.beat(&beat);
        let mut failed = None;
        kept(beat, &mut failed)?;
        let live = self.sessions.live();
        let nodes: Vec<NodeId> = live.iter().map(|session| session.node.clone()).collect();
        kept(self.store.touch(&self.controller, &nodes, now).await, &mut failed)?;
        let epochs: Vec<(NodeId, i64)> = live.iter().map(|session| (session.node.clone(), session.epoch)).collect();
        for (node, epoch) in kept(self.store.lost_sessions(&self.controller, &epochs).await, &mut failed)? {
            let admitted = self.store.node(&node).await?.is_some_and(|row| row.state != NodeState::Quarantined);
            tracing::warn!(%node, admitted, "a session is cut: the node is barred, or it is not the node's any more");
            // By its epoch: the node may have a newer session by now, which must not end.
            self.sessions.end_one(&node, epoch, if admitted { End::Lost } else { End::Barred });
        }
        let serials: Vec<String> = live.iter().map(|session| session.certificate.clone()).collect();
        let unacceptable = kept(self.store.unacceptable(&serials).await, &mut failed)?;
        for session in live.iter().filter(|session| unacceptable.contains(&session.certificate)) {
            tracing::warn!(node = %session.node, "a session is cut: its certificate was revoked");
            self.sessions.end_one(&session.node, session.epoch, End::Barred);
        }
        for changed in kept(self.store.cancel_orphans(now).await, &mut failed)? {
            tracing::warn!(execution = %changed.execution, "an execution was cancelled: its node is deleted");
        }
        for node in kept(self.store.end_dead_sessions(now).await, &mut failed)? {
            tracing::warn!(%node, "the session of a controller that died was ended");
        }
        failed.map_or(Ok(()), Err)
    }
}

/// True if a round ended because the store is away. Contention for locks does not count: the store answers nodes then.
fn is_away(done: &Result<(), StoreError>) -> bool {
    matches!(done, Err(error @ StoreError::Unavailable(_)) if !error.is_contention())
}

/// Returns the result of a step. If the step failed, for instance on the locks of other transactions, returns an empty
/// result, and keeps the error in `failed` if it is the first.
///
/// # Errors
/// Passes on the error if the store is away, which ends the round.
fn kept<T: Default>(done: Result<T, StoreError>, failed: &mut Option<StoreError>) -> Result<T, StoreError> {
    match done {
        Ok(done) => Ok(done),
        Err(error @ StoreError::Unavailable(_)) if !error.is_contention() => Err(error),
        Err(error) => {
            tracing::debug!(error = &*crate::chain(&error), "a step of a round failed");
            failed.get_or_insert(error);
            Ok(T::default())
        }
    }
}

/// Varies a pause by up to a tenth in either direction, so that several controllers do not run their rounds in step.
fn jittered(base: Duration) -> Duration {
    let mut random = [0u8; 1];
    // If there is no randomness, only the jitter is lost.
    let _ = getrandom::fill(&mut random);
    base.mul_f64(0.9 + 0.2 * f64::from(u8::from_ne_bytes(random)) / 255.0)
}
