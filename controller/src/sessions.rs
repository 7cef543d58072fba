//! The live sessions of this controller: which node has an open stream, and how to reach it. A hint only: what a
//! session was told is in the store before it is told.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use marco_proto::names::{ExecutionId, NodeId};
use tokio::sync::{mpsc, watch};

use crate::store::Assignment;

/// Commands that may wait for one session. A node has one execution at a time, so a queue this long means that it does
/// not read: it is cut, not buffered.
const QUEUE: usize = 64;
/// A node is asked where its execution is at most this often.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// What a session is told.
#[derive(Debug, Clone)]
pub enum Command {
    /// Do this.
    Assign(Box<Assignment>),
    /// Stop this, if it can still be helped.
    Cancel(ExecutionId),
    /// A report up to this sequence is committed.
    Ack(ExecutionId, u64),
    /// Say where this is.
    Query(ExecutionId),
}

/// Why a session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The node opened another one.
    Superseded,
    /// It is another controller's, or was ended because this one gave no sign of life.
    Lost,
    /// The node was quarantined, deleted, or its certificate revoked.
    Barred,
    /// It does not read what it is sent.
    SlowReader,
    /// The controller stops.
    Shutdown,
    /// This controller does no work: another one may.
    Away,
}

/// The session's own end of the registry's entry.
#[derive(Debug)]
pub struct Handle {
    /// What the session is told, in order.
    pub commands: mpsc::Receiver<Command>,
    /// Why it ends, once it does.
    pub end: watch::Receiver<Option<End>>,
}

#[derive(Debug)]
struct Entry {
    epoch: i64,
    certificate: String,
    commands: mpsc::Sender<Command>,
    end: watch::Sender<Option<End>>,
    cancels_sent: HashSet<ExecutionId>,
    /// The delivery that was sent last: a node has one at a time.
    assigned: Option<(ExecutionId, u32)>,
    /// Its Hello is dealt with: work that is given to it now cannot cross with what it lists.
    ready: bool,
    /// It answers queries.
    answers: bool,
    /// When it was last asked.
    asked: Option<tokio::time::Instant>,
}

/// A session as the dispatcher and the sweep see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// The node.
    pub node: NodeId,
    /// Its session epoch, as in the store.
    pub epoch: i64,
    /// Serial number of the certificate that opened it.
    pub certificate: String,
    /// Its Hello is dealt with, and it may be given work.
    pub ready: bool,
}

/// The registry.
#[derive(Debug, Default)]
pub struct Sessions {
    entries: Mutex<HashMap<NodeId, Entry>>,
    stopping: Mutex<bool>,
    /// This controller does no work, so nobody is let in.
    away: Mutex<bool>,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session; an older one of the same node ends. `None` when a newer one is there already, or the
    /// controller stops.
    pub fn open(&self, node: &NodeId, epoch: i64, certificate: &str) -> Option<Handle> {
        let (commands, receiver) = mpsc::channel(QUEUE);
        let (end, end_receiver) = watch::channel(None);
        let mut entries = self.lock();
        if self.is_away() || *self.stopping.lock().unwrap_or_else(PoisonError::into_inner) {
            return None;
        }
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

    /// Its Hello is dealt with; `answers` tells whether it answers queries.
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

    /// Tells whatever session a node has to end; the session then removes itself.
    pub fn end(&self, node: &NodeId, why: End) {
        if let Some(entry) = self.lock().get(node) {
            entry.end.send_replace(Some(why));
        }
    }

    /// Tells every session to end, and lets none in any more.
    pub fn end_all(&self, why: End) {
        *self.stopping.lock().unwrap_or_else(PoisonError::into_inner) = true;
        for entry in self.lock().values() {
            entry.end.send_replace(Some(why));
        }
    }

    /// Whether nodes are sent to other controllers.
    pub fn is_away(&self) -> bool {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every session to end and lets none in, or lets them in again.
    pub fn send_away(&self, away: bool) {
        // Held while it changes, so that none is entered in between.
        let entries = self.lock();
        *self.away.lock().unwrap_or_else(PoisonError::into_inner) = away;
        if away {
            for entry in entries.values() {
                entry.end.send_replace(Some(End::Away));
            }
        }
    }

    /// Queues a command for the session with this epoch; one that was sent in it before is not sent again. False when there is none; one whose queue is full is cut, and
    /// its next Hello brings the truth.
    pub fn send(&self, node: &NodeId, epoch: i64, command: Command) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(node).filter(|entry| entry.epoch == epoch) else { return false };
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
            if !entry.answers || entry.asked.is_some_and(|asked| now.duration_since(asked) < ASK_AGAIN) {
                return true;
            }
            entry.asked = Some(now);
        }
        match entry.commands.try_send(command) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                entry.end.send_replace(Some(End::SlowReader));
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// Every live session.
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

    /// Waits until no session is left, at most for `limit`; true when none is.
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
        for sequence in 0..u64::try_from(QUEUE).unwrap() {
            assert!(sessions.send(&node(), 1, Command::Ack(execution(), sequence)));
        }
        assert!(!sessions.send(&node(), 1, Command::Ack(execution(), 99)));
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
        let delivery = |attempt| {
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
        };
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
