//! The stream to a controller. It says hello from the journal, reports each state of the journal until it is
//! acknowledged, and journals what the controller asks for. It does nothing else; a job goes on without it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use marco_proto::names::{FIRST_PROTOCOL, SERVED_PROTOCOLS};
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::{ConnectRequest, ConnectResponse, Welcome, connect_request, connect_response};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::backoff;
use crate::cause::chain;
use crate::discovery::Controllers;
use crate::health::Condition;
use crate::identity::{Board, Identity, IdentityError, Purpose};
use crate::job::{Labels, Mode};
use crate::journal::{Entries, Entry, Journal, JournalError, Progress};
use crate::step;
use crate::system::Refusal;

mod answers;
mod error;
mod log;
mod stored;
mod wire;

use error::SessionError;
pub use log::KeptLog;

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Shortest session that shows a controller to be well.
const STEADY: Duration = Duration::from_secs(10);
/// Failed rounds over the known controllers, after which the network is asked for others.
const SEARCH_AFTER: u32 = 2;
/// Longest pause that a controller may ask for.
const MAX_ASKED_PAUSE: Duration = Duration::from_secs(60 * 60);
/// Longest wait from Hello to Welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait to hand a message to the connection: the other end reads no more.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// A report that was not acknowledged is sent again after this time.
const RESEND_AFTER: Duration = Duration::from_secs(30);
/// Longest wait at shutdown for the controller to end the session.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Shortest time between two progress reports if the controller names none.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
const MIN_PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// Most messages that wait for the connection.
const OUTBOX: usize = 16;

/// Layout of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Not known.
    Unknown,
    /// One boot partition.
    Single,
    /// A recovery partition, and the system's own.
    Resident,
}

/// A node's description of itself for its Hello.
#[derive(Debug, Clone)]
pub struct Node {
    /// Id of this boot.
    pub boot_id: String,
    /// Random id of this start of the agent, by which the controller tells clones apart; empty: no randomness.
    pub instance: String,
    /// Role of the agent.
    pub mode: Mode,
    /// Model, serial number and other facts of the hardware.
    pub board: Board,
    /// Architecture of the kernel, as `uname -m` prints it.
    pub kernel_arch: String,
    /// Architecture that this agent was built for.
    pub userspace_arch: String,
    /// Memory page size in bytes.
    pub page_size: u32,
    /// Release of the kernel, as `uname -r` prints it.
    pub kernel_release: String,
    /// PRETTY_NAME of `/etc/os-release`.
    pub os: String,
    /// Layout of the card.
    pub layout: Layout,
    /// SHA-256 of the image that runs; empty when not known.
    pub image_sha256: String,
    /// SHA-256 of the boot files that run; empty when they are the image's or not known.
    pub boot_sha256: String,
    /// What the trial of a new system lacks here, as a sentence; empty: nothing is known to be missing.
    pub trial_lacks: String,
    /// In the installer: the card holds no system.
    pub card_is_blank: bool,
    /// In the installer: the image that a file of the 2015 system on the card names; empty: none.
    pub image: String,
}

/// Keeps a session open.
#[derive(Debug)]
pub struct Session {
    /// Addresses of controllers, in the order to try.
    pub controllers: Arc<Controllers>,
    /// Key and certificates of the node.
    pub identity: Arc<Identity>,
    /// The node's jobs: everything that is reported stands here first.
    pub journal: Arc<Journal>,
    /// Facts for the Hello.
    pub node: Node,
    /// Reason to refuse an update at this moment; `None`: the node would take one.
    pub refusal: watch::Receiver<Option<Refusal>>,
    /// Source of the lines that go with the report of a job that did not succeed.
    pub log: KeptLog,
    /// Receives the node's labels from each Welcome and Assign; `None` before the first.
    pub labels: watch::Sender<Option<Labels>>,
}

/// End of a session.
struct Ended {
    /// The controller had said Welcome.
    welcomed: bool,
    /// Shortest pause until the next session, as the controller asked for.
    stay_away: Duration,
    /// `None`: one of the two sides ended it in order.
    error: Option<SessionError>,
}

impl Ended {
    fn before_welcome(error: SessionError) -> Self {
        Self { welcomed: false, stay_away: Duration::ZERO, error: Some(error) }
    }
}

impl Session {
    /// Keeps one session open until `stop`, then says good-bye. Returns an error if every named controller is of
    /// another CA than the node, none has ever said Welcome, and no job is unfinished. The installer never gets one.
    pub async fn run(&self, stop: CancellationToken) -> Option<IdentityError> {
        let mut failures: u32 = 0;
        let mut ever_welcomed = false;
        while !stop.is_cancelled() {
            let mut ended = Ended::before_welcome(SessionError::NoController);
            let mut all_foreign = true;
            let begun = Instant::now();
            for address in self.controllers.in_order() {
                // Cancel-safe: everything that a half-open connection was to report is in the journal.
                ended = tokio::select! {
                    () = stop.cancelled() => return None,
                    connected = self.identity.connect(&address, Purpose::Session) => match connected {
                        Ok(channel) => self.talk(&address, channel, &stop).await,
                        Err(error) => Ended::before_welcome(SessionError::Connect(error)),
                    },
                };
                if ended.welcomed {
                    break;
                }
                all_foreign &= matches!(&ended.error, Some(SessionError::Connect(error)) if error.is_permanent());
                if let Some(error) = &ended.error {
                    tracing::info!(address, error = %chain(error), "controller did not take the session");
                    if matches!(error, SessionError::Status(status) if status.code() == tonic::Code::Unauthenticated) {
                        // A controller that lost its last commits may know only the certificate before this one.
                        self.identity.not_known();
                    }
                }
            }
            ever_welcomed |= ended.welcomed;
            // A node with work stays: it may be a new system that has to give up in time, or an installer that writes.
            let may_end = !ever_welcomed && self.node.mode == Mode::Running && self.controllers.are_named();
            if may_end
                && all_foreign
                && self.journal.entries().unfinished().is_none()
                && let Some(SessionError::Connect(error)) = ended.error
            {
                return Some(error);
            }
            // One that ends at once may do so each time: without a longer pause it would be opened forever, twice a second.
            let lasted = ended.welcomed && begun.elapsed() >= STEADY;
            failures = if lasted { 0 } else { failures.saturating_add(1) };
            // A controller that only restarts is back before the second try.
            if failures >= SEARCH_AFTER || self.controllers.in_order().is_empty() {
                let ca = self.identity.ca();
                // Cancel-safe: the next round asks again.
                tokio::select! {
                    () = stop.cancelled() => return None,
                    () = self.controllers.look_again(&ca) => {}
                }
            }
            if let Some(error) = ended.error.as_ref().filter(|_| ended.welcomed) {
                tracing::info!(error = %chain(error), "session lost");
            }
            let ceiling = backoff::doubled(FIRST_PAUSE, failures);
            let pause = backoff::full_jitter(ceiling.min(MAX_PAUSE)).max(ended.stay_away.min(MAX_ASKED_PAUSE));
            tokio::select! {
                () = stop.cancelled() => return None,
                () = tokio::time::sleep(pause) => {}
            }
        }
        None
    }

    /// Runs one session, from Hello to its end.
    async fn talk(&self, address: &str, channel: tonic::transport::Channel, stop: &CancellationToken) -> Ended {
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let (mut refusal, mut health) = (self.refusal.clone(), self.journal.health().changes());
        let facts = wire::Facts {
            node: &self.node,
            refusal: refusal.borrow_and_update().clone(),
            conditions: health.borrow_and_update().clone(),
            journal_lost: self.journal.is_lost(),
        };
        let entries = self.journal.entries();
        let mut hello = wire::hello(&facts, &entries, &self.journal.progress().borrow());
        self.add_logs(&entries, &mut hello.executions).await;
        let hello = ConnectRequest { message: Some(connect_request::Message::Hello(hello)) };
        if step::word("hello", self.journal.path()).is_err() || outbox.send(hello).await.is_err() {
            return Ended::before_welcome(SessionError::Stuck);
        }
        let mut client = AgentServiceClient::new(channel);
        let opening = async {
            let answers = client.connect(ReceiverStream::new(messages)).await.map_err(SessionError::from)?;
            let mut answers = answers.into_inner();
            match answers.message().await.map_err(SessionError::from)?.and_then(|answer| answer.message) {
                Some(connect_response::Message::Welcome(welcome)) => Ok(Ok((welcome, answers))),
                Some(connect_response::Message::Goodbye(goodbye)) => Ok(Err(goodbye)),
                _ => Err(SessionError::NoWelcome),
            }
        };
        let opened = tokio::select! {
            () = stop.cancelled() => return Ended { welcomed: false, stay_away: Duration::ZERO, error: None },
            opened = tokio::time::timeout(WELCOME_TIMEOUT, opening) => opened,
        };
        let (mut welcome, answers) = match opened {
            Ok(Ok(Ok(opened))) => opened,
            Ok(Ok(Err(goodbye))) => {
                tracing::info!(address, reason = %goodbye.reason, "controller says good-bye");
                let stay_away = wire::duration(goodbye.retry_delay.as_ref()).unwrap_or_default();
                return Ended { welcomed: false, stay_away, error: None };
            }
            Ok(Err(error)) => return Ended::before_welcome(error),
            Err(_) => return Ended::before_welcome(SessionError::NoWelcome),
        };
        // A controller that predates the field speaks the first version.
        welcome.protocol_version = welcome.protocol_version.max(FIRST_PROTOCOL);
        let protocol = welcome.protocol_version;
        if !SERVED_PROTOCOLS.contains(&protocol) {
            return Ended::before_welcome(SessionError::OtherProtocol(protocol));
        }
        // A controller knows the new key, so the pair that was kept for a power cut may go.
        self.identity.accepted();
        if let Some(time) = &welcome.time {
            self.identity.learn_time(wire::micros(time));
        }
        self.controllers.learn(address, &welcome.controllers);
        self.labels.send_replace(Some(welcome.labels.clone().into_iter().collect()));
        tracing::info!(address, session = %welcome.session, held = welcome.held, protocol, "session open");
        let mut open = Open::new(self, outbox, refusal, health, &welcome);
        let (stay_away, error) = match open.serve(answers, stop).await {
            Ok(stay_away) => (stay_away, None),
            Err(error) => (Duration::ZERO, Some(error)),
        };
        Ended { welcomed: true, stay_away, error }
    }
}

/// The last report of an execution in this session.
#[derive(Clone, PartialEq, Eq)]
struct Said {
    attempt: u32,
    sequence: u64,
    cancel_refused: bool,
}

impl Said {
    fn of(entry: &Entry) -> Self {
        Self { attempt: entry.attempt, sequence: entry.sequence, cancel_refused: entry.cancel_refused }
    }
}

/// An open session.
struct Open<'a> {
    session: &'a Session,
    /// Version of the protocol.
    protocol: u32,
    outbox: mpsc::Sender<ConnectRequest>,
    /// Marked as seen once the value was sent.
    refusal: watch::Receiver<Option<Refusal>>,
    /// The same for the node's ailments.
    health: watch::Receiver<Vec<Condition>>,
    progress_interval: Duration,
    said: HashMap<String, Said>,
    /// The last progress that was reported.
    told: Progress,
}

impl<'a> Open<'a> {
    fn new(
        session: &'a Session,
        outbox: mpsc::Sender<ConnectRequest>,
        refusal: watch::Receiver<Option<Refusal>>,
        health: watch::Receiver<Vec<Condition>>,
        welcome: &Welcome,
    ) -> Self {
        let asked = wire::duration(welcome.progress_interval.as_ref()).filter(|interval| !interval.is_zero());
        Self {
            session,
            protocol: welcome.protocol_version,
            outbox,
            refusal,
            health,
            progress_interval: asked.unwrap_or(PROGRESS_INTERVAL).max(MIN_PROGRESS_INTERVAL),
            said: HashMap::new(),
            told: Progress::default(),
        }
    }

    /// Serves the session until one side ends it. Returns the pause that the controller asks for.
    async fn serve(
        &mut self,
        mut answers: Streaming<ConnectResponse>,
        stop: &CancellationToken,
    ) -> Result<Duration, SessionError> {
        let journal = self.session.journal.clone();
        let mut changes = journal.changes();
        let mut progress = journal.progress();
        // Repeats the reports of the Hello, which has room for the log of a few jobs only.
        changes.mark_changed();
        let mut resend = tokio::time::interval_at(Instant::now() + RESEND_AFTER, RESEND_AFTER);
        let mut may_tell = Instant::now();
        let mut to_tell = true;
        loop {
            // Cancel-safe: each arm only waits, and an arrived event is handled to its end below.
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => Event::Stop,
                Ok(()) = changes.changed() => Event::Journal,
                answer = answers.message() => Event::Answer(Box::new(answer)),
                Ok(()) = progress.changed(), if !to_tell => Event::Progress,
                Ok(()) = self.refusal.changed() => Event::Facts,
                Ok(()) = self.health.changed() => Event::Facts,
                () = tokio::time::sleep_until(may_tell), if to_tell => Event::Tell,
                _ = resend.tick() => Event::Resend,
            };
            match event {
                Event::Stop => {
                    self.leave().await?;
                    self.close(answers).await;
                    return Ok(Duration::ZERO);
                }
                Event::Journal => {
                    let entries = changes.borrow_and_update().clone();
                    self.report(&entries).await?;
                }
                Event::Answer(answer) => match (*answer)?.and_then(|answer| answer.message) {
                    Some(connect_response::Message::Goodbye(goodbye)) => {
                        tracing::info!(reason = %goodbye.reason, "controller says good-bye");
                        return Ok(wire::duration(goodbye.retry_delay.as_ref()).unwrap_or_default());
                    }
                    Some(message) => {
                        self.hello_is_stored().await;
                        self.obey(message).await?;
                    }
                    None => return Ok(Duration::ZERO),
                },
                Event::Progress => to_tell = true,
                Event::Facts => self.tell_facts().await?,
                Event::Tell => {
                    to_tell = false;
                    let now = progress.borrow_and_update().clone();
                    if self.tell(now).await? {
                        may_tell = Instant::now() + self.progress_interval;
                    }
                }
                Event::Resend => {
                    // The controller may have died before it stored them.
                    self.said.clear();
                    self.report(&journal.entries()).await?;
                }
            }
        }
    }

    async fn obey(&mut self, message: connect_response::Message) -> Result<(), SessionError> {
        let journal = &self.session.journal;
        match message {
            connect_response::Message::Assign(mut assign) => {
                let attempt = assign.attempt;
                let labels = std::mem::take(&mut assign.labels);
                // The labels may have changed since the Welcome of a long session.
                self.session.labels.send_replace(Some(labels.into_iter().collect()));
                let Some((execution, action)) = wire::assignment(assign) else {
                    tracing::error!("assignment without an execution's name");
                    return Ok(());
                };
                match journal.accept(&execution, attempt, action).await {
                    Ok(accepted) => tracing::info!(execution, attempt, ?accepted, "assignment"),
                    // The controller's store has lost later deliveries: it is told the node's state.
                    Err(error @ JournalError::Stale { .. }) => {
                        tracing::warn!(execution, attempt, error = %error, "assignment refused");
                        self.answer(&execution).await?;
                    }
                    Err(JournalError::Busy(other)) => {
                        tracing::warn!(execution, attempt, other, "assignment refused: the node is at work");
                        self.say_busy(execution, &other).await?;
                    }
                    // Ends as FAILED with the reason: otherwise the controller would assign it several times a second.
                    Err(error @ JournalError::Io { .. }) => {
                        tracing::error!(execution, attempt, error = %chain(&error), "assignment cannot be journalled");
                        self.say_not_journalled(&execution, attempt, &error).await?;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            connect_response::Message::Cancel(cancel) => {
                let Some(execution) = wire::execution(&cancel.execution) else {
                    tracing::error!("cancellation without an execution's name");
                    return Ok(());
                };
                tracing::info!(execution, "cancel asked for");
                journal.request_cancel(&execution).await?;
            }
            connect_response::Message::Query(query) => {
                let Some(execution) = wire::execution(&query.execution) else {
                    tracing::error!("query without an execution's name");
                    return Ok(());
                };
                self.answer(&execution).await?;
            }
            connect_response::Message::Ack(ack) => self.acknowledged(ack).await?,
            connect_response::Message::Verdict(verdict) => self.judged(verdict),
            connect_response::Message::Welcome(_) | connect_response::Message::Goodbye(_) => {
                tracing::warn!("message out of its place");
            }
        }
        Ok(())
    }

    /// Reports every state that is not acknowledged and was not reported in this session.
    async fn report(&mut self, entries: &Arc<Entries>) -> Result<(), SessionError> {
        for entry in entries.iter() {
            let now = Said::of(entry);
            let before = self.said.get(&entry.execution);
            let newly_refused = entry.cancel_refused && before.is_some_and(|before| !before.cancel_refused);
            if before == Some(&now) || (entry.is_acked() && !newly_refused) {
                // An acknowledged state counts as said, so that a cancel that is refused later is noticed.
                self.said.entry(entry.execution.clone()).or_insert(now);
                continue;
            }
            let report = self.whole(entry).await;
            self.send(connect_request::Message::Report(report)).await?;
            self.said.insert(entry.execution.clone(), now);
        }
        self.said.retain(|execution, _| entries.get(execution).is_some());
        Ok(())
    }

    async fn send(&self, message: connect_request::Message) -> Result<(), SessionError> {
        step::word(wire::word(&message), self.session.journal.path()).map_err(|_| SessionError::Stuck)?;
        let message = ConnectRequest { message: Some(message) };
        match tokio::time::timeout(SEND_TIMEOUT, self.outbox.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(SessionError::Stuck),
        }
    }
}

enum Event {
    Stop,
    Journal,
    Answer(Box<Result<Option<ConnectResponse>, tonic::Status>>),
    Progress,
    Facts,
    Tell,
    Resend,
}

#[cfg(test)]
mod tests;
