//! A node as the protocol wants it to be: a journal that survives, a session that does not, and a log of what was really
//! done to it, which nobody but the checks reads.

use std::collections::BTreeMap;

use marco_controller::operation::{Action, ExecutionError, ExecutionState};
use marco_controller::sessions::{Command, Handle};
use marco_controller::store::{Assignment, ReportRow, SentLog};
use marco_proto::names::{ExecutionId, NodeId};

/// A stream to a controller.
pub(super) struct Link {
    /// Which controller, by its place and its life.
    pub(super) controller: (usize, u32),
    pub(super) epoch: i64,
    pub(super) handle: Handle,
}

/// An entry of the journal.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) attempt: u32,
    pub(super) action: Action,
    pub(super) state: ExecutionState,
    pub(super) sequence: u64,
    /// The last sequence that a controller acknowledged.
    pub(super) acknowledged: u64,
    /// The boot under which it was accepted, and the one under which it was armed.
    accepted: u32,
    armed: u32,
    cancel_refused: bool,
}

pub(super) struct Pi {
    pub(super) id: NodeId,
    /// The serial number of its certificate.
    pub(super) certificate: String,
    pub(super) boot: u32,
    pub(super) is_on: bool,
    pub(super) link: Option<Link>,
    pub(super) jobs: BTreeMap<ExecutionId, Job>,
    /// What was done: the execution, and whether it was a power-off.
    pub(super) log: Vec<(ExecutionId, bool)>,
}

impl Pi {
    pub(super) fn new(id: NodeId, certificate: String) -> Self {
        Self { id, certificate, boot: 1, is_on: true, link: None, jobs: BTreeMap::new(), log: Vec::new() }
    }

    pub(super) fn boot_id(&self) -> String {
        format!("{}-boot-{}", self.id, self.boot)
    }

    fn active(&mut self) -> Option<(&ExecutionId, &mut Job)> {
        self.jobs.iter_mut().find(|(_, job)| !job.state.is_final())
    }

    /// What it has to say: each entry that is not acknowledged.
    pub(super) fn unsaid(&self) -> Vec<ReportRow> {
        let rows = self.jobs.iter().filter(|(_, job)| job.acknowledged < job.sequence);
        rows.map(|(id, job)| self.report(id, job)).collect()
    }

    pub(super) fn report(&self, id: &ExecutionId, job: &Job) -> ReportRow {
        let error =
            (job.state == ExecutionState::Failed).then(|| ExecutionError::new("CANNOT", "it cannot".to_owned()));
        ReportRow {
            execution: id.clone(),
            attempt: job.attempt,
            sequence: job.sequence,
            state: job.state,
            phase: String::new(),
            bytes_done: 0,
            bytes_total: 0,
            error,
            boot_id: self.boot_id(),
            accept_boot_id: format!("{}-boot-{}", self.id, job.accepted),
            release: None,
            cancel_refused: job.cancel_refused,
            log: SentLog::default(),
        }
    }

    /// Takes a command; an assignment is journalled before anything else.
    pub(super) fn hear(&mut self, command: Command) {
        match command {
            Command::Assign(assignment) => self.accept(*assignment),
            Command::Cancel(id) => {
                if let Some(job) = self.jobs.get_mut(&id) {
                    match job.state {
                        ExecutionState::Running => job.become_(ExecutionState::Cancelled),
                        state if !state.is_final() => job.cancel_refused = true,
                        _ => {}
                    }
                }
            }
            Command::Ack(id, sequence) => self.acknowledged(&id, sequence),
            Command::Query(id) => {
                self.asked_about(&id);
            }
        }
    }

    /// Says again where this is; `false`: the journal does not hold it.
    pub(super) fn asked_about(&mut self, id: &ExecutionId) -> bool {
        let job = self.jobs.get_mut(id);
        let held = job.is_some();
        if let Some(job) = job {
            job.acknowledged = 0;
        }
        held
    }

    pub(super) fn accept(&mut self, assignment: Assignment) {
        if let Some(job) = self.jobs.get_mut(&assignment.execution) {
            // A lower attempt than it has is refused; a higher one fences off what was said before.
            if assignment.attempt > job.attempt {
                job.attempt = assignment.attempt;
                // It is said again under the new attempt.
                job.acknowledged = 0;
            }
            return;
        }
        if self.active().is_some() {
            return;
        }
        let Assignment { execution, attempt, action, .. } = assignment;
        let job = Job {
            attempt,
            action,
            state: ExecutionState::Running,
            sequence: 1,
            acknowledged: 0,
            accepted: self.boot,
            armed: 0,
            cancel_refused: false,
        };
        self.jobs.insert(execution, job);
    }

    pub(super) fn acknowledged(&mut self, id: &ExecutionId, sequence: u64) {
        if let Some(job) = self.jobs.get_mut(id) {
            job.acknowledged = job.acknowledged.max(sequence);
        }
    }

    /// Does the next thing; answers what the machine goes down for, and its stream with it.
    pub(super) fn work(&mut self) -> Option<ExecutionId> {
        let boot = self.boot;
        let (id, job) = self.active()?;
        match job.state {
            ExecutionState::Running => {
                job.armed = boot;
                job.become_(ExecutionState::Rebooting);
                None
            }
            ExecutionState::Rebooting if job.armed == boot => {
                let (id, off) = (id.clone(), matches!(job.action, Action::PowerOff(_)));
                self.log.push((id.clone(), off));
                self.is_on = false;
                Some(id)
            }
            _ => None,
        }
    }

    pub(super) fn fail(&mut self) {
        if let Some((_, job)) = self.active()
            && job.state == ExecutionState::Running
        {
            job.become_(ExecutionState::Failed);
        }
    }

    /// Comes up; what it was armed for has happened.
    pub(super) fn boot(&mut self) {
        if self.is_on {
            return;
        }
        (self.is_on, self.boot) = (true, self.boot + 1);
        let boot = self.boot;
        if let Some((_, job)) = self.active()
            && job.state == ExecutionState::Rebooting
            && job.armed != boot
        {
            job.become_(ExecutionState::Succeeded);
        }
    }
}

impl Job {
    fn become_(&mut self, state: ExecutionState) {
        self.state = state;
        self.sequence += 1;
    }
}
