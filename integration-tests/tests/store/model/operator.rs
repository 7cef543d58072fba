//! Requests of operators. Without an answer, operators repeat them.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::TimeDelta;
use marco_controller::operation::{Action, Decision, ExecutionState, Notice, OperationState, Update};
use marco_controller::rollout::{Limit, Rollout};
use marco_controller::schedule::MaintenanceWindow;
use marco_controller::store::{AbandonOutcome, CreateOutcome, NewOperation, RequestKey, ResolveOutcome, SteerOutcome};
use marco_proto::names::{ExecutionId, NodeId, OperationId};
use uuid::Uuid;

use super::checks::failed;
use super::step::{What, When};
use super::world::{Asked, Outcome, World};
use super::{PIS, pick};
use crate::support::{new_operation, power_off, reboot};

/// The maintenance window: the first half of each hour.
fn window() -> MaintenanceWindow {
    MaintenanceWindow { cron: "0 * * * *".to_owned(), duration: Duration::from_secs(1800), time_zone: String::new() }
}

fn fresh_id() -> OperationId {
    OperationId::parse(&Uuid::now_v7().to_string()).unwrap()
}

impl World {
    async fn action(&mut self, what: What) -> Outcome<Option<Action>> {
        Ok(match what {
            What::Reboot => Some(reboot()),
            What::PowerOff => Some(power_off()),
            What::Update => self.frozen().await?.map(|image| {
                Action::Update(Update {
                    image: Some(image),
                    bootcode: None,
                    bootcodes: Default::default(),
                    notice: Notice { delay: Duration::ZERO, message: String::new() },
                    discard_home: false,
                    raw: false,
                })
            }),
        })
    }

    pub(super) async fn create(
        &mut self,
        nodes: u8,
        what: What,
        when: When,
        in_flight: Option<u8>,
        failures: Option<u8>,
    ) -> Outcome {
        let Some(action) = self.action(what).await? else { return Ok(()) };
        let chosen = self.pis.iter().enumerate().filter(|(number, _)| nodes & (1 << number) != 0);
        let targets: Vec<NodeId> = chosen.map(|(_, pi)| pi.id.clone()).collect();
        let rollout = (in_flight.is_some() || failures.is_some()).then(|| Rollout {
            max_in_flight: in_flight.map(u32::from),
            max_failures: failures.map(|most| Limit::Number(most.into())),
            ..Rollout::default()
        });
        let now = self.now();
        let lifetime = match when {
            When::Always | When::Window => TimeDelta::hours(24),
            When::Within(seconds) => TimeDelta::seconds(seconds.into()),
        };
        let new = NewOperation {
            schedule_time: now,
            expire_time: now + lifetime,
            rollout,
            window: (when == When::Window).then(window),
            ..new_operation(action, &targets)
        };
        self.ask(new).await
    }

    /// Requests a new operation.
    async fn ask(&mut self, new: NewOperation) -> Outcome {
        let request_id = Uuid::now_v7().to_string();
        let request = Some(RequestKey { request_id, body_sha256: "body".to_owned() });
        let new = NewOperation { request, ..new };
        self.operations.push(Asked { new, tried: BTreeSet::new(), id: None, forgiven: BTreeSet::new() });
        self.send(self.operations.len() - 1).await
    }

    pub(super) async fn repeat(&mut self, number: u8) -> Outcome {
        if self.operations.is_empty() { Ok(()) } else { self.send(pick(number, self.operations.len())).await }
    }

    /// Sends a request, perhaps again. Checks that every answer names the operation of the first try that was stored.
    pub(super) async fn send(&mut self, number: usize) -> Outcome {
        let now = self.now();
        let asked = &mut self.operations[number];
        let id = fresh_id();
        let is_first = asked.tried.is_empty();
        // A new id for each try, as the API makes one for each call. The request key alone tells that it is a
        // repetition.
        let new = NewOperation { id: id.clone(), ..asked.new.clone() };
        let made = self.store().create_operation(&new, now).await;
        self.operations[number].tried.insert(id.clone());
        let made = self.heard("a creation", made)?;
        let asked = &mut self.operations[number];
        let (found, known) = match made {
            None => return Ok(()),
            Some(CreateOutcome::Created(row)) => (row.id, None),
            Some(CreateOutcome::Existing(row)) => (row.id, Some(())),
            // The artifact was deleted meanwhile, so nothing was stored, now or by an earlier try.
            Some(CreateOutcome::ArtifactGone) if asked.id.is_none() => {
                self.operations.remove(number);
                return Ok(());
            }
            Some(other) => return Err(format!("not created: {other:?}")),
        };
        let is_right = match (&asked.id, known) {
            (Some(first), _) => *first == found,
            (None, None) => found == id,
            (None, Some(())) => found != id && asked.tried.contains(&found),
        };
        if !is_right {
            return Err(format!("{:?} was answered by {found}, tried were {:?}", asked.id, asked.tried));
        }
        let word = match (is_first, asked.id.is_some()) {
            (true, _) => "created",
            (false, true) => "repeated",
            (false, false) => "repeated after an error",
        };
        asked.id = Some(found);
        self.counts.add(word);
        Ok(())
    }

    /// Picks an operation that was acknowledged.
    fn known(&self, number: u8) -> Option<(usize, OperationId)> {
        let known: Vec<(usize, OperationId)> =
            self.operations.iter().enumerate().filter_map(|(place, asked)| Some((place, asked.id.clone()?))).collect();
        known.get(pick(number, known.len())).cloned()
    }

    pub(super) async fn steer(&mut self, number: u8, how: &str) -> Outcome {
        match self.known(number) {
            Some((place, id)) => self.steer_one(place, &id, how).await,
            None => Ok(()),
        }
    }

    pub(super) async fn steer_one(&mut self, place: usize, id: &OperationId, how: &str) -> Outcome {
        let now = self.now();
        let before = self.executions(id).await?;
        let was_paused = self.state(id).await? == Some(OperationState::Paused);
        let store = self.store();
        let steered = match how {
            "cancel" => store.request_cancel(id, "pat", now).await,
            "pause" => store.pause(id, "pat", "because", now).await,
            _ => store.resume(id, "pat", now).await,
        };
        let steered = self.heard(how, steered)?;
        let failures = before.iter().filter(|row| failed(row)).map(|row| row.id.node.clone());
        match steered {
            Some(SteerOutcome::NotFound) => return Err(format!("{id} was acknowledged and is not found")),
            Some(SteerOutcome::Changed(_)) => {
                self.counts.add(match how {
                    "cancel" => "cancelled",
                    "pause" => "paused",
                    _ => "resumed",
                });
                // A resume of a running operation changes nothing, so it forgives nothing either.
                if how == "resume" && was_paused {
                    self.operations[place].forgiven = failures.collect();
                }
            }
            // Without an answer it may be resumed or not, so failures of both cases count as forgiven.
            None if how == "resume" => self.operations[place].forgiven.extend(failures),
            _ => {}
        }
        Ok(())
    }

    pub(super) async fn abandon(&mut self, operation: u8, node: u8) -> Outcome {
        let Some((_, operation)) = self.known(operation) else { return Ok(()) };
        // Prefers an overdue execution: others cannot be abandoned, and the step would have no effect.
        let rows = self.executions(&operation).await?;
        let overdue = rows.into_iter().find(|row| row.overdue).map(|row| row.id);
        let id = overdue.unwrap_or(ExecutionId { operation, node: self.pis[pick(node, PIS)].id.clone() });
        self.abandon_one(&id).await
    }

    pub(super) async fn abandon_one(&mut self, id: &ExecutionId) -> Outcome {
        let now = self.now();
        let abandoned = self.store().abandon(id, "pat", now).await;
        if let Some(AbandonOutcome::Abandoned(_)) = self.heard("abandon", abandoned)? {
            self.counts.add("abandoned");
        }
        Ok(())
    }

    /// Retries the executions that did not succeed, as the API does.
    pub(super) async fn retry(&mut self, number: u8) -> Outcome {
        let Some((place, id)) = self.known(number) else { return Ok(()) };
        if self.state(&id).await?.is_none_or(|state| !state.is_final()) {
            return Ok(());
        }
        let rows = self.executions(&id).await?;
        let failed = rows.into_iter().filter(|row| row.state != ExecutionState::Succeeded);
        let nodes: Vec<NodeId> = failed.map(|row| row.id.node).collect();
        if nodes.is_empty() {
            return Ok(());
        }
        let now = self.now();
        let old = self.operations[place].new.clone();
        self.counts.add("retried");
        let again = NewOperation {
            schedule_time: now,
            expire_time: now + TimeDelta::hours(24),
            rollout: old.rollout,
            window: old.window,
            retry_of: Some(id),
            ..new_operation(old.action, &nodes)
        };
        self.ask(again).await
    }

    pub(super) async fn resolve(&mut self, number: usize, accept: bool) -> Outcome {
        let (now, id) = (self.now(), self.pis[number].id.clone());
        let decision = if accept { Decision::Accept } else { Decision::Abandon };
        let resolved = self.store().resolve(&id, decision, "pat", now).await;
        match self.heard("resolve", resolved)? {
            Some(ResolveOutcome::NoConflict) => return Ok(()),
            Some(ResolveOutcome::NotFound) => return Err(format!("{id} is gone")),
            Some(ResolveOutcome::Resolved(_)) => self.counts.add("conflicts resolved"),
            None => {}
        }
        // The decision may change a final state, which `check_end` would take for an error.
        self.ended.retain(|execution, _| execution.node != id);
        self.settled.clear();
        self.resolved.insert(id);
        Ok(())
    }
}
