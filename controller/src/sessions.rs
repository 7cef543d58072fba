//! Registry of this controller's live sessions: nodes with an open stream, and a queue of commands to each. Only a
//! hint: all that a session is told is stored before.

mod acked;

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use marco_proto::names::{ExecutionId, NodeId};
use tokio::sync::{mpsc, watch};

use crate::store::Assignment;
pub use acked::Acked;

/// Commands that may wait for one session. A node has one execution at a time, so a full queue means that it does not
/// read. Its session then ends.
const QUEUE: usize = 64;
/// Least time between two queries to a node.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// Message from the controller to a session.
#[derive(Debug, Clone)]
pub enum Command {
    /// Carry out this delivery.
    Assign(Box<Assignment>),
    /// Stop this execution, if it is not too late.
    Cancel(ExecutionId),
    /// Report the state of this execution.
    Query(ExecutionId),
}

/// Reason that a session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The node opened another session on this controller.
    Superseded,
    /// The session in the store is another one, on any controller, or another controller ended it because this one gave
    /// no sign of life.
    Lost,
    /// The node was quarantined, deleted, or its certificate revoked.
    Barred,
    /// The node does not read its messages.
    SlowReader,
    /// The controller stops.
    Shutdown,
    /// This controller cannot work, and another one may serve the node.
    Away,
}

/// The session's side of its entry in the registry.
#[derive(Debug)]
pub struct Handle {
    /// Commands, in the order in which to send them.
    pub commands: mpsc::Receiver<Command>,
    /// Reason that the session has to end. `None`: it goes on.
    pub end: watch::Receiver<Option<End>>,
}

#[derive(Debug)]
struct Entry {
    epoch: i64,
    certificate: String,
    commands: mpsc::Sender<Command>,
    end: watch::Sender<Option<End>>,
    cancels_sent: HashSet<ExecutionId>,
    /// Execution and attempt of the last delivery that was sent. A node has one at a time.
    assigned: Option<(ExecutionId, u32)>,
    /// Its Hello is reconciled, so new work cannot cross with the executions that Hello lists.
    ready: bool,
    /// Its agent answers queries.
    answers: bool,
    /// Time of the last query. `None`: not queried yet.
    asked: Option<tokio::time::Instant>,
}

/// Snapshot of a session for the dispatcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// The node.
    pub node: NodeId,
    /// Session epoch, as in the store.
    pub epoch: i64,
    /// Serial number of the certificate that opened it.
    pub certificate: String,
    /// True if its Hello is reconciled, so that it may be given work.
    pub ready: bool,
}

/// The registry. At most one session for each node.
#[derive(Debug, Default)]
pub struct Sessions {
    entries: Mutex<HashMap<NodeId, Entry>>,
    stopping: Mutex<bool>,
    /// This controller cannot work, so no session may begin.
    away: Mutex<bool>,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session and ends an older one of the same node. `None`: a newer one is entered already, the controller
    /// stops, or nodes are sent away.
    pub fn open(&self, node: &NodeId, epoch: i64, certificate: &str) -> Option<Handle> {
        let (commands, receiver) = mpsc::channel(QUEUE);
        let (end, end_receiver) = watch::channel(None);
        // Both flags are read under this lock. Otherwise a session could be entered after `end_all` or `send_away` has
        // ended the others, and stay.
        let mut entries = self.lock();
        if self.is_away() || *self.stopping.lock().unwrap_or_else(PoisonError::into_inner) {
            return None;
        }
        // The epochs come from the store, but their sessions may arrive here in another order.
        if entries.get(node).is_some_and(|present| present.epoch > epoch) {
            return None;
        }
        let entry = Entry {
            epoch,
            certificate: certificate.to_owned(),
            commands,
            end,
            cancels_sent: HashSet::new(),
            assigned: None,
            ready: false,
            answers: false,
            asked: None,
        };
        if let Some(older) = entries.insert(node.clone(), entry) {
            older.end.send_replace(Some(End::Superseded));
        }
        Some(Handle { commands: receiver, end: end_receiver })
    }

    /// Removes a session, unless a newer one has taken its place.
    pub fn close(&self, node: &NodeId, epoch: i64) {
        let mut entries = self.lock();
        if entries.get(node).is_some_and(|entry| entry.epoch == epoch) {
            entries.remove(node);
        }
    }

    /// Marks the session's Hello as reconciled. `answers`: its agent answers queries.
    pub fn set_ready(&self, node: &NodeId, epoch: i64, answers: bool) {
        if let Some(entry) = self.lock().get_mut(node).filter(|entry| entry.epoch == epoch) {
            entry.ready = true;
            entry.answers = answers;
        }
    }

    /// Tells a session to end, unless a newer one has taken its place.
    pub fn end_one(&self, node: &NodeId, epoch: i64, why: End) {
        if let Some(entry) = self.lock().get(node).filter(|entry| entry.epoch == epoch) {
            entry.end.send_replace(Some(why));
        }
    }

    /// Tells the node's present session to end. The session removes itself.
    pub fn end(&self, node: &NodeId, why: End) {
        if let Some(entry) = self.lock().get(node) {
            entry.end.send_replace(Some(why));
        }
    }

    /// Tells every session to end, and refuses new ones from now on.
    pub fn end_all(&self, why: End) {
        *self.stopping.lock().unwrap_or_else(PoisonError::into_inner) = true;
        for entry in self.lock().values() {
            entry.end.send_replace(Some(why));
        }
    }

    /// True if nodes are sent to other controllers.
    pub fn is_away(&self) -> bool {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True: tells every session to end, and refuses new ones. False: accepts new ones again.
    pub fn send_away(&self, away: bool) {
        // Held during the change, so that no session is entered between the two steps.
        let entries = self.lock();
        *self.away.lock().unwrap_or_else(PoisonError::into_inner) = away;
        if away {
            for entry in entries.values() {
                entry.end.send_replace(Some(End::Away));
            }
        }
    }

    /// Queues a command for the session with this epoch. Cancels and deliveries are sent once in a session. Returns
    /// false if there is no such session, or its queue is full. A session with a full queue ends, and the node's next
    /// Hello tells what it received.
    pub fn send(&self, node: &NodeId, epoch: i64, command: Command) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(node).filter(|entry| entry.epoch == epoch) else { return false };
        // The dispatcher keeps no memory of what it sent and repeats it in each round, so repetitions are dropped here.
        if let Command::Cancel(execution) = &command
            && !entry.cancels_sent.insert(execution.clone())
        {
            return true;
        }
        if let Command::Assign(assignment) = &command {
            let delivery = (assignment.execution.clone(), assignment.attempt);
            if entry.assigned.replace(delivery.clone()) == Some(delivery) {
                return true;
            }
        }
        if let Command::Query(_) = &command {
            let now = tokio::time::Instant::now();
            // An older agent does not know this message, and would end its session.
            if !entry.answers || entry.asked.is_some_and(|asked| now.duration_since(asked) < ASK_AGAIN) {
                return true;
            }
            entry.asked = Some(now);
        }
        match entry.commands.try_send(command) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                // Waiting would let one node stop the dispatcher, and an unbounded queue would grow without limit.
                entry.end.send_replace(Some(End::SlowReader));
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// All sessions that have not been told to end.
    pub fn live(&self) -> Vec<Live> {
        self.lock()
            .iter()
            .filter(|(_, entry)| entry.end.borrow().is_none())
            .map(|(node, entry)| Live {
                node: node.clone(),
                epoch: entry.epoch,
                certificate: entry.certificate.clone(),
                ready: entry.ready,
            })
            .collect()
    }

    /// Waits until no session is left, at most for `limit`. Returns true if none is.
    pub async fn drained(&self, limit: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + limit;
        while !self.lock().is_empty() {
            if tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{Command, End, QUEUE, Sessions};
    use crate::operation::{Action, ExecutionState, Notice};
    use crate::store::Assignment;
    use marco_proto::names::{ExecutionId, NodeId};

    fn node() -> NodeId {
        NodeId::parse("pi-01").unwrap()
    }

    fn execution() -> ExecutionId {
        ExecutionId::parse("operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01").unwrap()
    }

    fn delivery(attempt: u32) -> Command {
        let notice = Notice { delay: std::time::Duration::ZERO, message: String::new() };
        Command::Assign(Box::new(Assignment {
            execution: execution(),
            attempt,
            action: Action::Reboot(notice),
            family: String::new(),
            known_state: ExecutionState::Assigned,
            cancel_requested: false,
            labels: std::collections::BTreeMap::new(),
        }))
    }

    #[test]
    fn a_second_session_of_a_node_ends_the_first() {
        let sessions = Sessions::default();
        let first = sessions.open(&node(), 1, "a").unwrap();
        let second = sessions.open(&node(), 2, "a").unwrap();
        assert_eq!(*first.end.borrow(), Some(End::Superseded));
        assert_eq!(*second.end.borrow(), None);
        assert!(sessions.open(&node(), 1, "a").is_none(), "a late older session took the place of a newer one");
        sessions.close(&node(), 1);
        assert_eq!(sessions.live().len(), 1, "the older session removed the newer one");
    }

    #[test]
    fn what_is_found_of_an_older_session_does_not_end_the_present_one() {
        let sessions = Sessions::default();
        let handle = sessions.open(&node(), 2, "a").unwrap();
        sessions.end_one(&node(), 1, End::Lost);
        assert_eq!(*handle.end.borrow(), None, "the picture is older than the session");
        sessions.end_one(&node(), 2, End::Lost);
        assert_eq!(*handle.end.borrow(), Some(End::Lost));
    }

    #[test]
    fn a_session_that_does_not_read_is_cut() {
        let sessions = Sessions::default();
        let handle = sessions.open(&node(), 1, "a").unwrap();
        // Each delivery has a number of its own, so none is dropped as a repetition.
        for attempt in 1..=u32::try_from(QUEUE).unwrap() {
            assert!(sessions.send(&node(), 1, delivery(attempt)));
        }
        assert!(!sessions.send(&node(), 1, delivery(u32::MAX)));
        assert_eq!(*handle.end.borrow(), Some(End::SlowReader));
        assert!(sessions.live().is_empty());
    }

    #[test]
    fn a_cancel_is_sent_once_in_a_session() {
        let sessions = Sessions::default();
        let mut handle = sessions.open(&node(), 1, "a").unwrap();
        assert!(sessions.send(&node(), 1, Command::Cancel(execution())));
        assert!(sessions.send(&node(), 1, Command::Cancel(execution())));
        assert!(handle.commands.try_recv().is_ok());
        assert!(handle.commands.try_recv().is_err());
    }

    #[test]
    fn a_delivery_is_sent_once_in_a_session() {
        let sessions = Sessions::default();
        let mut handle = sessions.open(&node(), 1, "a").unwrap();
        for attempt in [1, 1, 2, 2] {
            assert!(sessions.send(&node(), 1, delivery(attempt)));
        }
        let mut sent = 0;
        while handle.commands.try_recv().is_ok() {
            sent += 1;
        }
        assert_eq!(sent, 2);
    }

    #[test]
    fn nothing_is_sent_under_an_older_epoch() {
        let sessions = Sessions::default();
        let _handle = sessions.open(&node(), 2, "a").unwrap();
        assert!(!sessions.send(&node(), 1, Command::Cancel(execution())));
    }
}
