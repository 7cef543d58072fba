//! `AgentService`: sessions of nodes.

mod answers;
mod blank;
mod ending;
mod hello;
mod progress;
mod quota;
mod refused;
mod unstored;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use marco_proto::names::{ExecutionId, NodeId};
use marco_proto::v1;
use marco_proto::v1::agent_service_server::AgentService;
use marco_proto::v1::{connect_request, connect_response};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::Instrument as _;
use uuid::Uuid;

use super::outbox::{self, Unsent};
use super::status::ApiError;
use super::{Context, caller, convert};
use crate::identity::peer_log::{cut, of_peer};
use crate::identity::tls::PeerInfo;
use crate::operation::{ExecutionState, Greeting};
use crate::sessions::{Acked, Command, End, Handle};
use crate::store::{Hello, ProgressRow, ReportRow, StoreError};
use blank::Blank;
pub(super) use hello::key_held;
use hello::{Begun, Peer, begin};
use quota::Quota;
use refused::Refused;
use unstored::Unstored;

/// Deadline of the first message, the Hello.
const HELLO: Duration = Duration::from_secs(10);
/// Longest time for a node to take a message. A session that exceeds it ends.
const SLOW: Duration = Duration::from_secs(15);
/// Messages that may wait for one connection.
const QUEUE: usize = 16;
/// Least time between two progress reports of an execution. They are written at the same interval.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Least time for a node to stay away after a Goodbye: about the duration of a restart.
const RETRY_AFTER_STOP: Duration = Duration::from_millis(500);
/// Pause between two tries to store the end of a session, while the store is away.
const END_AGAIN: Duration = Duration::from_secs(1);
/// Least time for a refused node to stay away.
const RETRY_WHEN_REFUSED: Duration = Duration::from_secs(30);
/// Least time for a superseded node to stay away. Short, because it may be one of two clones: the sooner it returns,
/// the sooner both are in quarantine.
const RETRY_WHEN_SUPERSEDED: Duration = Duration::from_secs(5);

/// Progress rows that may wait to be written, of all nodes. Rows that do not fit are dropped.
const PROGRESS_QUEUE: usize = 4096;

/// The service.
pub(super) struct Agent {
    context: Context,
    progress: mpsc::Sender<ProgressRow>,
    refused: Arc<Refused>,
}

type Out = mpsc::Sender<Result<v1::ConnectResponse, Status>>;

impl Agent {
    pub(super) fn new(context: Context) -> Self {
        let (progress, receiver) = mpsc::channel(PROGRESS_QUEUE);
        context.tasks.spawn(progress::write(context.clone(), receiver));
        Self { context, progress, refused: Arc::new(Refused::new()) }
    }
}

/// A session that has begun.
struct Session {
    context: Context,
    progress: mpsc::Sender<ProgressRow>,
    node: NodeId,
    epoch: i64,
    /// Version of the protocol.
    protocol: u32,
    out: Out,
    /// The node waits in its installer with a card without a system. `None`: any other node.
    blank: Option<Blank>,
    /// Attempts and sequences that this session acknowledged.
    acked: Acked,
    /// The power-off that ends the agent, once the agent has said so.
    leaving: OnceLock<ExecutionId>,
    /// The node waits for approval. Its reports are neither stored nor acknowledged: it may be another machine than the
    /// one that did the executions. Its approval ends the session.
    held: bool,
}

/// End of a session.
enum Ended {
    /// By the node.
    ByNode,
    /// By the controller, with a Goodbye.
    ByUs(End),
    /// By an error: the node broke the protocol, or the store refused.
    Refused(Status),
}

impl Session {
    async fn send(&self, message: connect_response::Message) -> Result<(), Ended> {
        let message = Ok(v1::ConnectResponse { message: Some(message) });
        outbox::send(&self.out, message, SLOW).await.map_err(|unsent| match unsent {
            Unsent::Gone => Ended::ByNode,
            Unsent::Slow => Ended::ByUs(End::SlowReader),
        })
    }

    async fn command(&self, command: Command) -> Result<(), Ended> {
        let message = match command {
            Command::Assign(assignment) => connect_response::Message::Assign(convert::assign(&assignment)),
            Command::Cancel(execution) => {
                of_peer!(info, &self.node, %execution, "cancel asked of the node");
                connect_response::Message::Cancel(v1::Cancel { execution: execution.name() })
            }
            Command::Query(execution) => {
                of_peer!(info, &self.node, %execution, "the node is asked what became of it");
                connect_response::Message::Query(v1::Query { execution: execution.name() })
            }
        };
        self.send(message).await
    }

    async fn report(&self, unstored: &mut Unstored, report: v1::Report) -> Result<(), Ended> {
        if self.held {
            return Ok(());
        }
        unstored.add(convert::report(report, &self.node).map_err(|error| Ended::Refused(error.into()))?);
        self.store_what_waits(unstored).await
    }

    async fn status(&self, unstored: &mut Unstored, status: v1::NodeStatus) -> Result<(), Ended> {
        let Some(system) = status.system else { return Ok(()) };
        unstored.set_system(convert::system(system, status.conditions).map_err(|error| Ended::Refused(error.into()))?);
        self.store_what_waits(unstored).await
    }

    /// Stores waiting reports, oldest first, then the facts. If the store does not answer, the rest waits.
    async fn store_what_waits(&self, unstored: &mut Unstored) -> Result<(), Ended> {
        if unstored.due().is_none_or(|due| due > Instant::now()) {
            return Ok(());
        }
        while let Some(row) = unstored.report().cloned() {
            let applied = self.context.store.apply_report(&self.node, self.epoch, &row, self.context.clock.now()).await;
            match applied {
                Ok(outcome) => {
                    unstored.report_stored();
                    self.answer(row, outcome).await?;
                }
                // The session stays open: in an outage no controller could let the node in again.
                Err(StoreError::Unavailable(_)) => {
                    unstored.later(|| self.context.store.backlog());
                    return Ok(());
                }
                Err(error) => return Err(store_down(error)),
            }
        }
        if let Some(system) = unstored.system() {
            let now = self.context.clock.now();
            match self.context.store.update_system(&self.node, self.epoch, system, now).await {
                Ok(true) => unstored.system_stored(),
                Ok(false) => return Err(Ended::ByUs(End::Lost)),
                Err(StoreError::Unavailable(_)) => unstored.later(|| self.context.store.backlog()),
                Err(error) => return Err(store_down(error)),
            }
        }
        Ok(())
    }

    async fn run(&self, mut handle: Handle, mut messages: Streaming<v1::ConnectRequest>) -> Ended {
        let mut unstored = Unstored::new();
        let mut looks = tokio::time::interval(blank::EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut quota = Quota::new(Instant::now());
        loop {
            let due = unstored.due();
            // Cancel safe: a half-read message stays in the stream's buffer, commands and the end in their channels.
            // Biased, so that a node that floods cannot delay its own end.
            let result = tokio::select! {
                biased;
                changed = handle.end.changed() => match *handle.end.borrow() {
                    Some(end) => Err(Ended::ByUs(end)),
                    None if changed.is_err() => Err(Ended::ByUs(End::Superseded)),
                    None => Ok(()),
                },
                Some(command) = handle.commands.recv() => self.command(command).await,
                () = wait_until(due) => self.store_what_waits(&mut unstored).await,
                _ = looks.tick(), if self.blank.is_some() => self.look_for_an_image().await,
                () = tokio::time::sleep_until(quota.room_at()), if !quota.has_room() => {
                    quota.refill(Instant::now());
                    Ok(())
                }
                // Unread messages fill HTTP/2's window, so the node waits instead of the controller's memory growing.
                message = messages.message(), if unstored.has_room() && quota.has_room() => match message {
                    Ok(Some(v1::ConnectRequest { message: Some(message) })) => match message {
                        connect_request::Message::Report(report) => {
                            quota.spend(Instant::now());
                            self.report(&mut unstored, report).await
                        }
                        connect_request::Message::Status(status) => {
                            quota.spend(Instant::now());
                            self.status(&mut unstored, status).await
                        }
                        connect_request::Message::Leaving(leaving) => {
                            quota.spend(Instant::now());
                            self.leave(&leaving)
                        }
                        connect_request::Message::NotHeld(not_held) => {
                            quota.spend(Instant::now());
                            self.not_held(not_held).await
                        }
                        connect_request::Message::Hello(_) => {
                            Err(Ended::Refused(ApiError::invalid("hello", "was said already").into()))
                        }
                    },
                    Ok(Some(v1::ConnectRequest { message: None })) => Err(Ended::Refused(
                        ApiError::invalid("message", "is of a kind that this controller does not know").into(),
                    )),
                    Ok(None) => Err(Ended::ByNode),
                    Err(status) => Err(unread(status)),
                },
                () = self.out.closed() => Err(Ended::ByNode),
            };
            if let Err(ended) = result {
                return ended;
            }
        }
    }

    /// Tells the node why the session ends. Best effort.
    async fn farewell(&self, ended: Ended) {
        let (status, reason, delay) = match ended {
            Ended::ByNode => return,
            Ended::Refused(status) => {
                of_peer!(warn, &self.node, error = %cut(status.message()), "a session was refused");
                let _ = tokio::time::timeout(Duration::from_secs(1), self.out.send(Err(status))).await;
                return;
            }
            Ended::ByUs(End::Superseded) => {
                (Status::aborted("the node opened another session"), "superseded", RETRY_WHEN_SUPERSEDED)
            }
            Ended::ByUs(End::Lost) => {
                (Status::aborted("the session is not the node's any more"), "lost", RETRY_AFTER_STOP)
            }
            Ended::ByUs(End::Barred) => {
                (Status::permission_denied("the node is not admitted any more"), "not admitted", RETRY_WHEN_REFUSED)
            }
            Ended::ByUs(End::SlowReader) => {
                (Status::aborted("the node does not read what it is sent"), "slow", RETRY_AFTER_STOP)
            }
            Ended::ByUs(End::Shutdown) => {
                (Status::unavailable("the controller is stopping"), "the controller is stopping", RETRY_AFTER_STOP)
            }
            Ended::ByUs(End::Away) => (away(), "the controller does no work at present", RETRY_AFTER_STOP),
        };
        of_peer!(info, &self.node, reason, "session ended by the controller");
        let goodbye = v1::Goodbye { reason: reason.to_owned(), retry_delay: convert::duration(delay) };
        let last = Ok(v1::ConnectResponse { message: Some(connect_response::Message::Goodbye(goodbye)) });
        // Bounded, because this may be a node that is cut for not reading.
        for message in [last, Err(status)] {
            if tokio::time::timeout(Duration::from_secs(1), self.out.send(message)).await.is_err() {
                return;
            }
        }
    }
}

/// End of a session whose next message could not be read.
fn unread(status: Status) -> Ended {
    match status.code() {
        // By the decoder: the bytes are no message, or too many. Told to the node, which would send them again.
        Code::InvalidArgument | Code::OutOfRange => Ended::Refused(status),
        _ => Ended::ByNode,
    }
}

/// UNAVAILABLE, so that the node tries another controller.
fn away() -> Status {
    Status::unavailable("the controller does no work at present")
}

/// Pends forever if `due` is `None`.
async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Ends the session. The report was not acknowledged, so the node repeats it in the next one.
fn store_down(error: StoreError) -> Ended {
    Ended::Refused(ApiError::from(error).into())
}

async fn session(
    context: Context,
    progress: mpsc::Sender<ProgressRow>,
    refused: Arc<Refused>,
    node: NodeId,
    peer: Peer,
    mut messages: Streaming<v1::ConnectRequest>,
    out: Out,
) {
    if context.sessions.is_away() {
        let _ = out.try_send(Err(away()));
        return;
    }
    // Dated by its accept: a controller that stood still reads an old Hello late, and would take the node for a clone.
    let accepted = crate::calendar::earlier(context.clock.now(), crate::calendar::delta(peer.accepted.elapsed()));
    let first = tokio::time::timeout(HELLO, messages.message()).await;
    let Ok(Ok(Some(v1::ConnectRequest { message: Some(connect_request::Message::Hello(hello)) }))) = first else {
        let _ = out.try_send(Err(ApiError::invalid("hello", "must be the first message, within 10 s").into()));
        return;
    };
    let Begun { epoch, held, labels, handle, protocol } = match begin(&context, &peer, &node, &hello, accepted).await {
        Ok(begun) => begun,
        Err(error) => {
            refused.note(&context, &node, &peer, &error).await;
            // The connection is closed once the answer has had time to leave: a refused credential holds no place.
            if let (Some(connection), ApiError::Forbidden { .. } | ApiError::Unauthenticated { .. }) =
                (&peer.connection, &error)
            {
                connection.refuse();
            }
            let _ = out.try_send(Err(error.into()));
            return;
        }
    };
    let id = Uuid::now_v7().to_string();
    of_peer!(info, &node, session = id, epoch, boot_id = %cut(&hello.boot_id), "session begun");
    let blank = Blank::of(&hello);
    let (acked, leaving) = (Acked::default(), OnceLock::new());
    let session = Session { context, progress, node, epoch, protocol, out, blank, held, acked, leaving };
    let ended = match session.welcome(&id, labels, &hello).await {
        Ok(()) => session.run(handle, messages).await,
        Err(ended) => ended,
    };
    session.farewell(ended).await;
    // Out of the registry first: the store may be away for long, and nothing must be sent into an ended stream.
    session.context.sessions.close(&session.node, epoch);
    session.end().await;
    of_peer!(info, &session.node, session = id, "session ended");
}

impl Session {
    /// Sends Welcome, then reconciles the node's journal with the store.
    async fn welcome(&self, id: &str, labels: BTreeMap<String, String>, hello: &v1::Hello) -> Result<(), Ended> {
        let welcome = v1::Welcome {
            session: id.to_owned(),
            time: Some(convert::timestamp(self.context.clock.now())),
            progress_interval: convert::duration(PROGRESS_INTERVAL),
            controllers: self.context.live_addresses().await,
            held: self.held,
            labels: labels.into_iter().collect(),
            protocol_version: self.protocol,
        };
        self.send(connect_response::Message::Welcome(welcome)).await?;
        if self.held {
            return Ok(());
        }
        let mut listed = Vec::new();
        for report in &hello.executions {
            listed.push(convert::report(report.clone(), &self.node).map_err(|error| Ended::Refused(error.into()))?);
        }
        let mode = convert::mode(hello.mode).map_err(|error| Ended::Refused(error.into()))?;
        let greeting = Greeting {
            mode,
            boot_id: &hello.boot_id,
            answers_queries: hello.answers_queries,
            journal_lost: hello.journal_lost,
        };
        let said = Hello { greeting, listed: &listed };
        let now = self.context.clock.now();
        let reconciled = self.context.store.reconcile(&self.node, self.epoch, said, now).await.map_err(store_down)?;
        if !reconciled.holder {
            return Err(Ended::ByUs(End::Lost));
        }
        // Only now may the dispatcher assign: work that is sent earlier would cross with the executions that Hello
        // lists.
        self.context.sessions.set_ready(&self.node, self.epoch, hello.answers_queries);
        for (execution, reason) in reconciled.refused {
            of_peer!(warn, &self.node, %execution, reason = %cut(&reason), "a report was refused");
        }
        // Before the acknowledgements: a node that has just started resumes its work with those.
        for execution in reconciled.cancels {
            self.command(Command::Cancel(execution)).await?;
        }
        for (execution, sequence) in reconciled.acks {
            let row = listed.iter().find(|report| report.execution == execution && report.sequence == sequence);
            if let Some(row) = row {
                self.acknowledge(row).await?;
            }
        }
        for (execution, error) in reconciled.rejected {
            let asks = |report: &&ReportRow| report.execution == execution && report.state == ExecutionState::Verifying;
            if let Some(row) = listed.iter().find(asks) {
                self.reject(row, &error).await?;
            }
        }
        for assignment in reconciled.assigns {
            self.deliver(Box::new(assignment));
        }
        for execution in reconciled.queries {
            self.command(Command::Query(execution)).await?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    type ConnectStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::ConnectResponse, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let caller = caller(&request)?;
        let accepted = request.extensions().get::<PeerInfo>().map_or_else(Instant::now, PeerInfo::accept_session);
        let Some(node) = caller.node else {
            return Err(ApiError::Forbidden {
                reason: "ROLE_NOT_ALLOWED",
                message: "only a node opens a session".to_owned(),
            }
            .into());
        };
        let connection = request.extensions().get::<PeerInfo>().map(|peer| Arc::clone(&peer.connection));
        let peer = Peer { from: caller.from, certificate: caller.serial, connection, accepted };
        let (out, receiver) = mpsc::channel(QUEUE);
        let span = tracing::info_span!("session", %node);
        let (context, progress, refused) = (self.context.clone(), self.progress.clone(), Arc::clone(&self.refused));
        let task = session(context, progress, refused, node, peer, request.into_inner(), out);
        // A task of its own: tonic drops the stream when the client is gone, and the end has to be stored even then.
        self.context.tasks.spawn(task.instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
