//! Translation between the journal's types and those of the API.

use std::time::Duration;

use marco_proto::names::{ExecutionId, FIRST_PROTOCOL, SERVED_PROTOCOLS};
use marco_proto::v1::execution::State as WireState;
use marco_proto::v1::verdict::Decision;
use marco_proto::v1::{
    Ack, Assign, CardLayout, ExecutionError, Hello, NodeCondition, NodeMode, Release, Report, System,
    Update as WireUpdate, UpdateRefusal, Verdict, assign, connect_request, node_condition,
};

use super::{Layout, Node};
use crate::cause::chain;
use crate::health::{Ailment, Condition};
use crate::job::{Action, Artifact, Failure, Mode, Notice, State, Update};
use crate::journal::{self, Entries, Entry, JournalError, NOT_WRITABLE, Progress};
use crate::system::Refusal;

/// Notice if the operation names none. The controller reckons with the same.
const DEFAULT_NOTICE: Duration = Duration::from_secs(120);

/// Facts of a node at this moment.
pub(super) struct Facts<'a> {
    pub(super) node: &'a Node,
    pub(super) refusal: Option<Refusal>,
    pub(super) conditions: Vec<Condition>,
    pub(super) journal_lost: bool,
}

impl Facts<'_> {
    /// The node's system, and the reason to refuse an update, if there is one.
    pub(super) fn system(&self) -> System {
        let node = self.node;
        let refusal =
            |refusal: &Refusal| UpdateRefusal { reason: refusal.reason.to_owned(), message: refusal.message.clone() };
        System {
            kernel_arch: node.kernel_arch.clone(),
            userspace_arch: node.userspace_arch.clone(),
            page_size: node.page_size,
            kernel_release: node.kernel_release.clone(),
            os: node.os.clone(),
            layout: match node.layout {
                Layout::Unknown => CardLayout::Unspecified,
                Layout::Single => CardLayout::Single,
                Layout::Resident => CardLayout::Resident,
            }
            .into(),
            image_sha256: node.image_sha256.clone(),
            boot_sha256: node.boot_sha256.clone(),
            update_refusal: self.refusal.as_ref().map(refusal),
            trial_lacks: node.trial_lacks.clone(),
        }
    }

    /// The node's ailments.
    pub(super) fn conditions(&self) -> Vec<NodeCondition> {
        let one = |condition: &Condition| NodeCondition {
            r#type: match condition.ailment {
                Ailment::Journal => node_condition::Type::Journal,
                Ailment::Disk => node_condition::Type::Disk,
                Ailment::Clock => node_condition::Type::Clock,
                Ailment::UnderVoltage => node_condition::Type::UnderVoltage,
                Ailment::Settings => node_condition::Type::Settings,
                Ailment::JournalLost => node_condition::Type::JournalLost,
            }
            .into(),
            message: condition.message.clone(),
        };
        self.conditions.iter().map(one).collect()
    }
}

pub(super) fn hello(facts: &Facts<'_>, entries: &Entries, progress: &Progress) -> Hello {
    let node = facts.node;
    // A journal holds a month of settled jobs. The controller asks for one that it misses.
    let open = entries.iter().filter(|entry| !(entry.state.is_final() && entry.is_acked()));
    Hello {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol_version: FIRST_PROTOCOL,
        protocol_versions: SERVED_PROTOCOLS.to_vec(),
        journal_lost: facts.journal_lost,
        boot_id: node.boot_id.clone(),
        instance: node.instance.clone(),
        mode: match node.mode {
            Mode::Running => NodeMode::Running,
            Mode::Installer => NodeMode::Installer,
        }
        .into(),
        board: Some(node.board.to_wire()),
        system: Some(facts.system()),
        card_is_blank: node.card_is_blank,
        image: node.image.clone(),
        supported_actions: ["reboot", "power-off", "update"].map(str::to_owned).to_vec(),
        answers_queries: true,
        executions: open.map(|entry| report(entry, progress, &node.boot_id)).collect(),
        conditions: facts.conditions(),
    }
}

/// Reports the end of an execution that was not taken because the journal cannot be written.
pub(super) fn not_journalled(execution: &str, attempt: u32, boot_id: &str, error: &JournalError) -> Report {
    Report {
        execution: execution.to_owned(),
        attempt,
        // Any number will do: no other report of this delivery exists.
        sequence: 1,
        state: WireState::Failed.into(),
        error: Some(ExecutionError { reason: NOT_WRITABLE.to_owned(), message: chain(error) }),
        boot_id: boot_id.to_owned(),
        accept_boot_id: boot_id.to_owned(),
        ..Report::default()
    }
}

/// Reports a whole entry under this boot.
pub(super) fn report(entry: &Entry, progress: &Progress, boot_id: &str) -> Report {
    // Progress belongs to the process, and may be of another job.
    let ours = progress.execution == entry.execution && !entry.state.is_final();
    Report {
        execution: entry.execution.clone(),
        attempt: entry.attempt,
        sequence: entry.sequence,
        state: state(entry.state).into(),
        phase: if ours { progress.phase.clone() } else { String::new() },
        bytes_done: if ours { progress.done } else { 0 },
        bytes_total: if ours { progress.total } else { 0 },
        error: entry
            .error
            .as_ref()
            .map(|error| ExecutionError { reason: error.reason.clone(), message: error.message.clone() }),
        boot_id: boot_id.to_owned(),
        release: release(entry),
        cancel_refused: entry.cancel_refused,
        accept_boot_id: entry.accept_boot_id.clone(),
        log: String::new(),
        log_cut: false,
        journal_lost: entry.torn,
    }
}

fn release(entry: &Entry) -> Option<Release> {
    entry.release.as_ref().map(|release| Release {
        execution: release.execution.clone(),
        image_sha256: release.image_sha256.clone(),
        boot_sha256: release.boot_sha256.clone(),
    })
}

/// True if this acknowledgement names the report of the entry as it is now. Another one is of an earlier state or delivery,
/// or of a copy of the journal that was lost.
pub(super) fn acknowledges(ack: &Ack, entry: &Entry, boot_id: &str) -> bool {
    (ack.attempt, ack.sequence, ack.state()) == (entry.attempt, entry.sequence, state(entry.state))
        && ack.boot_id == boot_id
        && ack.release == release(entry)
}

/// Returns the verdict that this message gives about the system that runs now; `None`: it is about another one, or an
/// unknown one.
pub(super) fn verdict(message: Verdict, entry: &Entry, boot_id: &str) -> Option<journal::Verdict> {
    let names = entry.state == State::Verifying
        && message.attempt == entry.attempt
        && message.boot_id == boot_id
        && message.release == release(entry);
    match message.decision() {
        _ if !names => None,
        Decision::Unspecified => None,
        Decision::Accepted => Some(journal::Verdict::Accepted),
        Decision::Refused => {
            let error = message.error.unwrap_or_default();
            Some(journal::Verdict::Refused(Failure::new(&error.reason, error.message)))
        }
    }
}

fn state(state: State) -> WireState {
    match state {
        State::Accepted | State::Installing => WireState::Running,
        State::Armed | State::Trial => WireState::Rebooting,
        State::Verifying => WireState::Verifying,
        State::Succeeded => WireState::Succeeded,
        State::Failed => WireState::Failed,
        State::RolledBack => WireState::RolledBack,
        State::Cancelled => WireState::Cancelled,
    }
}

/// Returns the full name of an execution; `None`: not a name of one.
pub(super) fn execution(name: &str) -> Option<String> {
    ExecutionId::parse(name).ok().map(|execution| execution.name())
}

/// Returns an assignment's execution and action. An action that this agent does not know, or that makes no sense, is
/// [`Action::Unknown`]. `None`: no execution's name, so there is nothing to answer for.
pub(super) fn assignment(assign: Assign) -> Option<(String, Action)> {
    let execution = execution(&assign.execution)?;
    let action = match assign.action {
        Some(assign::Action::Reboot(reboot)) => notice(reboot.notice.as_ref(), reboot.message).map(Action::Reboot),
        Some(assign::Action::PowerOff(off)) => notice(off.notice.as_ref(), off.message).map(Action::PowerOff),
        Some(assign::Action::Update(update)) => self::update(update).map(Action::Update),
        None => None,
    };
    Some((execution, action.unwrap_or(Action::Unknown)))
}

fn notice(delay: Option<&prost_types::Duration>, message: String) -> Option<Notice> {
    let delay = match delay {
        None => DEFAULT_NOTICE,
        Some(delay) => duration(Some(delay))?,
    };
    Some(Notice { delay, message })
}

fn update(update: WireUpdate) -> Option<Update> {
    Some(Update {
        image: artifact(update.image, update.image_sha256)?,
        bootcode: artifact(update.bootcode, update.bootcode_sha256)?,
        notice: notice(update.notice.as_ref(), update.message)?,
        discard_home: update.preserve.is_some_and(|preserve| preserve.discard_home),
        raw: update.raw,
    })
}

/// `Some(None)`: no artifact was named. `None`: invalid; a digest becomes part of a file's name, so it must be one.
fn artifact(id: String, sha256: String) -> Option<Option<Artifact>> {
    if sha256.is_empty() {
        return id.is_empty().then_some(None);
    }
    let digest = sha256.len() == 64 && sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    // The name is written into files that a shell may read.
    let id = id.strip_prefix("artifacts/").map(str::to_owned).unwrap_or(id);
    let plain = id.is_empty() || marco_proto::names::ArtifactId::parse(&id).is_ok();
    (digest && plain).then_some(Some(Artifact { id, sha256 }))
}

/// `None`: unset or negative.
pub(super) fn duration(duration: Option<&prost_types::Duration>) -> Option<Duration> {
    let duration = duration?;
    let seconds = u64::try_from(duration.seconds).ok()?;
    let nanos = u32::try_from(duration.nanos).ok()?;
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_nanos(u64::from(nanos))))
}

/// Microseconds since 1970.
pub(super) fn micros(time: &prost_types::Timestamp) -> i64 {
    time.seconds.saturating_mul(1_000_000).saturating_add(i64::from(time.nanos) / 1000)
}

/// The word for a message in the steps of a test.
pub(super) fn word(message: &connect_request::Message) -> &'static str {
    match message {
        connect_request::Message::Hello(_) => "hello",
        connect_request::Message::Report(_) => "report",
        connect_request::Message::Status(_) => "status",
        connect_request::Message::Leaving(_) => "leaving",
        connect_request::Message::NotHeld(_) => "not held",
    }
}
