//! Follows an operation to its end, over broken connections.

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

/// How long the controller may be gone: enough for it to be restarted, or its machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// First and longest pause between two attempts to come back.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// The controller ends the stream after the final state; one that does not is not waited for.
const GRACE: Duration = Duration::from_secs(5);
/// Who is named where the controller did something by itself.
const CONTROLLER: &str = "controller";

/// What is known of an operation.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// As the controller last said.
    pub(crate) operation: Operation,
    /// Its executions, by node.
    pub(crate) executions: BTreeMap<String, Execution>,
}

impl Known {
    /// Takes in what a message says.
    pub(crate) fn take(&mut self, message: &WatchOperationResponse) {
        if let Some(operation) = &message.operation {
            self.operation = operation.clone();
        }
        for execution in &message.executions {
            self.executions.insert(execution.node.clone(), execution.clone());
        }
    }

    /// Whether nothing will change any more.
    pub(crate) fn has_ended(&self) -> bool {
        use operation::State;
        matches!(self.operation.state(), State::Succeeded | State::Failed | State::Cancelled)
    }

    /// Whether the rollout paused it, and the nodes that were at work by then are done or overdue. One that an operator
    /// paused is waited for: who paused it means to let it go on.
    fn has_paused_itself(&self) -> bool {
        self.operation.state() == operation::State::Paused
            && self.operation.paused_by == CONTROLLER
            && self.executions.values().all(|execution| execution.overdue || !is_active(execution.state()))
    }

    /// Why it stopped being worth to wait, if it did.
    fn stop(&self) -> Option<End> {
        if self.has_paused_itself() {
            return Some(End::Paused);
        }
        self.is_stuck().then_some(End::Stuck)
    }

    /// Whether a node is overdue and no other is at work or about to be: who waits now waits for hands.
    fn is_stuck(&self) -> bool {
        let overdue = |execution: &Execution| execution.overdue && is_active(execution.state());
        self.executions.values().any(overdue)
            && self.executions.values().all(|execution| overdue(execution) || !will_move(execution))
    }
}

fn is_active(state: State) -> bool {
    matches!(state, State::Assigned | State::Running | State::Rebooting | State::Verifying)
}

/// Whether an execution goes on without anybody's help. One that waits for an offline node, an approval or a pause may,
/// or may not.
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

/// When to stop following.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Until {
    /// At this instant, ended or not.
    pub(crate) deadline: Option<Instant>,
    /// Also when only an operator can make it go on: a node is overdue and nothing else is at work, or it paused by itself.
    pub(crate) stuck: bool,
}

/// Why following stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The operation has ended.
    Ended,
    /// Only overdue nodes are left.
    Stuck,
    /// Its rollout paused it.
    Paused,
    /// The deadline has passed.
    TimedOut,
    /// Nobody reads what is shown.
    Unread,
}

/// Follows an operation and shows it in `view`.
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
            // Dropping the stream is safe: it only reads, and what it said is in `known`.
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

/// Follows one stream until it ends or breaks. `told` is what was last said of what it waits for.
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
                *lost = None;
                known.take(&message);
                view.update(&message, known, out)?;
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
                    if told.as_ref() != Some(&text) {
                        view.waits(&text, out)?;
                        *told = Some(text);
                    }
                }
            }
            // A stream that broke after the final state has said all.
            Ok(None) | Err(_) if known.has_ended() => return Ok(Outcome::End(End::Ended)),
            Ok(None) => return Ok(Outcome::Cut(Status::unavailable("the controller ended the stream early"))),
            Err(status) if may_come_back(&status) => return Ok(Outcome::Cut(status)),
            Err(status) => return Err(status.into()),
        }
    }
}

/// Whether the same call may succeed in a moment. ABORTED and RESOURCE_EXHAUSTED are how a controller that stops, or
/// that cuts slow readers, ends a stream.
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
        // The dispatcher has not told yet for what it waits now.
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
        // An end is an end, also when it came late.
        assert!(!known(&[(State::Failed, true, none)]).is_stuck());
    }
}
