//! The simulated world: a database, two controllers on it, nodes, and the answers that operators got.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use marco_controller::clock::{Clock as _, ManualClock};
use marco_controller::dispatcher::Dispatcher;
use marco_controller::operation::{ExecutionState, OperationState};
use marco_controller::sessions::Sessions;
use marco_controller::store::{ExecutionRow, NewOperation, ProgressRow, Store, StoreError};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::bytes::{Content, SavedShelf, Shelf};
use super::counts::Counts;
use super::database::{Database, Template, Trouble, folder};
use super::pi::Pi;
use super::session::Ending;
use super::step::Step;
use super::{CONTROLLERS, PIS, pick};
use crate::support::start;

pub(super) type Outcome<T = ()> = Result<T, String>;

pub(super) struct Controller {
    /// Starts so far. Each life has a controller id of its own.
    pub(super) life: u32,
    pub(super) is_alive: bool,
    pub(super) store: Store,
    pub(super) sessions: Arc<Sessions>,
    pub(super) dispatcher: Dispatcher,
    /// Progress that waits to be written.
    pub(super) progress: BTreeMap<ExecutionId, ProgressRow>,
}

impl Controller {
    fn new(store: Store, clock: &Arc<ManualClock>, number: usize, life: u32) -> Self {
        let sessions = Arc::new(Sessions::default());
        let (id, address) = (controller_id((number, life)), format!("c{number}:1346"));
        let clock = Arc::<ManualClock>::clone(clock);
        let dispatcher = Dispatcher::new(store.clone(), Arc::clone(&sessions), clock, id, address);
        Self { life, is_alive: true, store, sessions, dispatcher, progress: BTreeMap::new() }
    }
}

pub(super) fn controller_id((number, life): (usize, u32)) -> String {
    format!("c{number}-{life}")
}

/// An operation that an operator requested.
#[derive(Clone)]
pub(super) struct Asked {
    /// The request, kept for repetitions.
    pub(super) new: NewOperation,
    /// Ids of all tries. Each try has its own, and at most one is stored.
    pub(super) tried: BTreeSet<OperationId>,
    /// The acknowledged id. `None`: no answer came, so the operation may be stored or not.
    pub(super) id: Option<OperationId>,
    /// Nodes that had failed, or were overdue, at the last resume.
    pub(super) forgiven: BTreeSet<NodeId>,
}

/// Expectations at the time of a backup. They are restored with the database.
struct Saved {
    number: u32,
    operations: Vec<Asked>,
    ended: BTreeMap<ExecutionId, ExecutionState>,
    acked: BTreeMap<ExecutionId, ExecutionState>,
    shelf: SavedShelf,
}

pub(super) struct World {
    pub(super) database: Database,
    pub(super) clock: Arc<ManualClock>,
    pub(super) controllers: Vec<Controller>,
    pub(super) pis: Vec<Pi>,
    pub(super) contents: Arc<Vec<Content>>,
    pub(super) shelf: Shelf,
    pub(super) operations: Vec<Asked>,
    /// Operations whose end cannot change any more. They are skipped until the last check, to save time.
    pub(super) settled: BTreeSet<OperationId>,
    /// Executions that have ended, with their final state.
    pub(super) ended: BTreeMap<ExecutionId, ExecutionState>,
    /// Final states that were acknowledged to the nodes.
    pub(super) acked: BTreeMap<ExecutionId, ExecutionState>,
    /// Nodes that lied. Operators may have to abandon their executions.
    pub(super) liars: BTreeSet<NodeId>,
    /// Nodes whose conflicts an operator has resolved.
    pub(super) resolved: BTreeSet<NodeId>,
    /// Ends of sessions that are not stored yet.
    pub(super) ends: Vec<Ending>,
    saved: Option<Saved>,
    saves: u32,
    pub(super) counts: Counts,
    folder: tempfile::TempDir,
}

impl World {
    pub(super) async fn new(template: &Template, on_postgres: bool) -> Self {
        let database = Database::new(template, on_postgres).await;
        let clock = Arc::new(ManualClock::new(start()));
        let first = Store::open(&database.url).await.unwrap();
        let mut controllers = Vec::new();
        for number in 0..CONTROLLERS {
            // On Postgres each controller has a store of its own, as in production. An SQLite file takes only one.
            let store =
                if on_postgres && number > 0 { Store::open(&database.url).await.unwrap() } else { first.clone() };
            controllers.push(Controller::new(store, &clock, number, 0));
        }
        // The template of each database was enrolled by itself, and serial numbers are random.
        let serials = if on_postgres { template.serials_in(&first).await } else { template.serials.clone() };
        let pis = template.nodes.iter().cloned().zip(serials).zip([1, 2].into_iter().cycle());
        let pis = pis.map(|((id, serial), protocol)| Pi::new(id, serial, protocol)).collect();
        Self {
            database,
            clock,
            controllers,
            pis,
            contents: Arc::clone(&template.contents),
            shelf: Shelf::new(),
            operations: Vec::new(),
            settled: BTreeSet::new(),
            ended: BTreeMap::new(),
            acked: BTreeMap::new(),
            liars: BTreeSet::new(),
            resolved: BTreeSet::new(),
            ends: Vec::new(),
            saved: None,
            saves: 0,
            counts: Counts::default(),
            folder: folder(),
        }
    }

    pub(super) fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    /// The store that serves operators: that of the first controller.
    pub(super) fn store(&self) -> Store {
        self.controllers[0].store.clone()
    }

    /// Checks the result of a call. `None`: the database did not answer, and a fault was injected that explains it. Any
    /// other error fails the history.
    pub(super) fn heard<T>(&mut self, what: &str, done: Result<T, StoreError>) -> Outcome<Option<T>> {
        match (done, self.database.trouble()) {
            (Ok(done), _) => Ok(Some(done)),
            (Err(StoreError::Unavailable(_)), Some(trouble)) => {
                self.database.note_error();
                if trouble == Trouble::FullDisk {
                    self.counts.add("writes on a full disk");
                }
                self.counts.add("commits lost");
                Ok(None)
            }
            (Err(error), _) => Err(format!("{what}: {error:?}")),
        }
    }

    pub(super) async fn step(&mut self, step: &Step) -> Outcome {
        match *step {
            Step::Create { nodes, what, when, in_flight, failures } => {
                self.create(nodes, what, when, in_flight, failures).await
            }
            Step::Repeat(number) => self.repeat(number).await,
            Step::Cancel(number) => self.steer(number, "cancel").await,
            Step::Pause(number) => self.steer(number, "pause").await,
            Step::Resume(number) => self.steer(number, "resume").await,
            Step::Retry(number) => self.retry(number).await,
            Step::Abandon(operation, node) => self.abandon(operation, node).await,
            Step::Resolve(node, accept) => self.resolve(pick(node, PIS), accept).await,
            Step::Connect(node, controller, silent) => {
                self.connect(pick(node, PIS), pick(controller, CONTROLLERS), silent).await
            }
            Step::Break(node) => self.cut(pick(node, PIS)).await,
            Step::GoOn(node) => self.go_on(pick(node, PIS)).await,
            Step::Read(node) => self.read(pick(node, PIS)).await,
            Step::Work(node) => self.work(pick(node, PIS)).await,
            Step::Fail(node) => self.pis[pick(node, PIS)].fail().await,
            Step::Say(node, lost) => self.say(pick(node, PIS), lost).await,
            Step::Tell(node, bytes) => self.tell(pick(node, PIS), bytes).await,
            Step::Lie(node, by) => self.lie(pick(node, PIS), by).await,
            Step::Boot(node, new) => {
                let now = self.now();
                self.pis[pick(node, PIS)].boot(new, now).await
            }
            Step::PowerCut(node) => self.cut_power(pick(node, PIS)).await,
            Step::Restart(node) => self.restart(pick(node, PIS)).await,
            Step::Tear(node, lost) => self.tear(pick(node, PIS), lost.into()).await,
            Step::Round(controller, seconds) => {
                self.clock.advance(TimeDelta::seconds(seconds.into()));
                self.round(pick(controller, CONTROLLERS)).await
            }
            Step::Listen(seconds) => self.listen(seconds).await,
            Step::Kill(controller) => {
                self.kill(pick(controller, CONTROLLERS));
                Ok(())
            }
            Step::Start(controller) => self.start(pick(controller, CONTROLLERS)).await,
            Step::Jump(by) => {
                self.clock.advance(TimeDelta::seconds(by.into()));
                Ok(())
            }
            Step::LoseAnswer | Step::CutBefore => {
                let before = matches!(step, Step::CutBefore);
                if self.database.cut(before) {
                    self.counts.add(if before { "commits cut" } else { "answers lost" });
                }
                Ok(())
            }
            Step::Fill => {
                self.database.fill();
                Ok(())
            }
            Step::Empty => {
                self.database.heal();
                Ok(())
            }
            Step::Save => self.save(),
            Step::Restore => self.restore().await,
            Step::Push(name, content, whole) => self.push(name, content, whole).await,
            Step::Name(lives) => self.name(lives).await,
            Step::Delete(name, dies) => self.delete(name, dies).await,
            Step::Sweep => self.sweep().await,
        }?;
        self.pis.iter_mut().for_each(Pi::remember);
        // Ends of sessions that the database did not take are tried again after each step, as the controller does each
        // second.
        self.store_ends().await
    }

    /// Connects all nodes: the usual state of a fleet.
    pub(super) async fn begin(&mut self) -> Outcome {
        for number in 0..PIS {
            self.connect(number, number % CONTROLLERS, false).await?;
        }
        Ok(())
    }

    async fn go_on(&mut self, number: usize) -> Outcome {
        self.read(number).await?;
        self.work(number).await?;
        self.say(number, false).await
    }

    /// Runs rounds until silence proves something: 91 s without a break of 15 s.
    async fn listen(&mut self, seconds: u16) -> Outcome {
        self.clock.advance(TimeDelta::seconds(seconds.into()));
        // Steps of 13 s, because a break of more than 15 s counts as one in which nobody listened.
        for _ in 0..7 {
            self.clock.advance(TimeDelta::seconds(13));
            for number in 0..CONTROLLERS {
                self.round(number).await?;
            }
        }
        Ok(())
    }

    pub(super) fn kill(&mut self, number: usize) {
        if !self.controllers[number].is_alive {
            return;
        }
        self.counts.add("controllers killed");
        let controller = &mut self.controllers[number];
        controller.is_alive = false;
        // Its memory is lost, and its streams break without an end in the store.
        controller.sessions = Arc::new(Sessions::default());
        controller.progress.clear();
        self.shelf.forget_push();
        self.ends.retain(|end| end.controller.0 != number);
        for pi in &mut self.pis {
            pi.link.take_if(|link| link.controller.0 == number);
        }
    }

    pub(super) async fn start(&mut self, number: usize) -> Outcome {
        if self.controllers[number].is_alive {
            return Ok(());
        }
        let mut store = self.controllers[number].store.clone();
        if self.database.is_postgres() {
            // `Store::open` does not retry, so a pending fault would only fail this start.
            self.database.heal();
            store = Store::open(&self.database.url).await.map_err(|error| format!("a start: {error:?}"))?;
        }
        let life = self.controllers[number].life + 1;
        self.controllers[number] = Controller::new(store, &self.clock, number, life);
        Ok(())
    }

    fn save(&mut self) -> Outcome {
        self.saves += 1;
        if self.database.save(&Self::saved_folder(self.saves, &self.folder)).is_none() {
            return Ok(());
        }
        self.counts.add("saved");
        self.saved = Some(Saved {
            number: self.saves,
            operations: self.operations.clone(),
            ended: self.ended.clone(),
            acked: self.acked.clone(),
            shelf: self.shelf.save(),
        });
        Ok(())
    }

    /// Restarts all controllers on the backup. The nodes' journals are newer than it.
    async fn restore(&mut self) -> Outcome {
        let Some(saved) = self.saved.take() else { return Ok(()) };
        self.counts.add("restored");
        // A full disk has no room for the backup.
        self.database.heal();
        self.database.restore(&Self::saved_folder(saved.number, &self.folder));
        let store = Store::open(&self.database.url).await.map_err(|error| format!("a restore: {error:?}"))?;
        for number in 0..CONTROLLERS {
            self.kill(number);
            let life = self.controllers[number].life + 1;
            self.controllers[number] = Controller::new(store.clone(), &self.clock, number, life);
        }
        self.shelf.restore(&saved.shelf);
        for pi in &mut self.pis {
            pi.torn.before_a_restore |= pi.torn.ever;
        }
        // Operations that were settled since the backup may be open again in it.
        self.settled.clear();
        (self.operations, self.ended, self.acked) = (saved.operations, saved.ended, saved.acked);
        Ok(())
    }

    pub(super) async fn state(&mut self, id: &OperationId) -> Outcome<Option<OperationState>> {
        let found = self.store().operation(id).await;
        match self.heard("an operation", found)? {
            Some(None) => Err(format!("{id} was acknowledged and is gone")),
            Some(Some(row)) => Ok(Some(row.state)),
            None => Ok(None),
        }
    }

    /// Executions of an operation; none while the database does not answer.
    pub(super) async fn executions(&mut self, id: &OperationId) -> Outcome<Vec<ExecutionRow>> {
        let found = self.store().executions(id, None, 100, &[]).await;
        Ok(self.heard("executions", found)?.unwrap_or_default())
    }
}
