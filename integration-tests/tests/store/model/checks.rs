//! Invariants of a world: at any time, and of each round.

use std::collections::{BTreeMap, BTreeSet};

use chrono::Timelike as _;
use marco_controller::operation::{Action, ExecutionState, OperationState, reason};
use marco_controller::rollout::Limit;
use marco_controller::store::{ExecutionRow, OperationQuery, StoreError};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::pi::Pi;
use super::world::{Asked, Outcome, World};

/// True if a rollout counts the execution as a failure: it failed, was rolled back, or is overdue.
pub(super) fn failed(row: &ExecutionRow) -> bool {
    row.overdue || matches!(row.state, ExecutionState::Failed | ExecutionState::RolledBack)
}

fn number(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Executions of each operation.
type Rows = BTreeMap<OperationId, Vec<ExecutionRow>>;

impl World {
    /// Operations that were acknowledged to an operator.
    pub(super) fn acknowledged(&self) -> Vec<(OperationId, Asked)> {
        self.operations.iter().filter_map(|asked| Some((asked.id.clone()?, asked.clone()))).collect()
    }

    async fn rows(&mut self) -> Outcome<Rows> {
        let mut rows = BTreeMap::new();
        for (id, _) in self.acknowledged() {
            if !self.settled.contains(&id) {
                let found = self.executions(&id).await?;
                rows.insert(id, found);
            }
        }
        Ok(rows)
    }

    /// Runs a round. Checks that it does not fail, and assigns no more than windows, expiries and rollouts allow.
    pub(super) async fn round(&mut self, place: usize) -> Outcome {
        if !self.controllers[place].is_alive {
            return Ok(());
        }
        for node in 0..self.pis.len() {
            if self.pis[node].link.as_ref().is_some_and(|link| link.controller.0 == place) {
                self.store_what_waits(node).await?;
            }
        }
        self.store_ends().await?;
        self.flush_progress(place).await?;
        let before = self.rows().await?;
        let paused = self.paused().await?;
        let done = self.controllers[place].dispatcher.round(true).await;
        if matches!(done, Err(StoreError::Unavailable(_))) {
            // Reports were not stored either, so silence proves nothing for a while.
            self.controllers[place].store.interrupt_watch();
        }
        self.heard("a round failed", done)?;
        let after = self.rows().await?;
        let by_itself = self.paused().await?.difference(&paused).count();
        self.counts.add_many("paused by itself", by_itself);
        self.count_ends(&before, &after);
        let connected = self.connected().await?;
        for (id, asked) in self.acknowledged() {
            let (Some(before), Some(after)) = (before.get(&id), after.get(&id)) else { continue };
            self.check_round(&asked, before, after, &connected)?;
        }
        Ok(())
    }

    async fn paused(&mut self) -> Outcome<BTreeSet<OperationId>> {
        let query = OperationQuery { limit: 1000, states: vec![OperationState::Paused], ..OperationQuery::default() };
        let found = self.store().operations(&query).await;
        let rows = self.heard("operations", found)?.unwrap_or_default();
        Ok(rows.into_iter().map(|row| row.id).collect())
    }

    /// Nodes that are connected according to the store.
    async fn connected(&mut self) -> Outcome<BTreeSet<NodeId>> {
        let ids: Vec<NodeId> = self.pis.iter().map(|pi| pi.id.clone()).collect();
        let found = self.store().nodes_by_id(&ids).await;
        let rows = self.heard("nodes", found)?.unwrap_or_default();
        Ok(rows.into_iter().filter(|row| row.connected).map(|row| row.id).collect())
    }

    /// Counts ends and other changes that only a round makes.
    fn count_ends(&mut self, before: &Rows, after: &Rows) {
        for (id, rows) in after {
            for row in rows {
                let Some(old) = before.get(id).and_then(|rows| rows.iter().find(|old| old.id == row.id)) else {
                    continue;
                };
                if row.overdue && !old.overdue {
                    self.counts.add("overdue");
                }
                if row.state == old.state {
                    continue;
                }
                match row.state {
                    ExecutionState::Expired => self.counts.add("expired"),
                    ExecutionState::Succeeded => self.counts.add("powered off, proved by a goodbye"),
                    ExecutionState::Failed => self.counts.add("given up after a day"),
                    _ => {}
                }
            }
        }
    }

    fn check_round(
        &self,
        asked: &Asked,
        before: &[ExecutionRow],
        after: &[ExecutionRow],
        connected: &BTreeSet<NodeId>,
    ) -> Outcome {
        let now = self.now();
        let is_new = |row: &&ExecutionRow| {
            let old = before.iter().find(|old| old.id == row.id);
            row.state == ExecutionState::Assigned && old.is_some_and(|old| old.state == ExecutionState::Pending)
        };
        let Some(fresh) = after.iter().find(is_new) else { return Ok(()) };
        // The window of all operations that have one is the first half of each hour.
        if asked.new.window.is_some() && now.minute() >= 30 {
            return Err(format!("{} is begun at {now}, outside of its window", fresh.id));
        }
        if asked.new.expire_time <= now {
            return Err(format!("{} is begun at {now}, and expired at {}", fresh.id, asked.new.expire_time));
        }
        let Some(rollout) = &asked.new.rollout else { return Ok(()) };
        // Overdue nodes and lost ones hold no slot, so that they do not stop a rollout forever.
        let at_work = |row: &&ExecutionRow| row.state.is_active() && !row.overdue && connected.contains(&row.id.node);
        let in_flight = after.iter().filter(at_work).count();
        let most = rollout.max_in_flight.map_or(usize::MAX, number);
        if in_flight > most {
            return Err(format!("{in_flight} at work at once, {most} may be: {after:?}"));
        }
        let failures = after.iter().filter(|row| failed(row) && !asked.forgiven.contains(&row.id.node)).count();
        if let Some(Limit::Number(most)) = rollout.max_failures
            && failures > number(most)
        {
            return Err(format!(
                "{failures} failed since it was resumed, {most} may, and more is given out: {after:?}"
            ));
        }
        Ok(())
    }

    /// Checks the invariants that hold at any time.
    pub(super) async fn check(&mut self) -> Outcome {
        self.check_nodes()?;
        let (mut active, mut needed): (BTreeSet<NodeId>, BTreeSet<String>) = Default::default();
        for place in 0..self.operations.len() {
            let asked = self.operations[place].clone();
            let Some(id) = asked.id.as_ref().filter(|id| !self.settled.contains(id)) else { continue };
            let Some(state) = self.state(id).await? else { continue };
            let rows = self.executions(id).await?;
            if rows.len() != asked.new.nodes.len() {
                // Without an answer of the database the list is empty, which proves nothing.
                if self.database.trouble().is_some() {
                    continue;
                }
                return Err(format!("{} of {} parts are there", rows.len(), asked.new.nodes.len()));
            }
            // A node that works again, or succeeded, can fail once more. No operator has forgiven that failure.
            let forgiven = |node: &NodeId| rows.iter().any(|row| row.id.node == *node && failed(row));
            self.operations[place].forgiven.retain(forgiven);
            if !state.is_final() {
                needed.extend(asked.new.action.image().map(|image| image.sha256.clone()));
            }
            // A node that was given up may still report another end, so its operation is not settled.
            let may_return =
                |row: &ExecutionRow| row.error.as_ref().is_some_and(|why| why.reason == reason::NEVER_RETURNED);
            if state.is_final() && !rows.iter().any(may_return) {
                self.settled.insert(id.clone());
            }
            for row in &rows {
                self.check_execution(&asked.new.action, row)?;
                if row.state.is_active() && !active.insert(row.id.node.clone()) {
                    return Err(format!("{} holds two executions", row.id.node));
                }
            }
        }
        self.check_bytes(needed).await
    }

    /// Checks that no node rebooted or powered off twice for one execution.
    fn check_nodes(&self) -> Outcome {
        // An agent of protocol 1 does not notice an older copy of its journal. Of what both the journal and a restored
        // database have lost, nobody knows.
        let forgets = |pi: &Pi| pi.torn.before_a_restore || (pi.torn.ever && pi.protocol == 1);
        for pi in self.pis.iter().filter(|pi| !forgets(pi)) {
            let mut seen = BTreeSet::new();
            if let Some((id, _)) = pi.log.iter().find(|(id, _)| !seen.insert(id)) {
                return Err(format!("{id} was done twice: {:?}", pi.log));
            }
        }
        Ok(())
    }

    fn check_execution(&mut self, action: &Action, row: &ExecutionRow) -> Outcome {
        let Some(pi) = self.pis.iter().find(|pi| pi.id == row.id.node) else { return Ok(()) };
        let done = pi.log.iter().find(|(id, _)| *id == row.id).map(|(_, off)| *off);
        let is_proved = match action {
            Action::Update(_) => pi.accepted.contains(&row.id),
            _ => done == Some(matches!(action, Action::PowerOff(_))),
        };
        if row.state == ExecutionState::Succeeded && !is_proved {
            return Err(format!("{} is SUCCEEDED, and the node's log has {done:?}", row.id));
        }
        let why = row.error.as_ref().map_or("", |error| error.reason.as_str());
        let said_by_node = pi.failures.get(&row.id).is_some_and(|reasons| reasons.contains(why));
        let by_operator = match why {
            reason::NEVER_RETURNED => true,
            reason::CONFLICT_ABANDONED => self.resolved.contains(&row.id.node),
            // Neither: the journal is gone, and with it an armed power-off that the agent's end kept from going on.
            reason::JOURNAL_LOST | reason::STILL_ON => pi.torn.ever,
            _ => false,
        };
        if row.state == ExecutionState::Failed && !said_by_node && !by_operator {
            return Err(format!("{} is FAILED, {:?}, and neither the node nor an operator said so", row.id, row.error));
        }
        self.check_end(row, why == reason::NEVER_RETURNED)
    }

    /// Checks that final states stay, and that an acknowledged end is stored.
    fn check_end(&mut self, row: &ExecutionRow, given_up: bool) -> Outcome {
        match self.ended.get(&row.id) {
            Some(end) if *end != row.state => return Err(format!("{} was {end} and is {}", row.id, row.state)),
            // A node that was given up may still report another end.
            None if row.state.is_final() && !given_up => {
                self.ended.insert(row.id.clone(), row.state);
            }
            _ => {}
        }
        match self.acked.get(&row.id) {
            Some(end) if !row.state.is_final() => {
                Err(format!("{} was acknowledged as {end} and is {}", row.id, row.state))
            }
            _ => Ok(()),
        }
    }

    /// Checks each execution again, and counts the ends.
    pub(super) async fn count_all(&mut self) -> Outcome {
        self.settled.clear();
        self.check().await?;
        // The check has settled them again, and `rows` skips settled ones.
        self.settled.clear();
        for row in self.rows().await?.into_values().flatten() {
            match row.state {
                ExecutionState::Succeeded => self.counts.add("succeeded"),
                ExecutionState::Failed => self.counts.add("failed"),
                ExecutionState::RolledBack => self.counts.add("rolled back"),
                _ => {}
            }
        }
        Ok(())
    }

    /// An execution that has not ended, if there is one.
    pub(super) async fn open_execution(&mut self) -> Outcome<Option<ExecutionRow>> {
        Ok(self.rows().await?.into_values().flatten().find(|row| !row.state.is_final()))
    }

    pub(super) async fn overdue_of_liars(&mut self) -> Outcome<Vec<ExecutionId>> {
        let rows = self.rows().await?.into_values().flatten();
        Ok(rows.filter(|row| row.overdue && self.liars.contains(&row.id.node)).map(|row| row.id).collect())
    }
}
