//! Reports that the store could not take yet. They are kept in order, not acknowledged, and stored once the store
//! answers. The stream stays open meanwhile.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Backlog, ReportRow, System};

/// Reports that may wait in one session. A node has few at a time. With this many, no more are read from it.
const MOST: usize = 32;
/// Pause between two tries.
const RETRY: Duration = Duration::from_secs(1);

/// Waiting reports and facts of one session.
#[derive(Debug)]
pub(super) struct Unstored {
    reports: VecDeque<ReportRow>,
    system: Option<System>,
    /// Time of the next try.
    due: Instant,
    /// Mark for the store that reports wait, set while it does not answer. The store then judges no node by its
    /// silence.
    away: Option<Backlog>,
}

impl Unstored {
    pub(super) fn new() -> Self {
        Self { reports: VecDeque::new(), system: None, due: Instant::now(), away: None }
    }

    /// Adds a report. Newer progress of the same state replaces the older one, so a long outage needs no more room.
    pub(super) fn add(&mut self, report: ReportRow) {
        let same = |other: &&mut ReportRow| {
            (&other.execution, other.attempt, other.sequence, other.state, other.cancel_refused)
                == (&report.execution, report.attempt, report.sequence, report.state, report.cancel_refused)
        };
        match self.reports.iter_mut().find(same) {
            // Not every report carries the log, and a newer one without it must not lose it.
            Some(other) if report.log.lines.is_empty() => {
                let log = std::mem::take(&mut other.log);
                *other = ReportRow { log, ..report };
            }
            Some(other) => *other = report,
            None => self.reports.push_back(report),
        }
    }

    /// Sets the facts of the system. They replace older ones that wait.
    pub(super) fn set_system(&mut self, system: System) {
        self.system = Some(system);
    }

    pub(super) fn report(&self) -> Option<&ReportRow> {
        self.reports.front()
    }

    pub(super) fn system(&self) -> Option<&System> {
        self.system.as_ref()
    }

    /// Removes the oldest report, which is stored.
    pub(super) fn report_stored(&mut self) {
        self.reports.pop_front();
        self.answered();
    }

    /// Removes the facts, which are stored.
    pub(super) fn system_stored(&mut self) {
        self.system = None;
        self.answered();
    }

    fn answered(&mut self) {
        if self.reports.is_empty() && self.away.take().is_some() {
            tracing::info!("the store answers again; what the node said meanwhile is stored");
        }
    }

    /// Postpones the next try. `backlog` marks for the store that reports wait.
    pub(super) fn later(&mut self, backlog: impl FnOnce() -> Backlog) {
        // Logged once for each outage, not with each try.
        self.away.get_or_insert_with(|| {
            tracing::warn!("the store does not answer; what the node says waits");
            backlog()
        });
        self.due = Instant::now() + RETRY;
    }

    /// Time of the next try. `None`: nothing waits.
    pub(super) fn due(&self) -> Option<Instant> {
        (!self.reports.is_empty() || self.system.is_some()).then_some(self.due)
    }

    /// True if another report may be read from the node.
    pub(super) fn has_room(&self) -> bool {
        self.reports.len() < MOST
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, OnceLock};

    use marco_proto::names::{ExecutionId, NodeId};
    use marco_proto::v1;
    use sea_orm::{ConnectOptions, ConnectionTrait as _, Database};
    use tokio::sync::mpsc;

    use super::{MOST, Unstored};
    use crate::api::agent::{Acked, Session};
    use crate::clock::SystemClock;
    use crate::config::Config;
    use crate::operation::ExecutionState;
    use crate::store::{Backlog, ReportRow, SentLog};

    fn report(sequence: u64, done: u64) -> ReportRow {
        ReportRow {
            execution: ExecutionId::parse("operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01").unwrap(),
            attempt: 1,
            sequence,
            state: ExecutionState::Running,
            phase: String::new(),
            bytes_done: done,
            bytes_total: 9,
            error: None,
            boot_id: "a".to_owned(),
            accept_boot_id: String::new(),
            release: None,
            cancel_refused: false,
            log: SentLog::default(),
            journal_lost: false,
        }
    }

    #[test]
    fn states_wait_in_order_and_progress_takes_the_place_of_older_progress() {
        let mut unstored = Unstored::new();
        assert!(unstored.due().is_none());
        unstored.add(report(1, 1));
        unstored.add(report(2, 1));
        unstored.add(report(1, 5));
        assert_eq!(unstored.report().map(|report| (report.sequence, report.bytes_done)), Some((1, 5)));
        unstored.later(Backlog::default);
        assert!(unstored.due().is_some_and(|due| due > tokio::time::Instant::now()));
        unstored.report_stored();
        assert_eq!(unstored.report().map(|report| report.sequence), Some(2));
        unstored.report_stored();
        assert!(unstored.due().is_none());
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut unstored = Unstored::new();
        for sequence in 0..u64::try_from(MOST).unwrap() {
            assert!(unstored.has_room());
            unstored.add(report(sequence, 0));
        }
        assert!(!unstored.has_room());
    }

    #[tokio::test]
    async fn store_knows_that_a_session_has_reports_that_wait() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::in_test(dir.path());
        let database = config.database_url.clone();
        let controller = crate::Controller::bind(config, Arc::new(SystemClock)).await.unwrap();
        let store = controller.context.store.clone();
        let (out, _heard) = mpsc::channel(1);
        let session = Session {
            context: controller.context.clone(),
            progress: mpsc::channel(1).0,
            node: NodeId::parse("pi-01").unwrap(),
            epoch: 1,
            protocol: marco_proto::names::PROTOCOL_VERSION,
            out,
            blank: None,
            acked: Acked::default(),
            leaving: OnceLock::new(),
            held: false,
        };
        // Another process, such as a backup, holds the database for longer than a write waits.
        let mut options = ConnectOptions::new(database);
        options.max_connections(1);
        let other = Database::connect(options).await.unwrap();
        other.execute_unprepared("BEGIN IMMEDIATE").await.unwrap();

        let mut unstored = Unstored::new();
        assert!(!store.has_backlog());
        let said = v1::Report {
            execution: report(1, 0).execution.name(),
            attempt: 1,
            sequence: 1,
            state: v1::execution::State::Running.into(),
            boot_id: "a".to_owned(),
            ..v1::Report::default()
        };
        assert!(session.report(&mut unstored, said).await.is_ok());
        assert!(store.has_backlog());

        other.execute_unprepared("ROLLBACK").await.unwrap();
        tokio::time::sleep_until(unstored.due().unwrap()).await;
        // An error, because no such node has a session. But the store answered, so nothing waits any longer.
        assert!(session.store_what_waits(&mut unstored).await.is_err());
        assert!(unstored.report().is_none() && !store.has_backlog());
    }
}
