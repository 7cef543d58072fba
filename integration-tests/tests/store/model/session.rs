//! Sessions, from the controller's side and the agent's: acknowledgements, waiting reports, and ends.

use std::collections::VecDeque;

use marco_controller::operation::{ExecutionState, Greeting, NodeMode};
use marco_controller::sessions::{Acked, Command};
use marco_controller::store::{Hello, ProgressRow, ReportOutcome, ReportRow, SessionOutcome};
use marco_proto::names::{ExecutionId, NodeId};
use node_agent::job::Mode;

use super::pi::{Link, Message};
use super::world::{Outcome, World, controller_id};
use crate::support::{hello, serial_of};

/// The end of a session that its controller still has to store, with the agent's last words.
pub(super) struct Ending {
    pub(super) controller: (usize, u32),
    node: NodeId,
    epoch: i64,
    leaving: Option<ExecutionId>,
}

/// Queues a report. Newer progress of the same state replaces older, as in `api/agent/unstored.rs`.
fn add(unstored: &mut VecDeque<ReportRow>, report: ReportRow) {
    let key = |row: &ReportRow| (row.execution.clone(), row.attempt, row.sequence, row.state, row.cancel_refused);
    match unstored.iter_mut().find(|other| key(other) == key(&report)) {
        Some(other) => *other = report,
        None => unstored.push_back(report),
    }
}

impl World {
    pub(super) fn is_live(&self, link: &Link) -> bool {
        let controller = &self.controllers[link.controller.0];
        controller.is_alive && controller.life == link.controller.1
    }

    fn has_live_link(&self, number: usize) -> bool {
        self.pis[number].link.as_ref().is_some_and(|link| self.is_live(link))
    }

    /// Ends the stream. Its controller has to store the end, if it is alive.
    fn drop_link(&mut self, number: usize) {
        let Some(link) = self.pis[number].link.take() else { return };
        if self.is_live(&link) {
            let node = self.pis[number].id.clone();
            self.ends.push(Ending { controller: link.controller, node, epoch: link.epoch, leaving: link.leaving });
        }
    }

    pub(super) async fn cut(&mut self, number: usize) -> Outcome {
        self.drop_link(number);
        self.store_ends().await
    }

    /// Stores the ends of sessions. Those that the database did not take wait for the next call.
    pub(super) async fn store_ends(&mut self) -> Outcome {
        let now = self.now();
        for end in std::mem::take(&mut self.ends) {
            let controller = &self.controllers[end.controller.0];
            controller.sessions.close(&end.node, end.epoch);
            let store = controller.store.clone();
            let said = match &end.leaving {
                Some(id) => store.say_goodbye(id, end.epoch, now).await.map(|_| ()),
                None => Ok(()),
            };
            let ended = match said {
                Ok(()) => store.end_session(&end.node, end.epoch, now).await.map(|_| ()),
                Err(error) => Err(error),
            };
            if self.heard("the end of a session", ended)?.is_none() {
                self.ends.push(end);
            }
        }
        Ok(())
    }

    /// Opens a session. `silent`: the controller has not noticed the end of the previous stream, and stores it later.
    pub(super) async fn connect(&mut self, number: usize, place: usize, silent: bool) -> Outcome {
        if !self.pis[number].is_on || !self.controllers[place].is_alive {
            return Ok(());
        }
        self.drop_link(number);
        if !silent {
            self.store_ends().await?;
        }
        let (now, life) = (self.now(), self.controllers[place].life);
        let (node, boot_id) = (self.pis[number].id.clone(), self.pis[number].boot_id());
        let mut said = hello(&boot_id, &serial_of(node.as_str()), now);
        said.controller_id = controller_id((place, life));
        // The key of its enrolment: a session with any other key is refused.
        said.key_sha256 = format!("key-{node}");
        said.instance = self.pis[number].instance();
        said.mode = match self.pis[number].mode {
            Mode::Running => NodeMode::Running,
            Mode::Installer => NodeMode::Installer,
        };
        let (store, sessions) = (self.controllers[place].store.clone(), self.controllers[place].sessions.clone());
        let begun = store.begin_session(&node, &said, now).await;
        let epoch = match self.heard("a hello", begun)? {
            Some(SessionOutcome::Begun { epoch, .. }) => epoch,
            // A clock that went back makes this connection look older than the one before.
            None | Some(SessionOutcome::Superseded) => return Ok(()),
            other => return Err(format!("{node} is not let in: {other:?}")),
        };
        let Some(handle) = sessions.open(&node, epoch, &self.pis[number].certificate) else {
            return Err("no place in the registry".to_owned());
        };
        self.counts.add("sessions");
        self.pis[number].link = Some(Link {
            controller: (place, life),
            epoch,
            handle,
            acked: Acked::default(),
            unstored: VecDeque::new(),
            backlog: None,
            leaving: None,
        });
        let listed = self.pis[number].listed();
        let journal_lost = self.pis[number].is_lost();
        let greeting = Greeting { mode: said.mode, boot_id: &boot_id, answers_queries: true, journal_lost };
        let reconciled = store.reconcile(&node, epoch, Hello { greeting, listed: &listed }, now).await;
        let Some(answer) = self.heard("a hello", reconciled)?.filter(|answer| answer.holder) else {
            // As in the controller, a Hello that cannot be reconciled ends the session.
            return self.cut(number).await;
        };
        sessions.set_ready(&node, epoch, true);
        for execution in answer.cancels {
            self.tell_node(number, Command::Cancel(execution)).await?;
        }
        for (execution, sequence) in answer.acks {
            if let Some(report) = listed.iter().find(|report| report.execution == execution) {
                self.acknowledge(number, report, sequence).await?;
            }
        }
        for (execution, _) in answer.rejected {
            if let Some(report) = listed.iter().find(|report| report.execution == execution) {
                self.judge(number, report, false);
            }
        }
        for assignment in answer.assigns {
            self.tell_node(number, Command::Assign(Box::new(assignment))).await?;
        }
        for execution in answer.queries {
            self.counts.add("queries");
            self.tell_node(number, Command::Query(execution)).await?;
        }
        Ok(())
    }

    /// Delivers an acknowledgement to the node.
    async fn acknowledge(&mut self, number: usize, report: &ReportRow, sequence: u64) -> Outcome {
        if let Some(link) = &self.pis[number].link {
            link.acked.add(&report.execution, report.attempt, sequence);
        }
        self.counts.add("acknowledged");
        // Attempt 0 is the cancel of an execution that the node never had. That is no end of it.
        if report.state.is_final() && report.attempt > 0 {
            self.acked.insert(report.execution.clone(), report.state);
        }
        let now = self.now();
        self.pis[number].acknowledged(report, sequence, now).await?;
        if report.state == ExecutionState::Verifying {
            self.judge(number, report, true);
        }
        Ok(())
    }

    /// Delivers a verdict to a node whose agent knows them.
    fn judge(&mut self, number: usize, report: &ReportRow, accepted: bool) {
        if self.pis[number].protocol > 1 {
            self.counts.add(if accepted { "verdicts" } else { "refusals" });
            self.pis[number].judged(report, accepted);
        }
    }

    /// Delivers a command to the node, and the node's answer to its controller.
    async fn tell_node(&mut self, number: usize, command: Command) -> Outcome {
        let answer = self.pis[number].hear(command).await?;
        match answer {
            None => Ok(()),
            // Boxed, because an answer may cause another command, and async recursion needs a bound size.
            Some(message) => Box::pin(self.told(number, message)).await,
        }
    }

    /// Delivers a message to the controller.
    async fn told(&mut self, number: usize, message: Message) -> Outcome {
        if !self.has_live_link(number) {
            return Ok(());
        }
        let now = self.now();
        match message {
            Message::Report(report) => {
                if let Some(link) = &mut self.pis[number].link {
                    add(&mut link.unstored, report);
                }
                self.store_what_waits(number).await
            }
            Message::NotHeld(execution, busy_with) => {
                let Some(link) = &self.pis[number].link else { return Ok(()) };
                let (place, epoch) = (link.controller.0, link.epoch);
                self.counts.add("not held");
                let told = self.controllers[place].store.not_held(&execution, busy_with.as_ref(), epoch, now).await;
                match self.heard("not held", told)? {
                    Some(false) => self.cut(number).await,
                    // A lost answer needs no retry: the dispatcher asks the node again.
                    Some(true) | None => Ok(()),
                }
            }
        }
    }

    /// Stores waiting reports, oldest first. If the store does not answer, the rest waits.
    pub(super) async fn store_what_waits(&mut self, number: usize) -> Outcome {
        let now = self.now();
        while self.has_live_link(number) {
            let Some(link) = &mut self.pis[number].link else { break };
            let Some(row) = link.unstored.front().cloned() else {
                link.backlog = None;
                break;
            };
            let (place, epoch, node) = (link.controller.0, link.epoch, row.execution.node.clone());
            let store = self.controllers[place].store.clone();
            let applied = store.apply_report(&node, epoch, &row, now).await;
            match self.heard("a report", applied)? {
                Some(outcome) => {
                    if let Some(link) = &mut self.pis[number].link {
                        link.unstored.pop_front();
                    }
                    self.answer(number, row, outcome).await?;
                }
                None => {
                    self.counts.add("reports that waited");
                    if let Some(link) = &mut self.pis[number].link {
                        link.backlog.get_or_insert_with(|| store.backlog());
                    }
                    break;
                }
            }
        }
        Ok(())
    }

    /// Answers a report, as a session does.
    async fn answer(&mut self, number: usize, row: ReportRow, outcome: ReportOutcome) -> Outcome {
        let Some(link) = &self.pis[number].link else { return Ok(()) };
        let place = link.controller.0;
        let before = link.acked.has(&row.execution, row.attempt, row.sequence);
        if outcome.acknowledges(before) {
            self.acknowledge(number, &row, row.sequence).await?;
        }
        match outcome {
            ReportOutcome::Acked | ReportOutcome::Progress | ReportOutcome::Unknown => {
                // No other message tells the node that its report is stored, and a new system waits for just that.
                if !self.pis[number].is_acked(&row.execution, row.attempt, row.sequence) {
                    let (execution, state) = (&row.execution, row.state);
                    return Err(format!("{execution}: {state} is stored and is not acknowledged ({outcome:?})"));
                }
                if outcome == ReportOutcome::Progress {
                    self.counts.add("progress");
                    self.controllers[place].progress.insert(row.execution.clone(), row.into());
                }
                Ok(())
            }
            ReportOutcome::Stale(assignment) => self.tell_node(number, Command::Assign(assignment)).await,
            ReportOutcome::NotHolder => self.cut(number).await,
            ReportOutcome::Conflict { .. } => {
                self.counts.add("conflicts");
                Ok(())
            }
            ReportOutcome::Rejected(_) => {
                self.judge(number, &row, false);
                Ok(())
            }
            ReportOutcome::Refused(_) => {
                self.counts.add("refused");
                Ok(())
            }
        }
    }

    /// Delivers the controller's commands. A session that the controller ended is cut.
    pub(super) async fn read(&mut self, number: usize) -> Outcome {
        let Some(link) = &mut self.pis[number].link else { return Ok(()) };
        let mut commands = Vec::new();
        while let Ok(command) = link.handle.commands.try_recv() {
            commands.push(command);
        }
        // An error of `has_changed` means that the registry has dropped the session.
        let ended = link.handle.end.borrow().is_some() || link.handle.end.has_changed().is_err();
        self.counts.add_many("deliveries", commands.len());
        for command in commands {
            self.tell_node(number, command).await?;
        }
        if ended { self.cut(number).await } else { Ok(()) }
    }

    pub(super) async fn work(&mut self, number: usize) -> Outcome {
        let now = self.now();
        if !self.pis[number].is_on {
            return Ok(());
        }
        let accepted = self.pis[number].accepted.len();
        let down = self.pis[number].work(now).await?;
        self.counts.add_many("updates accepted", self.pis[number].accepted.len() - accepted);
        let Some(id) = down else { return Ok(()) };
        let is_off = self.pis[number].log.last() == Some(&(id.clone(), true));
        if is_off && self.has_live_link(number) {
            // The shutdown sends the agent SIGTERM, and the agent then says its last words.
            self.say_all(number).await?;
            if let Some(link) = &mut self.pis[number].link {
                link.leaving = Some(id);
            }
        }
        self.cut(number).await
    }

    pub(super) async fn cut_power(&mut self, number: usize) -> Outcome {
        if self.pis[number].is_on {
            self.counts.add("power cuts");
            self.pis[number].cut_power();
        }
        self.cut(number).await
    }

    pub(super) async fn restart(&mut self, number: usize) -> Outcome {
        let now = self.now();
        self.cut(number).await?;
        self.counts.add("agents restarted");
        self.pis[number].restart(now).await
    }

    pub(super) async fn tear(&mut self, number: usize, lost: usize) -> Outcome {
        let now = self.now();
        self.cut(number).await?;
        self.counts.add("journals torn");
        self.pis[number].tear(lost, now).await
    }

    /// Sends a report of each entry that is not acknowledged.
    pub(super) async fn say_all(&mut self, number: usize) -> Outcome {
        self.store_what_waits(number).await?;
        for report in self.pis[number].unsaid() {
            self.told(number, Message::Report(report)).await?;
        }
        Ok(())
    }

    pub(super) async fn say(&mut self, number: usize, lost: bool) -> Outcome {
        if !self.has_live_link(number) {
            return Ok(());
        }
        self.store_what_waits(number).await?;
        let Some(report) = self.pis[number].unsaid().into_iter().next() else { return Ok(()) };
        if !lost {
            return self.told(number, Message::Report(report)).await;
        }
        // The report is stored, but the stream breaks before the acknowledgement. The node has to repeat it.
        let Some(link) = &self.pis[number].link else { return Ok(()) };
        let (place, epoch, now) = (link.controller.0, link.epoch, self.now());
        let applied = self.controllers[place].store.apply_report(&self.pis[number].id, epoch, &report, now).await;
        self.heard("a report", applied)?;
        self.counts.add("said again");
        self.cut(number).await
    }

    /// Sends progress, even if the state is acknowledged.
    pub(super) async fn tell(&mut self, number: usize, bytes: u8) -> Outcome {
        self.pis[number].move_bytes(bytes);
        match self.pis[number].unfinished() {
            Some(entry) => {
                let report = self.pis[number].report(&entry);
                self.told(number, Message::Report(report)).await
            }
            None => Ok(()),
        }
    }

    pub(super) async fn lie(&mut self, number: usize, by: u32) -> Outcome {
        let (Some(link), Some(entry)) = (&self.pis[number].link, self.pis[number].unfinished()) else { return Ok(()) };
        let (place, epoch, now) = (link.controller.0, link.epoch, self.now());
        if !self.is_live(link) {
            return Ok(());
        }
        let report = self.pis[number].report(&entry);
        let report = ReportRow { attempt: report.attempt.saturating_add(by), ..report };
        // A lie may cost the node its execution, so the checks allow operators to give that up.
        self.liars.insert(self.pis[number].id.clone());
        self.counts.add("lies");
        let applied = self.controllers[place].store.apply_report(&self.pis[number].id, epoch, &report, now).await;
        self.heard("a lie", applied).map(|_| ())
    }

    /// Writes the progress that waits in a controller.
    pub(super) async fn flush_progress(&mut self, place: usize) -> Outcome {
        let (now, rows) = (self.now(), std::mem::take(&mut self.controllers[place].progress));
        let all: Vec<ProgressRow> = rows.values().cloned().collect();
        let flushed = self.controllers[place].store.flush_progress(&all, now).await;
        // Kept for the next flush, as in the controller: progress postpones deadlines.
        if self.heard("progress", flushed)?.is_none() {
            self.controllers[place].progress = rows;
        }
        Ok(())
    }
}
