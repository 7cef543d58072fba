//! Whole rounds of a dispatcher: a step that fails does not prevent the others, and a round that could not listen does
//! not count as silence of a node.

use std::sync::Arc;

use chrono::TimeDelta;
use integration_tests::postgres::Postgres;
use integration_tests::{seconds, wait_until};
use marco_controller::clock::{Clock as _, ManualClock};
use marco_controller::dispatcher::Dispatcher;
use marco_controller::operation::ExecutionState;
use marco_controller::sessions::{Command, Handle, Sessions};
use marco_controller::store::{NewOperation, Store, StoreError};
use marco_proto::names::{ExecutionId, NodeId};

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
    // The round needs the locked row to begin the first operation, and gives up on it.
    let error = controller.dispatcher.round(false).await.unwrap_err();
    assert!(error.is_contention(), "{error:?}");
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
