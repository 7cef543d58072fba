//! Follows an operation to its end and reconnects as needed.

mod standstill;

use std::collections::BTreeMap;
use std::time::Duration;

use marco_proto::v1::execution::{State, WaitReason};
use marco_proto::v1::{Execution, Operation, WatchOperationRequest, WatchOperationResponse, operation};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use crate::connect::Connection;
use crate::failure::{Failure, is_cut};
use crate::output::Out;
use crate::progress::View;

pub(crate) use standstill::summary;

/// Time for which the controller may be unreachable: enough for a restart of the controller or its machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// First and longest pause between two attempts to reconnect.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// Time to wait for the stream's end after the final state. A controller that does not end it is not waited for.
const GRACE: Duration = Duration::from_secs(5);
/// Value of `paused_by` for pauses by the controller itself.
const CONTROLLER: &str = "controller";

/// Current knowledge about an operation.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Last state received from the controller.
    pub(crate) operation: Operation,
    /// Executions by node.
    pub(crate) executions: BTreeMap<String, Execution>,
}

impl Known {
    /// Merges a message.
    pub(crate) fn take(&mut self, message: &WatchOperationResponse) {
        if let Some(operation) = &message.operation {
            self.operation = operation.clone();
        }
        for execution in &message.executions {
            self.executions.insert(execution.node.clone(), execution.clone());
        }
    }

    /// Returns true if the operation is in a final state.
    pub(crate) fn has_ended(&self) -> bool {
        use operation::State;
        matches!(self.operation.state(), State::Succeeded | State::Failed | State::Cancelled)
    }

    /// Returns true if the rollout paused the operation, and no node is at work except overdue ones. A pause by an
    /// operator does not count: the operator intends to resume.
    fn has_paused_itself(&self) -> bool {
        self.operation.state() == operation::State::Paused
            && self.operation.paused_by == CONTROLLER
            && self.executions.values().all(|execution| execution.overdue || !is_active(execution.state()))
    }

    /// Returns the reason to stop waiting, if there is one.
    fn stop(&self) -> Option<End> {
        if self.has_paused_itself() {
            return Some(End::Paused);
        }
        self.is_stuck().then_some(End::Stuck)
    }

    /// Returns true if a node is overdue and no other node works or will work. Only manual action can help then.
    fn is_stuck(&self) -> bool {
        let overdue = |execution: &Execution| execution.overdue && is_active(execution.state());
        self.executions.values().any(overdue)
            && self.executions.values().all(|execution| overdue(execution) || !will_move(execution))
    }
}

fn is_active(state: State) -> bool {
    matches!(state, State::Assigned | State::Running | State::Rebooting | State::Verifying)
}

/// Returns true if an execution proceeds without manual action. Waiting for an offline node, an approval or the end of
/// a pause does not count.
fn will_move(execution: &Execution) -> bool {
    match execution.state() {
        State::Pending => matches!(
            execution.wait_reason(),
            WaitReason::Unspecified
                | WaitReason::NotDue
                | WaitReason::NoSlot
                | WaitReason::NodeBusy
                | WaitReason::WindowClosed
                | WaitReason::Due
        ),
        state => is_active(state),
    }
}

/// Conditions to stop following.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Until {
    /// Stop at this instant, even if the operation has not ended.
    pub(crate) deadline: Option<Instant>,
    /// Also stop if only an operator can make it proceed: all remaining nodes are overdue, or the rollout paused it.
    pub(crate) stuck: bool,
}

/// Reason for which following stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The operation has ended.
    Ended,
    /// Only overdue nodes are left.
    Stuck,
    /// Its rollout paused it.
    Paused,
    /// The deadline passed.
    TimedOut,
    /// The reader of stdout closed it.
    Unread,
}

/// Follows an operation and shows it in `view`. Reconnects for up to [`PATIENCE`].
pub(crate) async fn follow(
    connection: &Connection,
    name: &str,
    until: Until,
    view: &mut View,
    out: &mut Out,
) -> Result<(Known, End), Failure> {
    let mut known = Known::default();
    let mut lost: Option<Instant> = None;
    let mut pause = PAUSES.0;
    let mut told = None;
    loop {
        let one = follow_one(connection, name, until, view, out, &mut known, &mut lost, &mut told);
        let outcome = match until.deadline {
            // Dropping the stream is safe: it only reads, and everything received is in `known`.
            Some(deadline) => match timeout_at(deadline, one).await {
                Ok(outcome) => outcome?,
                Err(_) => return Ok((known, End::TimedOut)),
            },
            None => one.await?,
        };
        let status = match outcome {
            Outcome::End(end) => return Ok((known, end)),
            Outcome::Cut(status) => status,
        };
        // Each new loss starts with the shortest pause again.
        let since = *lost.get_or_insert_with(|| {
            pause = PAUSES.0;
            Instant::now()
        });
        view.lost(&status);
        if since.elapsed() > PATIENCE {
            return Err(Failure::Unreachable {
                message: format!(
                    "the controller has been gone for {} s while watching {name}: {}",
                    PATIENCE.as_secs(),
                    status.message()
                ),
                hint: format!("the operation may go on; later, `marcoctl operations watch {name}` shows it again"),
            });
        }
        let woken = Instant::now() + pause;
        // A pause must not outlast the deadline.
        if let Some(deadline) = until.deadline.filter(|deadline| *deadline < woken) {
            tokio::time::sleep_until(deadline).await;
            return Ok((known, End::TimedOut));
        }
        tokio::time::sleep_until(woken).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

enum Outcome {
    End(End),
    Cut(Status),
}

/// Follows one stream until it ends or breaks. `told` is the last text about the reasons for waiting.
#[allow(clippy::too_many_arguments, reason = "what outlives a stream, and what shows it")]
async fn follow_one(
    connection: &Connection,
    name: &str,
    until: Until,
    view: &mut View,
    out: &mut Out,
    known: &mut Known,
    lost: &mut Option<Instant>,
    told: &mut Option<String>,
) -> Result<Outcome, Failure> {
    let request = WatchOperationRequest { name: name.to_owned() };
    let mut stream = match connection.operations().watch_operation(request).await {
        Ok(response) => response.into_inner(),
        Err(status) if may_come_back(&status) => return Ok(Outcome::Cut(status)),
        Err(status) => return Err(status.into()),
    };
    loop {
        let next = if known.has_ended() {
            match tokio::time::timeout(GRACE, stream.message()).await {
                Ok(next) => next,
                Err(_) => return Ok(Outcome::End(End::Ended)),
            }
        } else {
            stream.message().await
        };
        match next {
            Ok(Some(message)) => {
                // A message ends the outage, a mere connection does not: a controller that only accepts and closes is
                // still gone.
                *lost = None;
                known.take(&message);
                view.update(&message, known, out)?;
                // `--wait` goes on without a reader: its exit code still matters.
                if out.is_closed() && view.is_for_stdout() && !until.stuck {
                    return Ok(Outcome::End(End::Unread));
                }
                if until.stuck
                    && !known.has_ended()
                    && let Some(end) = known.stop()
                {
                    return Ok(Outcome::End(end));
                }
                if until.stuck && !known.has_ended() && standstill::stands_still(known) {
                    let text = summary(known, connection).await;
                    // Only a changed text is printed, or a long wait would fill the log.
                    if told.as_ref() != Some(&text) {
                        view.waits(&text, out)?;
                        *told = Some(text);
                    }
                }
            }
            // After the final state, a broken stream loses nothing.
            Ok(None) | Err(_) if known.has_ended() => return Ok(Outcome::End(End::Ended)),
            Ok(None) => return Ok(Outcome::Cut(Status::unavailable("the controller ended the stream early"))),
            Err(status) if may_come_back(&status) => return Ok(Outcome::Cut(status)),
            Err(status) => return Err(status.into()),
        }
    }
}

/// Returns true if the same call may succeed soon. A controller that stops ends streams with ABORTED, and one that cuts
/// slow readers uses RESOURCE_EXHAUSTED.
fn may_come_back(status: &Status) -> bool {
    is_cut(status) || matches!(status.code(), Code::Aborted | Code::ResourceExhausted)
}

#[cfg(test)]
mod tests {
    use marco_proto::v1::Execution;
    use marco_proto::v1::execution::{State, WaitReason};

    use super::{End, Known};

    fn known(executions: &[(State, bool, WaitReason)]) -> Known {
        let mut known = Known::default();
        for (number, (state, overdue, wait_reason)) in executions.iter().enumerate() {
            let node = format!("nodes/pi-{number}");
            let (state, wait_reason) = ((*state).into(), (*wait_reason).into());
            let execution =
                Execution { node: node.clone(), state, overdue: *overdue, wait_reason, ..Default::default() };
            known.executions.insert(node, execution);
        }
        known
    }

    #[test]
    fn an_overdue_node_does_not_end_the_wait_while_another_works() {
        let none = WaitReason::Unspecified;
        assert!(!known(&[(State::Rebooting, true, none), (State::Running, false, none)]).is_stuck());
        assert!(!known(&[(State::Rebooting, true, none), (State::Pending, false, WaitReason::NoSlot)]).is_stuck());
        assert!(known(&[(State::Rebooting, true, none), (State::Succeeded, false, none)]).is_stuck());
        assert!(known(&[(State::Rebooting, true, none), (State::Pending, false, WaitReason::NodeOffline)]).is_stuck());
    }

    #[test]
    fn operation_that_paused_by_itself_is_waited_for_until_its_nodes_are_done() {
        let none = WaitReason::Unspecified;
        let paused = |by: &str, executions: &[(State, bool, WaitReason)]| {
            let mut known = known(executions);
            known.operation.state = marco_proto::v1::operation::State::Paused.into();
            known.operation.paused_by = by.to_owned();
            known.stop()
        };
        let waits = (State::Pending, false, WaitReason::Paused);
        assert_eq!(paused("controller", &[(State::Failed, false, none), waits]), Some(End::Paused));
        // The dispatcher has not yet recorded the pause as the reason for waiting.
        let due = (State::Pending, false, WaitReason::NoSlot);
        assert_eq!(paused("controller", &[(State::Failed, false, none), due]), Some(End::Paused));
        assert_eq!(paused("controller", &[(State::Failed, false, none), (State::Running, false, none), waits]), None);
        assert_eq!(paused("controller", &[(State::Rebooting, true, none), waits]), Some(End::Paused));
        assert_eq!(paused("users/kim", &[(State::Failed, false, none), waits]), None);
    }

    #[test]
    fn without_an_overdue_node_nothing_is_stuck() {
        let none = WaitReason::Unspecified;
        assert!(!known(&[(State::Pending, false, WaitReason::NodeOffline), (State::Failed, false, none)]).is_stuck());
        // A final state counts also if the execution was overdue before.
        assert!(!known(&[(State::Failed, true, none)]).is_stuck());
    }
}
