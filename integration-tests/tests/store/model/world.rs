//! The store, two controllers on it, and nodes. What has to be true of them is in `checks`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Add;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use marco_controller::clock::{Clock as _, ManualClock};
use marco_controller::dispatcher::Dispatcher;
use marco_controller::operation::{Action, ExecutionState, Greeting, OperationState};
use marco_controller::rollout::{Limit, Rollout};
use marco_controller::sessions::{Command, Sessions};
use marco_controller::store::{
    CertificateQuery, CreateOutcome, ExecutionRow, Hello, NewOperation, ReportOutcome, ReportRow, SessionOutcome, Store,
};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::pi::{Link, Pi};
use super::{CONTROLLERS, PIS, Step};
use crate::support::{Fixture, hello, new_operation, power_off, reboot, serial_of, start};

/// Rounds in which everything has to come to an end once nothing is broken any more.
const REST: usize = 80;

pub(super) type Outcome<T = ()> = Result<T, String>;

/// What histories came to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) deliveries: usize,
    pub(super) succeeded: usize,
    pub(super) failed: usize,
}

impl Add for Counts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            deliveries: self.deliveries + other.deliveries,
            succeeded: self.succeeded + other.succeeded,
            failed: self.failed + other.failed,
        }
    }
}

/// An empty database with nodes enrolled, made once and copied for each history.
pub(super) struct Template {
    file: PathBuf,
    nodes: Vec<NodeId>,
    /// The serial numbers of their certificates.
    serials: Vec<String>,
    _folder: tempfile::TempDir,
}

/// A folder in memory where there is one: a history commits hundreds of times, each time to the disk.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

pub(super) async fn template() -> Template {
    let folder = folder();
    let file = folder.path().join("marco.db");
    let url = format!("sqlite://{}", file.display());
    let fixture = Fixture { store: Store::open(&url).await.unwrap(), url, folder: None };
    let ids: Vec<String> = (0..PIS).map(|number| format!("pi-{number}")).collect();
    let nodes = fixture.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut serials = Vec::new();
    for node in &nodes {
        let query = CertificateQuery { after: None, limit: 1, subject: node.to_string(), valid_at: None };
        let found = fixture.store.certificates(&query).await.unwrap();
        serials.push(found[0].certificate.serial.clone());
    }
    let copy = folder.path().join("template.db");
    // A copy without a write-ahead log, whatever the pool of the first one does with its own.
    fixture.by_hand(&[&format!("VACUUM INTO '{}'", copy.display())]).await.remove(0).unwrap();
    Template { file: copy, nodes, serials, _folder: folder }
}

pub(super) struct Controller {
    /// How often it was started: each life has an id of its own.
    life: u32,
    pub(super) is_alive: bool,
    sessions: Arc<Sessions>,
    pub(super) dispatcher: Dispatcher,
}

impl Controller {
    fn new(store: &Store, clock: &Arc<ManualClock>, number: usize, life: u32) -> Self {
        let sessions = Arc::new(Sessions::default());
        let (id, address) = (controller_id((number, life)), format!("c{number}:1346"));
        let clock = Arc::<ManualClock>::clone(clock);
        let dispatcher = Dispatcher::new(store.clone(), Arc::clone(&sessions), clock, id, address);
        Self { life, is_alive: true, sessions, dispatcher }
    }
}

fn controller_id((number, life): (usize, u32)) -> String {
    format!("c{number}-{life}")
}

/// An operation that was acknowledged to its creator.
pub(super) struct Acknowledged {
    pub(super) id: OperationId,
    pub(super) action: Action,
    pub(super) rollout: Option<Rollout>,
    pub(super) nodes: usize,
    /// Those that had failed, or were overdue, when it was last resumed.
    pub(super) forgiven: BTreeSet<NodeId>,
}

pub(super) struct World {
    store: Store,
    clock: Arc<ManualClock>,
    pub(super) controllers: Vec<Controller>,
    pub(super) pis: Vec<Pi>,
    pub(super) operations: Vec<Acknowledged>,
    /// Executions that have ended, and how.
    pub(super) ended: BTreeMap<ExecutionId, ExecutionState>,
    /// Nodes that lied: what is said of them proves nothing.
    pub(super) liars: BTreeSet<NodeId>,
    deliveries: usize,
    _folder: tempfile::TempDir,
}

fn pick(number: u8, of: usize) -> usize {
    usize::from(number) % of.max(1)
}

pub(super) fn failed(row: &ExecutionRow) -> bool {
    matches!(row.state, ExecutionState::Failed | ExecutionState::RolledBack) || (row.overdue && !row.state.is_final())
}

impl World {
    pub(super) async fn new(template: &Template) -> Self {
        let folder = folder();
        let file = folder.path().join("marco.db");
        std::fs::copy(&template.file, &file).unwrap();
        let store = Store::open(&format!("sqlite://{}", file.display())).await.unwrap();
        let clock = Arc::new(ManualClock::new(start()));
        let controllers = (0..CONTROLLERS).map(|number| Controller::new(&store, &clock, number, 0)).collect();
        let pis = template
            .nodes
            .iter()
            .cloned()
            .zip(template.serials.iter().cloned())
            .map(|(id, serial)| Pi::new(id, serial))
            .collect();
        Self {
            store,
            clock,
            controllers,
            pis,
            operations: Vec::new(),
            ended: BTreeMap::new(),
            liars: BTreeSet::new(),
            deliveries: 0,
            _folder: folder,
        }
    }

    fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    pub(super) async fn step(&mut self, step: &Step) -> Outcome {
        match *step {
            Step::Create { nodes, off, in_flight, failures } => self.create(nodes, off, in_flight, failures).await,
            Step::Cancel(number) => self.steer(number, "cancel").await,
            Step::Pause(number) => self.steer(number, "pause").await,
            Step::Resume(number) => self.steer(number, "resume").await,
            Step::Abandon(operation, node) => self.abandon(operation, node).await,
            Step::Connect(node, controller) => self.connect(pick(node, PIS), pick(controller, CONTROLLERS)).await,
            Step::Break(node) => self.cut(pick(node, PIS)).await,
            Step::Read(node) => self.read(pick(node, PIS)).await,
            Step::Work(node) => self.work(pick(node, PIS)).await,
            Step::Fail(node) => {
                self.pis[pick(node, PIS)].fail();
                Ok(())
            }
            Step::Say(node, lost) => self.say(pick(node, PIS), lost).await,
            Step::Lie(node, by) => self.lie(pick(node, PIS), by).await,
            Step::Boot(node) => {
                self.pis[pick(node, PIS)].boot();
                Ok(())
            }
            Step::Round(controller, seconds) => {
                self.clock.advance(TimeDelta::seconds(seconds.into()));
                self.round(pick(controller, CONTROLLERS)).await
            }
            Step::Kill(controller) => {
                self.kill(pick(controller, CONTROLLERS));
                Ok(())
            }
            Step::Start(controller) => {
                self.start(pick(controller, CONTROLLERS));
                Ok(())
            }
            Step::Jump(by) => {
                self.clock.advance(TimeDelta::seconds(by.into()));
                Ok(())
            }
        }
    }

    async fn create(&mut self, nodes: u8, off: bool, in_flight: Option<u8>, failures: Option<u8>) -> Outcome {
        let targets: Vec<NodeId> = self
            .pis
            .iter()
            .enumerate()
            .filter(|(number, _)| nodes & (1 << number) != 0)
            .map(|(_, pi)| pi.id.clone())
            .collect();
        let rollout = (in_flight.is_some() || failures.is_some()).then(|| Rollout {
            max_in_flight: in_flight.map(u32::from),
            max_failures: failures.map(|most| Limit::Number(most.into())),
            ..Rollout::default()
        });
        let action = if off { power_off() } else { reboot() };
        let now = self.now();
        let new = NewOperation {
            schedule_time: now,
            expire_time: now + TimeDelta::hours(24),
            rollout: rollout.clone(),
            ..new_operation(action.clone(), &targets)
        };
        match self.store.create_operation(&new, now).await {
            Ok(CreateOutcome::Created(_)) => {
                let forgiven = BTreeSet::new();
                self.operations.push(Acknowledged { id: new.id, action, rollout, nodes: targets.len(), forgiven });
                Ok(())
            }
            other => Err(format!("not created: {other:?}")),
        }
    }

    async fn steer(&mut self, number: u8, how: &str) -> Outcome {
        if self.operations.is_empty() {
            return Ok(());
        }
        let now = self.now();
        let place = pick(number, self.operations.len());
        let id = self.operations[place].id.clone();
        let before = self.executions(&id).await?;
        let was_paused = self.state(&id).await? == OperationState::Paused;
        let steered = match how {
            "cancel" => self.store.request_cancel(&id, "pat", now).await,
            "pause" => self.store.pause(&id, "pat", "because", now).await,
            _ => self.store.resume(&id, "pat", now).await,
        };
        steered.map_err(|error| format!("{how}: {error:?}"))?;
        if how == "resume" && was_paused {
            self.operations[place].forgiven =
                before.iter().filter(|row| failed(row)).map(|row| row.id.node.clone()).collect();
        }
        Ok(())
    }

    async fn abandon(&mut self, operation: u8, node: u8) -> Outcome {
        if self.operations.is_empty() {
            return Ok(());
        }
        let operation = self.operations[pick(operation, self.operations.len())].id.clone();
        let id = ExecutionId { operation, node: self.pis[pick(node, PIS)].id.clone() };
        self.store.abandon(&id, "pat", self.now()).await.map(|_| ()).map_err(|error| format!("abandon: {error:?}"))
    }

    /// The stream ends, and the controller, if it lives, stores that.
    async fn cut(&mut self, pi: usize) -> Outcome {
        let now = self.now();
        let Some(link) = self.pis[pi].link.take() else { return Ok(()) };
        let (number, life) = link.controller;
        let controller = &self.controllers[number];
        if controller.is_alive && controller.life == life {
            let node = self.pis[pi].id.clone();
            controller.sessions.close(&node, link.epoch);
            self.store.end_session(&node, link.epoch, now).await.map_err(|error| format!("{error:?}"))?;
        }
        Ok(())
    }

    async fn connect(&mut self, number: usize, controller: usize) -> Outcome {
        if !self.pis[number].is_on || !self.controllers[controller].is_alive {
            return Ok(());
        }
        self.cut(number).await?;
        let (now, life) = (self.now(), self.controllers[controller].life);
        let (node, boot_id) = (self.pis[number].id.clone(), self.pis[number].boot_id());
        let mut said = hello(&boot_id, &serial_of(node.as_str()), now);
        said.controller_id = controller_id((controller, life));
        // The key that it was enrolled with.
        said.key_sha256 = format!("key-{node}");
        let epoch = match self.store.begin_session(&node, &said, now).await {
            Ok(SessionOutcome::Begun { epoch, .. }) => epoch,
            // A clock that went back makes this connection look older than the one before.
            Ok(SessionOutcome::Superseded) => return Ok(()),
            other => return Err(format!("{node} is not let in: {other:?}")),
        };
        let Some(handle) = self.controllers[controller].sessions.open(&node, epoch, &self.pis[number].certificate)
        else {
            return Err("no place in the registry".to_owned());
        };
        self.pis[number].link = Some(Link { controller: (controller, life), epoch, handle });
        let listed = self.pis[number].unsaid();
        let greeting = Greeting { mode: said.mode, boot_id: &boot_id, answers_queries: true };
        let answer = self
            .store
            .reconcile(&node, epoch, Hello { greeting, listed: &listed }, now)
            .await
            .map_err(|error| format!("reconcile: {error:?}"))?;
        for id in answer.queries {
            if !self.pis[number].asked_about(&id) {
                let told = self.store.not_held(&id, None, epoch, now).await;
                told.map_err(|error| format!("not held: {error:?}"))?;
            }
        }
        self.controllers[controller].sessions.set_ready(&node, epoch, true);
        let pi = &mut self.pis[number];
        for execution in answer.cancels {
            pi.hear(Command::Cancel(execution));
        }
        for (execution, sequence) in answer.acks {
            pi.acknowledged(&execution, sequence);
        }
        for assignment in answer.assigns {
            pi.accept(assignment);
        }
        Ok(())
    }

    /// Takes what the controller sent; a session that was ended is cut.
    async fn read(&mut self, number: usize) -> Outcome {
        let pi = &mut self.pis[number];
        let Some(link) = &mut pi.link else { return Ok(()) };
        let mut commands = Vec::new();
        while let Ok(command) = link.handle.commands.try_recv() {
            commands.push(command);
        }
        let ended = link.handle.end.borrow().is_some() || link.handle.end.has_changed().is_err();
        self.deliveries += commands.len();
        for command in commands {
            pi.hear(command);
        }
        if ended { self.cut(number).await } else { Ok(()) }
    }

    async fn work(&mut self, number: usize) -> Outcome {
        if !self.pis[number].is_on {
            return Ok(());
        }
        let Some(id) = self.pis[number].work() else { return Ok(()) };
        // Its last words: the agent is told to end by the shutdown that it gave the command for.
        if let Some(link) = self.pis[number].link.as_ref().filter(|link| self.is_live(link)) {
            let said = self.store.say_goodbye(&id, link.epoch, self.now()).await;
            said.map_err(|error| format!("goodbye: {error:?}"))?;
        }
        self.cut(number).await
    }

    async fn say(&mut self, number: usize, lost: bool) -> Outcome {
        let Some(link) = &self.pis[number].link else { return Ok(()) };
        if !self.is_live(link) {
            return Ok(());
        }
        let epoch = link.epoch;
        let Some(report) = self.pis[number].unsaid().into_iter().next() else { return Ok(()) };
        let outcome = self.report(number, epoch, &report).await?;
        if lost {
            return Ok(());
        }
        match outcome {
            // A state that is stored is acknowledged, also when it is said again because the answer was lost.
            ReportOutcome::Acked | ReportOutcome::Unknown | ReportOutcome::Progress => {
                self.pis[number].acknowledged(&report.execution, report.sequence);
            }
            ReportOutcome::Conflict { acknowledge, .. } => {
                if acknowledge {
                    self.pis[number].acknowledged(&report.execution, report.sequence);
                }
            }
            ReportOutcome::Stale(assignment) => self.pis[number].accept(*assignment),
            ReportOutcome::NotHolder => return self.cut(number).await,
            ReportOutcome::Refused(_) => {}
        }
        Ok(())
    }

    async fn report(&self, number: usize, epoch: i64, report: &ReportRow) -> Outcome<ReportOutcome> {
        let applied = self.store.apply_report(&self.pis[number].id, epoch, report, self.now()).await;
        applied.map_err(|error| format!("a report: {error:?}"))
    }

    async fn lie(&mut self, number: usize, by: u32) -> Outcome {
        let Some(link) = &self.pis[number].link else { return Ok(()) };
        let epoch = link.epoch;
        let pi = &self.pis[number];
        let Some((id, job)) = pi.jobs.iter().find(|(_, job)| !job.state.is_final()) else { return Ok(()) };
        let report = ReportRow { attempt: job.attempt.saturating_add(by), ..pi.report(id, job) };
        self.liars.insert(pi.id.clone());
        self.report(number, epoch, &report).await.map(|_| ())
    }

    fn is_live(&self, link: &Link) -> bool {
        let controller = &self.controllers[link.controller.0];
        controller.is_alive && controller.life == link.controller.1
    }

    fn kill(&mut self, number: usize) {
        self.controllers[number].is_alive = false;
        // What was in its memory is gone; the nodes' streams break without a word to the store.
        self.controllers[number].sessions = Arc::new(Sessions::default());
        for pi in &mut self.pis {
            pi.link.take_if(|link| link.controller.0 == number);
        }
    }

    fn start(&mut self, number: usize) {
        if !self.controllers[number].is_alive {
            let life = self.controllers[number].life + 1;
            self.controllers[number] = Controller::new(&self.store, &self.clock, number, life);
        }
    }

    pub(super) async fn state(&self, id: &OperationId) -> Outcome<OperationState> {
        match self.store.operation(id).await {
            Ok(Some(row)) => Ok(row.state),
            other => Err(format!("{id:?} was acknowledged and is {other:?}")),
        }
    }

    pub(super) async fn executions(&self, id: &OperationId) -> Outcome<Vec<ExecutionRow>> {
        self.store.executions(id, None, 100, &[]).await.map_err(|error| format!("{error:?}"))
    }

    /// The deliveries that are under way.
    pub(super) async fn assigned(&self) -> Outcome<BTreeSet<(ExecutionId, u32)>> {
        let mut found = BTreeSet::new();
        for operation in &self.operations {
            let rows = self.executions(&operation.id).await?;
            let active = rows.into_iter().filter(|row| row.state == ExecutionState::Assigned);
            found.extend(active.map(|row| (row.id, row.attempt)));
        }
        Ok(found)
    }

    /// With everything healed, everything ends.
    pub(super) async fn comes_to_rest(&mut self) -> Outcome<Counts> {
        for _ in 0..REST {
            for number in 0..CONTROLLERS {
                self.start(number);
            }
            for number in 0..PIS {
                self.pis[number].boot();
                if self.pis[number].link.as_ref().is_none_or(|link| !self.is_live(link)) {
                    self.connect(number, number % CONTROLLERS).await?;
                }
                self.read(number).await?;
                self.work(number).await?;
                self.say(number, false).await?;
            }
            for number in 0..self.operations.len() {
                if self.state(&self.operations[number].id.clone()).await? == OperationState::Paused {
                    self.steer(u8::try_from(number).unwrap(), "resume").await?;
                }
            }
            self.clock.advance(TimeDelta::seconds(5));
            for number in 0..CONTROLLERS {
                self.round(number).await?;
            }
            self.check().await?;
        }
        let mut counts = Counts { deliveries: self.deliveries, ..Counts::default() };
        for operation in &self.operations {
            let rows = self.executions(&operation.id).await?;
            let lied = |row: &ExecutionRow| self.liars.contains(&row.id.node);
            if let Some(open) = rows.iter().find(|row| !row.state.is_final() && !lied(row)) {
                return Err(format!("it never ends: {open:?}"));
            }
            counts.succeeded += rows.iter().filter(|row| row.state == ExecutionState::Succeeded).count();
            counts.failed += rows.iter().filter(|row| row.state == ExecutionState::Failed).count();
        }
        Ok(counts)
    }
}
