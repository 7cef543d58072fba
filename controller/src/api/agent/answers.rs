//! Answers to reports: acknowledgements, verdicts and deliveries.

use marco_proto::names::FIRST_PROTOCOL;
use marco_proto::v1::connect_response;

use super::{Ended, Session};
use crate::api::{convert, outbox};
use crate::identity::peer_log::{cut, of_peer};
use crate::operation::{ExecutionError, ExecutionState};
use crate::sessions::{Command, End};
use crate::store::{Assignment, ReportOutcome, ReportRow};

impl Session {
    /// Answers a report by its outcome, which is stored.
    pub(super) async fn answer(&self, row: ReportRow, outcome: ReportOutcome) -> Result<(), Ended> {
        let execution = &row.execution;
        match &outcome {
            ReportOutcome::Acked => {
                let state = row.state.as_str();
                of_peer!(info, &self.node, %execution, state, sequence = row.sequence, "reported");
            }
            ReportOutcome::Conflict { why, .. } => {
                of_peer!(warn, &self.node, %execution, why = %cut(why), "a report is in conflict with what is stored");
            }
            ReportOutcome::Refused(reason) => {
                of_peer!(warn, &self.node, %execution, reason = %cut(reason), "a report was refused");
            }
            _ => {}
        }
        if outcome.acknowledges(self.acked.has(execution, row.attempt, row.sequence)) {
            self.acknowledge(&row).await?;
        }
        match outcome {
            ReportOutcome::Progress => {
                // A full queue means that the store is slow. The next report brings newer progress.
                outbox::offer(&self.progress, row.into());
                Ok(())
            }
            ReportOutcome::Stale(assignment) => {
                self.deliver(assignment);
                Ok(())
            }
            ReportOutcome::Rejected(error) => self.reject(&row, &error).await,
            ReportOutcome::NotHolder => Err(Ended::ByUs(End::Lost)),
            _ => Ok(()),
        }
    }

    /// Sends a delivery by way of the registry, which sends each once in a session: the dispatcher may send it too. If
    /// the session is cut, the next Hello shows that the node lacks it.
    pub(super) fn deliver(&self, assignment: Box<Assignment>) {
        self.context.sessions.send(&self.node, self.epoch, Command::Assign(assignment));
    }

    /// Acknowledges a report, and remembers that. One of VERIFYING is acknowledged only with proof, or because an operator
    /// decided so: it is also accepted, in protocol 1 by this very acknowledgement.
    pub(super) async fn acknowledge(&self, row: &ReportRow) -> Result<(), Ended> {
        self.acked.add(&row.execution, row.attempt, row.sequence);
        self.send(connect_response::Message::Ack(convert::ack(row))).await?;
        if row.state == ExecutionState::Verifying { self.judge(row, None).await } else { Ok(()) }
    }

    /// Refuses a new system. An agent of protocol 1 hears nothing, and gives the machine back when its patience ends.
    pub(super) async fn reject(&self, row: &ReportRow, error: &ExecutionError) -> Result<(), Ended> {
        let (execution, reason) = (&row.execution, error.message.as_str());
        of_peer!(warn, &self.node, %execution, reason = %cut(reason), "a new system was refused");
        self.judge(row, Some(error)).await
    }

    /// Sends a verdict to an agent that knows them.
    async fn judge(&self, row: &ReportRow, refusal: Option<&ExecutionError>) -> Result<(), Ended> {
        if self.protocol == FIRST_PROTOCOL {
            return Ok(());
        }
        self.send(connect_response::Message::Verdict(convert::verdict(row, refusal))).await
    }
}
