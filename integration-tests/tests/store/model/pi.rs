//! A simulated node. Its journal and the decisions about it are the agent's real code, its session is lost with each
//! break, and a log of the real reboots and power-offs is read by the checks only.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use chrono::{DateTime, Utc};
use marco_controller::operation as theirs;
use marco_controller::operation::{ExecutionError, ExecutionState};
use marco_controller::sessions::{Acked, Command, Handle};
use marco_controller::store::{Assignment, Backlog, Release, ReportRow, SentLog};
use marco_proto::names::{ExecutionId, NodeId, VERDICT_DEADLINE};
use node_agent::job::{self, Action, Artifact, Failure, Found, Kind, MAX_TRIALS, Mode, Notice, Resume, State, phase};
use node_agent::journal::{Entry, Journal, JournalError};

use super::database::folder;
use super::torn::Torn;

/// A stream to a controller, with the state of the controller's session.
pub(super) struct Link {
    /// The controller: its place and its life.
    pub(super) controller: (usize, u32),
    pub(super) epoch: i64,
    pub(super) handle: Handle,
    pub(super) acked: Acked,
    /// Reports that the store could not take yet, oldest first.
    pub(super) unstored: VecDeque<ReportRow>,
    pub(super) backlog: Option<Backlog>,
    /// The power-off that ends the agent, once the agent has said so.
    pub(super) leaving: Option<ExecutionId>,
}

/// A message of a node that does not change its journal.
pub(super) enum Message {
    Report(ReportRow),
    NotHeld(ExecutionId, Option<ReportRow>),
}

pub(super) type Done<T = ()> = Result<T, String>;

pub(super) struct Pi {
    pub(super) id: NodeId,
    /// Serial number of its certificate.
    pub(super) certificate: String,
    boot: u32,
    /// Starts of its agent, also after reboots.
    starts: u32,
    pub(super) is_on: bool,
    pub(super) mode: Mode,
    /// Execution that installed the running system, and SHA-256 of its image. Empty: the first system.
    system: (String, String),
    /// System that the firmware starts without a trial boot.
    default: Mode,
    /// True if this process armed the job, so it knows that it has not given the command before.
    armed_here: bool,
    verifying_since: Option<DateTime<Utc>>,
    /// Bytes of the present phase that are done.
    bytes: u64,
    pub(super) link: Option<Link>,
    pub(super) journal: Journal,
    pub(super) folder: tempfile::TempDir,
    pub(super) torn: Torn,
    /// Version of the protocol that its agent speaks: half of the nodes have an agent of before.
    pub(super) protocol: u32,
    /// The verdict about the new system, since this start of the agent.
    verdict: Option<(ExecutionId, bool)>,
    /// Executions for which the machine went down. True: by a power-off.
    pub(super) log: Vec<(ExecutionId, bool)>,
    /// Updates whose new system became the default.
    pub(super) accepted: BTreeSet<ExecutionId>,
    /// Executions that failed on the node, with the reason.
    pub(super) failures: BTreeMap<ExecutionId, BTreeSet<String>>,
}

pub(super) fn wrong(error: JournalError) -> String {
    format!("the journal: {error:?}")
}

pub(super) fn named(entry: &Entry) -> ExecutionId {
    ExecutionId::parse(&entry.execution).unwrap()
}

fn action(action: theirs::Action) -> Action {
    let notice = |notice: theirs::Notice| Notice { delay: notice.delay, message: notice.message };
    let artifact = |artifact: theirs::FrozenArtifact| Artifact { id: artifact.id, sha256: artifact.sha256 };
    match action {
        theirs::Action::Reboot(asked) => Action::Reboot(notice(asked)),
        theirs::Action::PowerOff(asked) => Action::PowerOff(notice(asked)),
        theirs::Action::Update(update) => Action::Update(job::Update {
            image: update.image.map(artifact),
            bootcode: None,
            notice: notice(update.notice),
            discard_home: update.discard_home,
            raw: update.raw,
        }),
    }
}

/// True if the two reports tell the same state and the same proof of it.
fn is_about(one: &ReportRow, other: &ReportRow) -> bool {
    let of = |row: &ReportRow| (row.attempt, row.sequence, row.state, row.boot_id.clone(), row.release.clone());
    of(one) == of(other)
}

/// Maps a job's state to the reported one, as the agent does.
pub(super) fn reported(state: State) -> ExecutionState {
    match state {
        State::Accepted | State::Installing => ExecutionState::Running,
        State::Armed | State::Trial => ExecutionState::Rebooting,
        State::Verifying => ExecutionState::Verifying,
        State::Succeeded => ExecutionState::Succeeded,
        State::Failed => ExecutionState::Failed,
        State::RolledBack => ExecutionState::RolledBack,
        State::Cancelled => ExecutionState::Cancelled,
    }
}

impl Pi {
    pub(super) fn new(id: NodeId, certificate: String, protocol: u32) -> Self {
        let folder = folder();
        let journal = Journal::open(folder.path(), &format!("{id}-boot-1")).unwrap();
        Self {
            id,
            certificate,
            boot: 1,
            starts: 1,
            is_on: true,
            mode: Mode::Running,
            system: Default::default(),
            default: Mode::Running,
            armed_here: false,
            verifying_since: None,
            bytes: 0,
            link: None,
            journal,
            folder,
            torn: Torn::default(),
            protocol,
            verdict: None,
            log: Vec::new(),
            accepted: BTreeSet::new(),
            failures: BTreeMap::new(),
        }
    }

    pub(super) fn boot_id(&self) -> String {
        format!("{}-boot-{}", self.id, self.boot)
    }

    pub(super) fn instance(&self) -> String {
        format!("{}-{}", self.id, self.starts)
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.journal.entries().iter().cloned().collect()
    }

    fn entry(&self, id: &ExecutionId) -> Option<Entry> {
        self.journal.entries().get(&id.name()).cloned()
    }

    pub(super) fn unfinished(&self) -> Option<Entry> {
        self.journal.entries().unfinished().cloned()
    }

    /// Reports of a Hello: all entries but ends that are acknowledged.
    pub(super) fn listed(&self) -> Vec<ReportRow> {
        let entries = self.entries();
        entries
            .iter()
            .filter(|entry| !(entry.state.is_final() && entry.is_acked()))
            .map(|entry| self.report(entry))
            .collect()
    }

    /// Reports that the node has to send in a session: of each entry that is not acknowledged.
    pub(super) fn unsaid(&self) -> Vec<ReportRow> {
        self.entries().iter().filter(|entry| !entry.is_acked()).map(|entry| self.report(entry)).collect()
    }

    /// True if the node has taken the acknowledgement of a report, or has gone on since.
    pub(super) fn is_acked(&self, id: &ExecutionId, attempt: u32, sequence: u64) -> bool {
        self.entry(id).is_none_or(|entry| (entry.attempt, entry.sequence) != (attempt, sequence) || entry.is_acked())
    }

    /// Takes the acknowledgement of a report. An agent of protocol 1 is told the sequence only.
    pub(super) async fn acknowledged(&mut self, report: &ReportRow, sequence: u64, now: DateTime<Utc>) -> Done {
        // Each acknowledgement answers a Hello or comes after the answer to it.
        self.heard().await?;
        let Some(entry) = self.entry(&report.execution) else { return Ok(()) };
        let is_named = match self.protocol {
            1 => sequence >= entry.sequence,
            _ => is_about(report, &self.report(&entry)),
        };
        if is_named {
            let now = now.timestamp_micros();
            self.journal.ack(&entry.execution, entry.attempt, entry.sequence, now).await.map_err(wrong)?;
        }
        Ok(())
    }

    /// Takes the verdict about a new system.
    pub(super) fn judged(&mut self, report: &ReportRow, accepted: bool) {
        let entry = self.entry(&report.execution).filter(|entry| entry.state == State::Verifying);
        if entry.is_some_and(|entry| is_about(report, &self.report(&entry))) {
            self.verdict = Some((report.execution.clone(), accepted));
        }
    }

    /// Notes that a controller has answered the Hello.
    async fn heard(&mut self) -> Done {
        if self.journal.is_lost() { self.journal.loss_told().await.map_err(wrong) } else { Ok(()) }
    }

    /// True if the Hello says that the journal was lost.
    pub(super) fn is_lost(&self) -> bool {
        self.journal.is_lost()
    }

    pub(super) fn report(&self, entry: &Entry) -> ReportRow {
        let down = match entry.action.kind() {
            Kind::PowerOff => phase::POWERING_OFF,
            Kind::Update => phase::TRIAL_BOOT,
            Kind::Reboot | Kind::Unknown => phase::RESTARTING,
        };
        let doing = match entry.state {
            State::Accepted if entry.action.kind() == Kind::Update => phase::DOWNLOADING_BOOTCODE,
            State::Accepted => phase::NOTICE,
            State::Armed | State::Trial => down,
            State::Installing => phase::UNPACKING,
            State::Verifying => phase::VERDICT,
            _ => "",
        };
        ReportRow {
            execution: named(entry),
            attempt: entry.attempt,
            sequence: entry.sequence,
            state: reported(entry.state),
            phase: doing.to_owned(),
            bytes_done: if entry.state.is_final() { 0 } else { self.bytes },
            bytes_total: 0,
            error: entry.error.as_ref().map(|error| ExecutionError::new(&error.reason, error.message.clone())),
            boot_id: self.boot_id(),
            accept_boot_id: entry.accept_boot_id.clone(),
            release: entry.release.as_ref().map(|release| Release {
                execution: release.execution.clone(),
                image_sha256: release.image_sha256.clone(),
                boot_sha256: release.boot_sha256.clone(),
            }),
            cancel_refused: entry.cancel_refused,
            log: SentLog::default(),
            journal_lost: entry.torn,
        }
    }

    /// Answers for an execution, even if its state is acknowledged.
    fn answer(&self, id: &ExecutionId) -> Message {
        match self.entry(id) {
            Some(entry) => Message::Report(self.report(&entry)),
            None => Message::NotHeld(id.clone(), None),
        }
    }

    /// Handles a command. Returns the answer, if there is one.
    pub(super) async fn hear(&mut self, command: Command) -> Done<Option<Message>> {
        self.heard().await?;
        match command {
            Command::Assign(assignment) => {
                let Assignment { execution: id, attempt, action: asked, .. } = *assignment;
                match self.journal.accept(&id.name(), attempt, action(asked)).await {
                    Ok(_) => Ok(None),
                    // The controller lost later deliveries, such as by a restored backup. The node tells what it knows.
                    Err(JournalError::Stale { .. }) => Ok(Some(self.answer(&id))),
                    Err(JournalError::Busy(other)) => {
                        let busy_with = self.journal.entries().get(&other).map(|entry| self.report(entry));
                        Ok(Some(Message::NotHeld(id, busy_with)))
                    }
                    Err(error) => Err(wrong(error)),
                }
            }
            Command::Cancel(id) => self.journal.request_cancel(&id.name()).await.map(|()| None).map_err(wrong),
            Command::Query(id) => Ok(Some(self.answer(&id))),
        }
    }

    /// Advances the bytes of the phase.
    pub(super) fn move_bytes(&mut self, by: u8) {
        self.bytes += u64::from(by);
    }

    fn decide(&self, entry: &Entry) -> Resume {
        job::resume(Found {
            kind: entry.action.kind(),
            state: entry.state,
            mode: self.mode,
            same_boot: entry.boot_id == self.boot_id(),
            release_is_ours: self.system.0 == entry.execution,
            torn: entry.torn,
        })
    }

    async fn give_up(&mut self, entry: &Entry, reason: &str) -> Done {
        // More than one: a torn journal may end the same job again, for another reason.
        self.failures.entry(named(entry)).or_default().insert(reason.to_owned());
        self.journal.fail(&entry.execution, Failure::new(reason, "it cannot")).await.map_err(wrong)
    }

    /// Does the next step of the job. Returns the execution for which the machine goes down, if it does.
    pub(super) async fn work(&mut self, now: DateTime<Utc>) -> Done<Option<ExecutionId>> {
        let Some(entry) = self.unfinished() else { return Ok(None) };
        self.bytes = 0;
        let (name, kind) = (entry.execution.as_str(), entry.action.kind());
        match self.decide(&entry) {
            // This process armed it, so the command has not been given yet. `resume` cannot know that: it decides for a
            // process that has just started.
            _ if entry.state == State::Armed && self.armed_here => return Ok(Some(self.go_down(&entry))),
            Resume::GoDown | Resume::TryBoot => return Ok(Some(self.go_down(&entry))),
            Resume::Begin => {
                let begun = match (kind, self.mode) {
                    (Kind::Update, Mode::Installer) => self.journal.install(name).await,
                    (_, Mode::Installer) => {
                        return self.give_up(&entry, "INSTALLER_TAKES_ONLY_IMAGES").await.map(|()| None);
                    }
                    (_, Mode::Running) => self.journal.arm(name).await,
                };
                match begun {
                    // An installer becomes the default before it empties the root, so that a power cut leads back to
                    // it.
                    Ok(()) if self.mode == Mode::Installer => self.default = Mode::Installer,
                    Ok(()) => self.armed_here = true,
                    Err(JournalError::CancelRequested) => self.journal.cancelled(name).await.map_err(wrong)?,
                    Err(error) => return Err(wrong(error)),
                }
            }
            Resume::Install if entry.state == State::Installing => self.journal.try_boot(name).await.map_err(wrong)?,
            Resume::Install => {
                self.default = Mode::Installer;
                self.journal.install(name).await.map_err(wrong)?;
            }
            Resume::AwaitVerdict if self.verdict_about(&entry) == Some(false) => return Ok(Some(self.go_down(&entry))),
            Resume::AwaitVerdict if self.verdict_about(&entry) == Some(true) => {
                self.default = Mode::Running;
                self.accepted.insert(named(&entry));
                self.journal.succeed(name).await.map_err(wrong)?;
            }
            // No verdict in time: the restart leads to the default, which is still the installer.
            Resume::AwaitVerdict
                if self
                    .verifying_since
                    .is_none_or(|since| (now - since).to_std().is_ok_and(|waited| waited > VERDICT_DEADLINE)) =>
            {
                return Ok(Some(self.go_down(&entry)));
            }
            Resume::AwaitVerdict => {}
            _ => self.settle(now).await?,
        }
        Ok(None)
    }

    /// The verdict about the job's system. In protocol 1 it is the acknowledgement of VERIFYING.
    fn verdict_about(&self, entry: &Entry) -> Option<bool> {
        match self.protocol {
            1 => entry.is_acked().then_some(true),
            _ => self.verdict.as_ref().filter(|(id, _)| *id == named(entry)).map(|(_, accepted)| *accepted),
        }
    }

    fn go_down(&mut self, entry: &Entry) -> ExecutionId {
        self.is_on = false;
        self.note_down(entry);
        named(entry)
    }

    /// Logs the action of an armed machine that goes down. A power cut counts too: the machine comes back under a new
    /// boot id, so the job is done either way.
    fn note_down(&mut self, entry: &Entry) {
        if entry.state == State::Armed && self.mode == Mode::Running {
            self.log.push((named(entry), entry.action.kind() == Kind::PowerOff));
        }
        self.note_forgotten();
    }

    /// A job that was armed before its journal was torn is done by a restart, too.
    fn note_forgotten(&mut self) {
        if let Some((id, off)) = self.torn.armed.take()
            && self.log.iter().all(|(done, _)| *done != id)
        {
            self.log.push((id, off));
        }
    }

    pub(super) fn cut_power(&mut self) {
        if let Some(entry) = self.unfinished() {
            self.note_down(&entry);
        }
        self.note_forgotten();
        self.is_on = false;
    }

    /// Fails the job, if it is accepted or installing.
    pub(super) async fn fail(&mut self) -> Done {
        match self.unfinished() {
            Some(entry) if self.is_on && matches!(entry.state, State::Accepted | State::Installing) => {
                self.give_up(&entry, "CANNOT").await
            }
            _ => Ok(()),
        }
    }

    /// Boots the installer, the previous system, or the new one. `new_system`: the trial boot succeeds.
    pub(super) async fn boot(&mut self, new_system: bool, now: DateTime<Utc>) -> Done {
        if self.is_on {
            return Ok(());
        }
        (self.is_on, self.boot) = (true, self.boot + 1);
        let before = (self.mode, self.system.clone());
        let update = self.unfinished().filter(|entry| entry.action.kind() == Kind::Update);
        self.mode = match update {
            // A technician writes a system onto a card whose installation failed. Otherwise the node would never
            // return.
            None => {
                self.default = Mode::Running;
                Mode::Running
            }
            Some(entry) if entry.state == State::Armed && self.mode == Mode::Running && new_system => Mode::Installer,
            Some(entry) if entry.state == State::Trial && new_system => {
                let Action::Update(update) = &entry.action else { return Err("no update".to_owned()) };
                let image = update.image.as_ref().map(|image| image.sha256.clone()).unwrap_or_default();
                self.system = (entry.execution.clone(), image);
                Mode::Running
            }
            Some(_) => self.default,
        };
        // Each system has a journal of its own, so no copy of the one before can come back.
        if before != (self.mode, self.system.clone()) {
            self.torn.copies.clear();
            self.remember();
        }
        self.start(now).await
    }

    /// Kills the agent and starts it again.
    pub(super) async fn restart(&mut self, now: DateTime<Utc>) -> Done {
        if self.is_on { self.start(now).await } else { Ok(()) }
    }

    async fn start(&mut self, now: DateTime<Utc>) -> Done {
        self.starts += 1;
        (self.armed_here, self.bytes, self.verdict) = (false, 0, None);
        // Read from the disk again: anything that the agent did not fsync is lost with the process.
        self.journal = Journal::open(self.folder.path(), &self.boot_id()).map_err(wrong)?;
        if self.mode == Mode::Installer {
            self.adopt().await?;
        }
        self.settle(now).await
    }

    /// Draws the conclusions that need no controller, as an agent does at its start.
    async fn settle(&mut self, now: DateTime<Utc>) -> Done {
        while let Some(entry) = self.unfinished() {
            let name = entry.execution.as_str();
            match self.decide(&entry) {
                Resume::Succeed => self.journal.succeed(name).await.map_err(wrong)?,
                Resume::Fail(reason) => self.give_up(&entry, reason).await?,
                Resume::RollBack => {
                    let why = Failure::new("OLD_SYSTEM_CAME_BACK", "it came back");
                    self.journal.roll_back(name, why).await.map_err(wrong)?;
                }
                Resume::TrialFailed if entry.trials + 1 >= MAX_TRIALS => {
                    self.give_up(&entry, "IMAGE_DID_NOT_COME_UP").await?;
                }
                Resume::TrialFailed => self.journal.trial_failed(name).await.map_err(wrong)?,
                Resume::Verify => {
                    let (execution, image_sha256) = self.system.clone();
                    let release = job::Release { execution, image_sha256, boot_sha256: String::new() };
                    self.verifying_since = Some(now);
                    self.journal.verify(name, release).await.map_err(wrong)?;
                }
                _ => break,
            }
        }
        Ok(())
    }
}
