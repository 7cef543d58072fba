//! Messages that need no change of the journal: answers, the node's status, and the last words before a power-off.

use marco_proto::v1::{ConnectResponse, Leaving, NodeStatus, NotHeld, Report, connect_request};
use tokio::sync::mpsc;
use tonic::Streaming;

use super::{CLOSE_TIMEOUT, Open, Said, SessionError, wire};
use crate::journal::{Entry, JournalError, Progress};

impl Open<'_> {
    /// Sends the node's system and its ailments, always all of them.
    pub(super) async fn tell_facts(&mut self) -> Result<(), SessionError> {
        let facts = wire::Facts {
            node: &self.session.node,
            refusal: self.refusal.borrow_and_update().clone(),
            conditions: self.health.borrow_and_update().clone(),
            journal_lost: self.session.journal.is_lost(),
        };
        let status = NodeStatus { system: Some(facts.system()), conditions: facts.conditions() };
        self.send(connect_request::Message::Status(status)).await
    }

    /// Sends `Leaving` if the agent ends because its machine powers off. Only with these last words the controller
    /// believes that the machine is off.
    pub(super) async fn leave(&mut self) -> Result<(), SessionError> {
        let Some(execution) = self.session.journal.powering_off() else { return Ok(()) };
        // The states that are not reported yet go first: last words are about one that the controller knows.
        self.report(&self.session.journal.entries()).await?;
        // A broken stream looks like silence, too; these words tell an orderly end from it.
        self.send(connect_request::Message::Leaving(Leaving { execution })).await
    }

    /// Reports an execution, even if its state was acknowledged.
    pub(super) async fn answer(&mut self, execution: &str) -> Result<(), SessionError> {
        let entries = self.session.journal.entries();
        let Some(entry) = entries.get(execution) else {
            // The journal may have been lost with its card.
            let not_held = NotHeld { execution: execution.to_owned(), busy_with: None };
            return self.send(connect_request::Message::NotHeld(not_held)).await;
        };
        let report = self.whole(entry).await;
        self.send(connect_request::Message::Report(report)).await?;
        self.said.insert(execution.to_owned(), Said::of(entry));
        Ok(())
    }

    /// Reports progress of an unfinished job. Returns false if there is nothing new.
    pub(super) async fn tell(&mut self, progress: Progress) -> Result<bool, SessionError> {
        let entries = self.session.journal.entries();
        let Some(entry) = entries.get(&progress.execution).filter(|entry| !entry.state.is_final()) else {
            return Ok(false);
        };
        if progress == self.told {
            return Ok(false);
        }
        let report = wire::report(entry, &progress, &self.session.node.boot_id);
        self.send(connect_request::Message::Report(report)).await?;
        self.said.insert(entry.execution.clone(), Said::of(entry));
        self.told = progress;
        Ok(true)
    }

    /// Refuses an assignment because of another job, and reports that job.
    pub(super) async fn say_busy(&mut self, execution: String, other: &str) -> Result<(), SessionError> {
        let entries = self.session.journal.entries();
        // A controller assigns to a busy node only if its store has lost the other job.
        let busy_with = match entries.get(other) {
            Some(entry) => Some(self.whole(entry).await),
            None => None,
        };
        self.send(connect_request::Message::NotHeld(NotHeld { execution, busy_with })).await
    }

    /// Reports an assignment as FAILED because it cannot be journalled.
    pub(super) async fn say_not_journalled(
        &mut self,
        execution: &str,
        attempt: u32,
        error: &JournalError,
    ) -> Result<(), SessionError> {
        let report = wire::not_journalled(execution, attempt, &self.session.node.boot_id, error);
        self.send(connect_request::Message::Report(report)).await
    }

    pub(super) async fn whole(&self, entry: &Entry) -> Report {
        let progress = self.session.journal.progress().borrow().clone();
        let mut report = wire::report(entry, &progress, &self.session.node.boot_id);
        self.session.add_log(entry, &mut report).await;
        report
    }

    /// Ends our half of the stream and lets the controller end its own.
    pub(super) async fn close(&mut self, mut answers: Streaming<ConnectResponse>) {
        // Dropping the only sender is the orderly end of our half.
        let (closed, _) = mpsc::channel(1);
        self.outbox = closed;
        let rest = async { while let Ok(Some(_)) = answers.message().await {} };
        if tokio::time::timeout(CLOSE_TIMEOUT, rest).await.is_err() {
            tracing::debug!("controller did not end the session in time");
        }
    }
}
