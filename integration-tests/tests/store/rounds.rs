//! Whole rounds of a dispatcher: a step that fails does not prevent the others, and a round that could not listen does
//! not count as silence of a node.

use std::sync::Arc;

use chrono::TimeDelta;
use integration_tests::postgres::Postgres;
use integration_tests::{seconds, wait_until};
use marco_controller::clock::{Clock as _, ManualClock};
use marco_controller::dispatcher::Dispatcher;
use marco_controller::operation::{ExecutionState, OperationState};
use marco_controller::rollout::{Limit, Rollout};
use marco_controller::sessions::{Command, Handle, Sessions};
use marco_controller::store::{NewOperation, Store, StoreError};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use crate::support::*;
use crate::trap::{Snap, Trap};

/// Seconds of listening after which a node's silence counts.
const LONG_ENOUGH: u32 = 80;

/// A controller without listeners, on a manual clock.
struct Controller {
    clock: Arc<ManualClock>,
    sessions: Arc<Sessions>,
    dispatcher: Dispatcher,
}

impl Controller {
    fn new(store: &Store) -> Self {
        let (clock, sessions) = (Arc::new(ManualClock::new(start())), Arc::new(Sessions::default()));
        let (id, address) = ("c1".to_owned(), "c1:1346".to_owned());
        let time = Arc::<ManualClock>::clone(&clock);
        let dispatcher = Dispatcher::new(store.clone(), Arc::clone(&sessions), time, id, address);
        Self { clock, sessions, dispatcher }
    }

    /// A node with a session whose stream this controller holds.
    async fn node(&self, f: &Fixture, id: &str) -> (NodeId, i64, Handle) {
        let (id, epoch) = f.online(id).await;
        let handle = self.sessions.open(&id, epoch, "").unwrap();
        // A session gets work only after its Hello was reconciled.
        self.sessions.set_ready(&id, epoch, true);
        (id, epoch, handle)
    }

    /// Runs so many rounds, a second apart.
    async fn listen(&self, rounds: u32) {
        for _ in 0..rounds {
            self.dispatcher.round(false).await.unwrap();
            self.clock.advance(TimeDelta::seconds(1));
        }
    }
}

/// An operation that is due at the next round.
async fn due(f: &Fixture, controller: &Controller, nodes: &[NodeId]) -> NewOperation {
    let now = controller.clock.now();
    let new = NewOperation { schedule_time: now + TimeDelta::seconds(1), ..new_operation(reboot(), nodes) };
    f.store.create_operation(&new, now).await.unwrap();
    controller.clock.advance(TimeDelta::seconds(1));
    new
}

async fn by_hand(f: &Fixture, statement: &str) {
    f.by_hand(&[statement]).await.remove(0).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_goes_on_where_another_transaction_holds_a_row() {
    let f = postgres().await;
    let controller = Controller::new(&f.store);
    let (first, ..) = controller.node(&f, "pi-1").await;
    let (second, _, mut handle) = controller.node(&f, "pi-2").await;
    controller.listen(LONG_ENOUGH).await;
    let held = due(&f, &controller, &[first]).await.id;
    let operation = f.create(reboot(), std::slice::from_ref(&second)).await;
    let hold = format!("SELECT 1 FROM operations WHERE id = '{held}' FOR UPDATE; SELECT pg_sleep(60)");
    let _holder = Postgres::start().unwrap().session(&f.url, &hold).unwrap();
    let url = f.url.clone();
    wait_until(seconds(10), "the row is held", async || {
        let (url, query) = (url.clone(), "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'");
        let found = tokio::task::spawn_blocking(move || Postgres::start()?.rows(&url, query)).await?;
        Ok((!found?.is_empty()).then_some(()))
    })
    .await
    .unwrap();
    // The round skips the locked row, which it needs to begin the first operation.
    controller.dispatcher.round(false).await.unwrap();
    let Ok(Command::Assign(assigned)) = handle.commands.try_recv() else { panic!("the other node has no work") };
    assert_eq!(assigned.execution, ExecutionId { operation, node: second });
    // That was no outage. Nodes were heard, so their silence counts.
    by_hand(&f, "UPDATE executions SET deadline = 1 WHERE node = 'pi-2'").await;
    assert_eq!(f.store.mark_overdue(controller.clock.now()).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_judged_by_the_silence_of_a_round_that_lost_the_database() {
    let f = postgres().await;
    let trap = Trap::lay(&f.url, "COMMIT", Snap::Cut).await;
    let controller = Controller::new(&Store::open(&trap.url(&f.url)).await.unwrap());
    let (id, ..) = controller.node(&f, "pi-1").await;
    controller.listen(LONG_ENOUGH).await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    let execution = ExecutionId { operation, node: id.clone() };
    controller.listen(1).await;
    assert_eq!(f.state(&execution).await, ExecutionState::Assigned);
    by_hand(&f, "UPDATE executions SET deadline = 1").await;
    due(&f, &controller, &[id]).await;
    // The COMMIT of this round gets no answer, so the round fails and counts as a break.
    trap.set(1);
    let error = controller.dispatcher.round(false).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    // An agent's longest pause between two attempts is 60 s; the store allows 75 s.
    controller.listen(70).await;
    assert!(!f.execution(&execution).await.overdue, "it had no time to come back");
    controller.listen(10).await;
    assert!(f.execution(&execution).await.overdue);
}

pub(crate) async fn an_overdue_node_is_asked_what_became_of_it(f: Fixture) {
    let controller = Controller::new(&f.store);
    let (id, epoch, mut handle) = controller.node(&f, "pi-1").await;
    controller.listen(LONG_ENOUGH).await;
    f.create(reboot(), std::slice::from_ref(&id)).await;
    controller.listen(1).await;
    let Ok(Command::Assign(assigned)) = handle.commands.try_recv() else { panic!("it has no work") };
    f.report(epoch, &report(&assigned, 1, ExecutionState::Running, "boot-1"), controller.clock.now()).await;
    controller.listen(1).await;
    assert!(handle.commands.try_recv().is_err(), "a node that is in time is asked nothing");
    // The store may have lost the node's later reports.
    by_hand(&f, "UPDATE executions SET deadline = 1").await;
    controller.listen(3).await;
    let Ok(Command::Query(asked)) = handle.commands.try_recv() else { panic!("it is not asked") };
    assert_eq!(asked, assigned.execution);
    assert!(handle.commands.try_recv().is_err(), "once is enough for a while");
}

pub(crate) async fn a_sweep_cancels_what_waits_for_a_deleted_node(f: Fixture) {
    let controller = Controller::new(&f.store);
    let (gone, _) = f.online("pi-1").await;
    f.store.delete_node(&gone, false, "pat", after(1)).await.unwrap();
    let operation = f.create(reboot(), std::slice::from_ref(&gone)).await;
    controller.dispatcher.round(true).await.unwrap();
    assert_eq!(f.state(&ExecutionId { operation, node: gone }).await, ExecutionState::Cancelled);
}

/// What a round of the dispatcher has to do, one operation of each kind.
struct Tasks {
    begins: OperationId,
    expires: ExecutionId,
    is_overdue: ExecutionId,
    orphan: ExecutionId,
    pauses: OperationId,
    finishes: OperationId,
    /// Keeps the streams of its nodes.
    _handles: Vec<Handle>,
}

impl Tasks {
    async fn new(f: &Fixture, controller: &Controller, side: &str) -> Self {
        let now = controller.clock.now();
        let at = |seconds: i64| now + TimeDelta::seconds(seconds);
        let (mut ids, mut handles) = (Vec::new(), Vec::new());
        for kind in ["begins", "expires", "overdue", "failed", "done", "gone"] {
            let (id, _, handle) = controller.node(f, &format!("pi-{side}-{kind}")).await;
            ids.push(id);
            handles.push(handle);
        }
        let away = f.enrolled(&[&format!("pi-{side}-away")]).await.remove(0);
        f.store.delete_node(&ids[5], true, "pat", now).await.unwrap();
        let create = async |new: NewOperation| {
            f.store.create_operation(&new, now).await.unwrap();
            new.id
        };
        let later = |nodes: &[NodeId]| NewOperation { schedule_time: at(10), ..new_operation(reboot(), nodes) };
        let rollout = Rollout { max_failures: Some(Limit::Number(0)), ..Rollout::default() };
        let execution =
            |operation: &OperationId, node: &NodeId| ExecutionId { operation: operation.clone(), node: node.clone() };
        Self {
            begins: create(later(&ids[..1])).await,
            expires: execution(&create(NewOperation { expire_time: at(5), ..later(&ids[1..2]) }).await, &ids[1]),
            is_overdue: execution(&create(new_operation(reboot(), &ids[2..3])).await, &ids[2]),
            orphan: execution(&create(later(&ids[5..])).await, &ids[5]),
            // The node that is away keeps it from being done.
            pauses: create(NewOperation { rollout: Some(rollout), ..new_operation(reboot(), &[ids[3].clone(), away]) })
                .await,
            finishes: create(later(&ids[4..5])).await,
            _handles: handles,
        }
    }

    fn operations(&self) -> [&OperationId; 6] {
        let (expires, overdue) = (&self.expires.operation, &self.is_overdue.operation);
        [&self.begins, expires, overdue, &self.orphan.operation, &self.pauses, &self.finishes]
    }

    /// For each of them, true if it was done.
    async fn done(&self, f: &Fixture) -> [bool; 6] {
        let finished = f.store.operation(&self.finishes).await.unwrap().unwrap().finish_time.is_some();
        [
            f.operation_state(&self.begins).await == OperationState::Running,
            f.state(&self.expires).await == ExecutionState::Expired,
            f.execution(&self.is_overdue).await.overdue,
            f.state(&self.orphan).await == ExecutionState::Cancelled,
            f.operation_state(&self.pauses).await == OperationState::Paused,
            finished,
        ]
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_step_of_a_round_waits_for_an_operation_that_is_held() {
    let f = postgres().await;
    let controller = Controller::new(&f.store);
    controller.listen(LONG_ENOUGH).await;
    let (held, free) = (Tasks::new(&f, &controller, "held").await, Tasks::new(&f, &controller, "free").await);
    // Assigns what is due.
    controller.listen(1).await;
    for (node, change) in [
        ("overdue", "deadline = 1"),
        ("failed", "state = 'FAILED', finish_time = 1, deadline = NULL"),
        ("done", "state = 'CANCELLED', finish_time = 1"),
    ] {
        by_hand(&f, &format!("UPDATE executions SET {change} WHERE node LIKE 'pi-%-{node}'")).await;
    }
    controller.clock.advance(TimeDelta::seconds(10));
    let ids = held.operations().map(|id| format!("'{id}'")).join(", ");
    let hold = format!("SELECT 1 FROM operations WHERE id IN ({ids}) FOR UPDATE; SELECT pg_sleep(60)");
    // A session that works: no timeout of an idle transaction ends it.
    let _holder = Postgres::start().unwrap().session(&f.url, &hold).unwrap();
    asleep(&f).await;
    // A step that waited would fail after the 2 s of `lock_timeout`, for the free ones too.
    controller.dispatcher.round(true).await.unwrap();
    assert_eq!(held.done(&f).await, [false; 6], "its rows are held");
    assert_eq!(free.done(&f).await, [true; 6]);
    // Other controllers would take one without a beat for dead, and end its sessions.
    assert_eq!(f.store.live_controllers(controller.clock.now()).await.unwrap().len(), 1, "its beat was sent");
    // Ended in the server: one that sleeps does not see that its client is gone.
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE wait_event = 'PgSleep' AND datname = current_database()";
    by_hand(&f, end).await;
    wait_until(seconds(10), "the next round takes the rest", async || {
        controller.dispatcher.round(true).await?;
        Ok((held.done(&f).await == [true; 6]).then_some(()))
    })
    .await
    .unwrap();
}

/// Waits until a session of this database sleeps.
async fn asleep(f: &Fixture) {
    wait_until(seconds(10), "the rows are held", async || {
        let url = f.url.clone();
        let query = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
        let found = tokio::task::spawn_blocking(move || Postgres::start()?.rows(&url, query)).await?;
        Ok((!found?.is_empty()).then_some(()))
    })
    .await
    .unwrap();
}
