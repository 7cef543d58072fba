//! What an agent says without a change of its journal: answers, and its last words.

use marco_proto::v1::{ConnectResponse, Leaving, NodeStatus, NotHeld, Report, connect_request};
use tokio::sync::mpsc;
use tonic::Streaming;

use super::{CLOSE_TIMEOUT, Open, Said, SessionError, wire};
use crate::journal::{Entry, JournalError, Progress};

impl Open<'_> {
    /// Says what the node runs and what ails it, whole.
    pub(super) async fn tell_facts(&mut self) -> Result<(), SessionError> {
        let facts = wire::Facts {
            node: &self.session.node,
            refusal: self.refusal.borrow_and_update().clone(),
            conditions: self.health.borrow_and_update().clone(),
        };
        let status = NodeStatus { system: Some(facts.system()), conditions: facts.conditions() };
        self.send(connect_request::Message::Status(status)).await
    }

    /// The last words of an agent that ends because its machine powers off: the controller believes that it is off only
    /// when it has heard them.
    pub(super) async fn leave(&mut self) -> Result<(), SessionError> {
        let Some(execution) = self.session.journal.powering_off() else { return Ok(()) };
        self.report(&self.session.journal.entries()).await?;
        self.send(connect_request::Message::Leaving(Leaving { execution })).await
    }

    /// Says where an execution is, whether that was acknowledged or not.
    pub(super) async fn answer(&mut self, execution: &str) -> Result<(), SessionError> {
        let entries = self.session.journal.entries();
        let Some(entry) = entries.get(execution) else {
            let not_held = NotHeld { execution: execution.to_owned(), busy_with: None };
            return self.send(connect_request::Message::NotHeld(not_held)).await;
        };
        let report = self.whole(entry).await;
        self.send(connect_request::Message::Report(report)).await?;
        self.said.insert(execution.to_owned(), Said::of(entry));
        Ok(())
    }

    /// Tells progress, if there is any to tell.
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

    /// Says that an assignment is not taken because of another job.
    pub(super) async fn say_busy(&mut self, execution: String, other: &str) -> Result<(), SessionError> {
        let entries = self.session.journal.entries();
        let busy_with = match entries.get(other) {
            Some(entry) => Some(self.whole(entry).await),
            None => None,
        };
        self.send(connect_request::Message::NotHeld(NotHeld { execution, busy_with })).await
    }

    /// Says that an assignment has ended because it cannot be journalled.
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
        let (closed, _) = mpsc::channel(1);
        self.outbox = closed;
        let rest = async { while let Ok(Some(_)) = answers.message().await {} };
        if tokio::time::timeout(CLOSE_TIMEOUT, rest).await.is_err() {
            tracing::debug!("controller did not end the session in time");
        }
    }
}
