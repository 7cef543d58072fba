//! The store, two controllers on it, nodes, and what operators were told.

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
    /// How often it was started: each life has an id of its own.
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

/// An operation that somebody asked for.
#[derive(Clone)]
pub(super) struct Asked {
    /// The request, which can be repeated.
    pub(super) new: NewOperation,
    /// Each try has an id of its own; one of them at most is stored.
    pub(super) tried: BTreeSet<OperationId>,
    /// The one that was acknowledged; `None`: the caller does not know.
    pub(super) id: Option<OperationId>,
    /// Those that had failed, or were overdue, when it was last resumed.
    pub(super) forgiven: BTreeSet<NodeId>,
}

/// What is saved besides the database: what was true then.
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
    /// Operations that have ended for good, which are not looked at again until the end.
    pub(super) settled: BTreeSet<OperationId>,
    /// Executions that have ended, and how.
    pub(super) ended: BTreeMap<ExecutionId, ExecutionState>,
    /// Ends that were acknowledged to their nodes.
    pub(super) acked: BTreeMap<ExecutionId, ExecutionState>,
    /// Nodes that lied: operators may have to give up what they are at.
    pub(super) liars: BTreeSet<NodeId>,
    /// Nodes whose conflicts an operator has decided about.
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
            // On Postgres each has connections of its own, and its own watch over silence.
            let store =
                if on_postgres && number > 0 { Store::open(&database.url).await.unwrap() } else { first.clone() };
            controllers.push(Controller::new(store, &clock, number, 0));
        }
        let serials = if on_postgres { template.serials_in(&first).await } else { template.serials.clone() };
        let pis = template.nodes.iter().cloned().zip(serials).map(|(id, serial)| Pi::new(id, serial)).collect();
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

    /// The store as operators reach it.
    pub(super) fn store(&self) -> Store {
        self.controllers[0].store.clone()
    }

    /// What a call came to; `None`: the database did not answer, as it may when something was done to it.
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
        self.store_ends().await
    }

    /// All nodes have a stream, as they mostly do.
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

    /// Rounds until silence means something.
    async fn listen(&mut self, seconds: u16) -> Outcome {
        self.clock.advance(TimeDelta::seconds(seconds.into()));
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
        // What was in its memory is gone; the nodes' streams break without a word to the store.
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

    /// All controllers stop, and start on what was saved. The nodes know more than that.
    async fn restore(&mut self) -> Outcome {
        let Some(saved) = self.saved.take() else { return Ok(()) };
        self.counts.add("restored");
        self.database.heal();
        self.database.restore(&Self::saved_folder(saved.number, &self.folder));
        let store = Store::open(&self.database.url).await.map_err(|error| format!("a restore: {error:?}"))?;
        for number in 0..CONTROLLERS {
            self.kill(number);
            let life = self.controllers[number].life + 1;
            self.controllers[number] = Controller::new(store.clone(), &self.clock, number, life);
        }
        self.shelf.restore(&saved.shelf);
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

    /// Nothing while the database does not answer.
    pub(super) async fn executions(&mut self, id: &OperationId) -> Outcome<Vec<ExecutionRow>> {
        let found = self.store().executions(id, None, 100, &[]).await;
        Ok(self.heard("executions", found)?.unwrap_or_default())
    }
}
