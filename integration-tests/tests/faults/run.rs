//! One run: an update from the template's state to the end of all things, with the faults of a plan.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use chrono::TimeDelta;
use integration_tests::fleet::is_final;
use integration_tests::seconds;
use marco_controller::clock::ManualClock;
use marco_proto::v1::execution::State;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{
    AbandonExecutionRequest, CancelOperationRequest, Execution, GetNodeRequest, ListExecutionsRequest,
    ListOperationsRequest, Node,
};
use tokio::sync::mpsc;

use crate::checks;
use crate::hook::{Point, Recorder};
use crate::middle::{Middle, Version};
use crate::pi::PiState;
use crate::plan::{Event, Plan};
use crate::template::{BEFORE_BEGIN, BEFORE_CREATION, Template, order};
use crate::time::VirtualTime;
use crate::world::{NODE, World, begin, copy, folder};

/// Shortest and longest steps of virtual time.
const STEP: Duration = Duration::from_millis(100);
const LONG_STEP: Duration = seconds(2);
/// Longest step while nothing can come to its end.
const WAITING_STEP: Duration = seconds(10);
/// Longest step in an outage: less than the ten minutes in which a system on trial gives up.
const OFFLINE_STEP: Duration = seconds(300);
/// Virtual time in which everything must come to its end after the last thing from outside. Five tries of each cause,
/// three trial boots of ten minutes and an overdue execution fit in.
const LIMIT: Duration = seconds(5 * 3600);
/// An outage that never ends, for an agent: longer than every limit of its own.
const FOREVER: Duration = seconds(26 * 3600);
/// An outage in which an execution that was begun becomes overdue, and may be abandoned. One that was not is not.
const LONG_AWAY: Duration = seconds(3 * 3600);
/// Length of what goes wrong until an operator mends it: a controller's clock, and words that do not reach it.
const WRONG: Duration = seconds(600);
/// Time in which the end must stay as it is, and nothing may go on.
const REST: Duration = seconds(35);
/// Shortest stillness that is taken for the end: a controller looks at blank cards and for overdue work every five
/// seconds.
const CALM: Duration = seconds(8);
/// First and longest pause between two tries of what an operator may not do yet.
const ASK_AGAIN: Duration = seconds(30);
const LONG_PAUSE: Duration = seconds(15 * 60);

/// A world in which a plan happens.
pub(crate) struct Run {
    pub(crate) world: World,
    pub(crate) recorder: Arc<Recorder>,
    /// The operation of the template.
    operation: String,
    pub(crate) plan: Plan,
    events: mpsc::UnboundedReceiver<Event>,
    pending: Vec<(Duration, Due)>,
    middle: Option<Middle>,
    /// Boots of an old system that has to wait for its controller, which called its work off meanwhile.
    waits_since: Option<usize>,
    /// The network is cut for the agents.
    pub(crate) offline: bool,
    /// Virtual time of the last event from outside.
    pub(crate) last_event: Duration,
    step: Duration,
    seen: usize,
}

/// Something that is due at a later time.
#[derive(Debug, Clone, Copy)]
enum Due {
    Network,
    Clock(i64),
    Words,
    Abandon { and_replace: bool, pause: Duration },
}

/// The end of a run.
pub(crate) struct Outcome {
    pub(crate) points: Vec<(Point, bool)>,
    pub(crate) happened: usize,
    pub(crate) passed: Duration,
}

/// Runs a plan in a fresh copy of the template. The error says which promise was broken.
pub(crate) fn play(template: &Template, plan: Plan) -> Result<Outcome> {
    let clock = Arc::new(ManualClock::new(begin()));
    let (runtime, time) = VirtualTime::new(clock)?;
    let outcome = runtime.block_on(Box::pin(run(template, plan, time)));
    // Threads that a cut left behind must not hold up the test.
    runtime.shutdown_background();
    outcome
}

async fn run(template: &Template, plan: Plan, time: VirtualTime) -> Result<Outcome> {
    let dir = folder()?;
    copy(template.dir(), dir.path()).await?;
    let world = World::open(dir.path(), time).await?;
    let (sender, events) = mpsc::unbounded_channel();
    let recorder = Arc::new(Recorder::new(&world.pi_dir(), plan.clone(), sender));
    let _watch = node_agent::step::watch(&world.pi_dir(), Arc::<Recorder>::clone(&recorder));
    let mut run = Run {
        world,
        recorder: Arc::clone(&recorder),
        operation: template.operation.clone(),
        plan,
        events,
        pending: Vec::new(),
        middle: None,
        waits_since: None,
        offline: false,
        last_event: Duration::ZERO,
        step: STEP,
        seen: 0,
    };
    run.world.power(recorder, None)?;
    let told = run.until_its_end().await;
    let unplugged = run.world.unplug().await;
    told?;
    unplugged?;
    Ok(Outcome { points: run.recorder.points(), happened: run.recorder.happened(), passed: run.world.time.passed() })
}

impl Run {
    async fn until_its_end(&mut self) -> Result<()> {
        self.settle().await.context("first")?;
        checks::end(self).await.context("at the first end")?;
        // What the end is worth shows at the next boot, with a card that works again.
        let lags = self.recorder.keeps_no_journal();
        self.recorder.heal();
        if lags {
            self.settle().await.context("with a journal that can be written again")?;
            checks::end(self).await.context("with a journal that can be written again")?;
        }
        let before = self.recorder.count();
        let seen = self.recorder.counts();
        self.rest(REST).await?;
        checks::rest(self, before, &seen)?;
        let boots = PiState::read(&self.world.pi_dir())?.boots;
        fs::write(self.world.pi_dir().join("power-cut"), "")?;
        let mut turns = 0;
        while PiState::read(&self.world.pi_dir())?.boots <= boots {
            turns += 1;
            anyhow::ensure!(turns < 1000, "the machine does not boot again");
            self.turn().await?;
        }
        self.settle().await.context("after another boot")?;
        checks::end(self).await.context("after another boot")
    }

    /// Lets time pass, also if nothing happens.
    async fn rest(&mut self, time: Duration) -> Result<()> {
        let until = self.world.time.passed() + time;
        while self.world.time.passed() < until {
            self.turn().await?;
        }
        Ok(())
    }

    /// One turn: everything does what it can without time, then time passes.
    async fn turn(&mut self) -> Result<()> {
        self.world.time.still().await;
        while let Ok(event) = self.events.try_recv() {
            self.begin(event).await?;
            self.last_event = self.world.time.passed();
            self.step = STEP;
        }
        let now = self.world.time.passed();
        let (due, later) = std::mem::take(&mut self.pending).into_iter().partition(|(at, _)| *at <= now);
        self.pending = later;
        let due: Vec<(Duration, Due)> = due;
        for (_, due) in due {
            self.finish(due).await?;
            self.last_event = now;
        }
        let count = self.recorder.count();
        // The first hours of an outage in small steps: trials end in them. Later nothing but tries goes on.
        let closely = !self.waits() || self.offline && now < self.last_event + LONG_AWAY;
        if count != self.seen && closely {
            (self.seen, self.step) = (count, STEP);
        } else {
            self.seen = count;
            let longest = match self.waits() {
                true if self.offline => OFFLINE_STEP,
                true => WAITING_STEP,
                false => LONG_STEP,
            };
            self.step = (self.step * 2).min(longest);
        }
        let next = self.pending.iter().map(|(at, _)| at.saturating_sub(now)).min();
        self.world.time.pass(next.map_or(self.step, |next| self.step.min(next.max(STEP)))).await;
        Ok(())
    }

    /// Lets an event happen.
    async fn begin(&mut self, event: Event) -> Result<()> {
        let now = self.world.time.passed();
        let pi = PiState::read(&self.world.pi_dir())?;
        if event.takes_the_power() && pi.ran_old {
            self.waits_since = Some(pi.boots);
        }
        match event {
            Event::NoNetwork(length) => {
                self.cut_network();
                self.pending.push((now + length.unwrap_or(FOREVER), Due::Network));
            }
            Event::VersionBefore => self.speak(Version::Before).await?,
            Event::VersionAfter => self.speak(Version::After).await?,
            Event::RestoredBeforeBegin => self.restore(BEFORE_BEGIN).await?,
            Event::RestoredBeforeCreation => self.restore(BEFORE_CREATION).await?,
            Event::Clock(days) => {
                self.world.time.clock.advance(TimeDelta::days(days));
                self.pending.push((now + WRONG, Due::Clock(-days)));
            }
            Event::WordsFail => self.pending.push((now + WRONG, Due::Words)),
            Event::Cancelled => self.cancel().await?,
            Event::CancelledWhileAway => {
                self.cut_network();
                self.cancel().await?;
                self.pending.push((now + seconds(120), Due::Network));
            }
            Event::Abandoned | Event::Replaced => {
                self.abandon(event == Event::Replaced, ASK_AGAIN).await?;
            }
            Event::AbandonedWhileAway => {
                self.cut_network();
                self.pending.push((now + LONG_AWAY, Due::Network));
                self.abandon(false, ASK_AGAIN).await?;
            }
        }
        Ok(())
    }

    async fn finish(&mut self, due: Due) -> Result<()> {
        match due {
            Due::Network => {
                // Another outage may still last.
                if !self.pending.iter().any(|(_, other)| matches!(other, Due::Network)) {
                    if let Some(before) = self.waits_since.take() {
                        checks::waited(before, &PiState::read(&self.world.pi_dir())?, self.plan.len())?;
                    }
                    self.offline = false;
                    self.world.mend_network();
                }
                Ok(())
            }
            Due::Clock(days) => {
                self.world.time.clock.advance(TimeDelta::days(days));
                Ok(())
            }
            Due::Words => {
                self.recorder.heal_words();
                Ok(())
            }
            Due::Abandon { and_replace, pause } => self.abandon(and_replace, pause).await,
        }
    }

    fn cut_network(&mut self) {
        self.offline = true;
        self.world.cut_network();
    }

    async fn speak(&mut self, version: Version) -> Result<()> {
        let middle = Middle::start(&self.world, version).await?;
        self.world.agents_talk_to(Some(middle.address()));
        self.middle = Some(middle);
        Ok(())
    }

    async fn restore(&mut self, database: &str) -> Result<()> {
        self.world.restore(database).await?;
        if let Some(middle) = &self.middle {
            middle.retarget(self.world.address());
            self.world.agents_talk_to(Some(middle.address()));
        }
        Ok(())
    }

    async fn cancel(&mut self) -> Result<()> {
        let mut client = OperationServiceClient::new(self.world.api()?);
        let cancelled = client.cancel_operation(CancelOperationRequest { name: self.operation.clone() });
        // Refused if it has ended, or if a backup does not know it.
        drop(self.world.time.drive(cancelled).await);
        Ok(())
    }

    /// Tries to abandon, now and until it is allowed or over.
    async fn abandon(&mut self, and_replace: bool, pause: Duration) -> Result<()> {
        let now = self.world.time.passed();
        // A clock that is wrong takes the operator's certificate for invalid.
        let known = self.executions().await;
        let mut over = known.as_ref().is_ok_and(|known| known.iter().all(|execution| is_final(execution.state())));
        let open = known.unwrap_or_default().into_iter().find(|execution| !is_final(execution.state()));
        if let Some(execution) = open {
            let mut client = OperationServiceClient::new(self.world.api()?);
            let request = AbandonExecutionRequest { name: execution.name };
            over = self.world.time.drive(client.abandon_execution(request)).await.is_ok();
            if over && and_replace {
                order(&mut self.world, "other").await?;
            }
        }
        if !over {
            let pause = pause.min(LONG_PAUSE);
            self.pending.push((now + pause, Due::Abandon { and_replace, pause: pause * 2 }));
        }
        Ok(())
    }

    /// The executions of all operations, oldest first. The controller has some of its own: a card that was erased and
    /// whose work was called off is blank, and gets the default image.
    pub(crate) async fn executions(&mut self) -> Result<Vec<Execution>> {
        let mut client = OperationServiceClient::new(self.world.api()?);
        let request = ListOperationsRequest { page_size: 100, ..ListOperationsRequest::default() };
        let operations = self.world.time.drive(client.list_operations(request)).await?.into_inner().operations;
        let mut executions = Vec::new();
        for parent in operations.into_iter().rev().map(|operation| operation.name) {
            let request = ListExecutionsRequest { parent, page_size: 10, ..ListExecutionsRequest::default() };
            executions.extend(self.world.time.drive(client.list_executions(request)).await?.into_inner().executions);
        }
        Ok(executions)
    }

    pub(crate) async fn node(&mut self) -> Result<Node> {
        let mut client = NodeServiceClient::new(self.world.api()?);
        let request = GetNodeRequest { name: format!("nodes/{NODE}") };
        Ok(self.world.time.drive(client.get_node(request)).await?.into_inner())
    }

    /// True while nothing can come to its end.
    fn waits(&self) -> bool {
        self.offline || self.pending.iter().any(|(_, due)| matches!(due, Due::Clock(_) | Due::Words))
    }

    /// Waits until node and controller have nothing more to do.
    async fn settle(&mut self) -> Result<()> {
        let mut calm_since = None;
        self.last_event = self.world.time.passed();
        loop {
            self.turn().await?;
            let pi = PiState::read(&self.world.pi_dir())?;
            checks::bounds(self, &pi)?;
            let waits = self.waits();
            // A journal that cannot be written stays as it is: the controller has the last word from the node's memory.
            let settled = pi.is_settled() || pi.is_up && self.recorder.keeps_no_journal();
            let calm_now = settled && !waits && self.is_over().await;
            let now = self.world.time.passed();
            let since = *calm_since.get_or_insert(now);
            if !calm_now {
                calm_since = None;
            } else if now >= since + CALM {
                return Ok(());
            }
            if now > self.last_event + LIMIT && !waits {
                let executions = self.executions().await?;
                let states: Vec<&str> = executions.iter().map(|execution| execution.state().as_str_name()).collect();
                let node = self.node().await?;
                bail!("no end after {LIMIT:?}: {states:?}, connected {}, {pi:?}", node.connected);
            }
        }
    }

    async fn is_over(&mut self) -> bool {
        // A controller whose clock was wrong may need a while for certificates that are valid now.
        let (Ok(executions), Ok(node)) = (self.executions().await, self.node().await) else { return false };
        executions.iter().all(|execution| is_final(execution.state())) && node.connected
    }

    /// True if an operator ended an execution in this run.
    pub(crate) fn was_called_off(&self) -> bool {
        let calls_off = |event: &Event| event.calls_off();
        self.plan.iter().any(|(_, fault)| matches!(fault, crate::plan::Fault::Outside(event) if calls_off(event)))
    }
}

/// The state's name without its prefix.
pub(crate) fn word(state: State) -> &'static str {
    state.as_str_name().trim_start_matches("STATE_")
}
