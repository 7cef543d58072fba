//! What has to be true of a world: at any time, and of each round.

use std::collections::BTreeSet;

use marco_controller::operation::{Action, ExecutionState};
use marco_controller::rollout::Limit;
use marco_controller::store::ExecutionRow;
use marco_proto::names::{NodeId, OperationId};

use super::world::{Outcome, World, failed};

impl World {
    /// A round does not fail, and gives out no more than the rollouts allow.
    pub(super) async fn round(&mut self, number: usize) -> Outcome {
        if !self.controllers[number].is_alive {
            return Ok(());
        }
        let before = self.assigned().await?;
        let round = self.controllers[number].dispatcher.round(true).await;
        round.map_err(|error| format!("a round failed: {error:?}"))?;
        let after = self.assigned().await?;
        let fresh: BTreeSet<&OperationId> = after.difference(&before).map(|(id, _)| &id.operation).collect();
        for operation in &self.operations {
            let Some(rollout) = operation.rollout.as_ref().filter(|_| fresh.contains(&operation.id)) else { continue };
            let rows = self.executions(&operation.id).await?;
            let connected = |row: &&ExecutionRow| self.pis.iter().any(|pi| pi.id == row.id.node && pi.link.is_some());
            let in_flight = rows.iter().filter(|row| row.state.is_active() && !row.overdue).filter(connected).count();
            let most = rollout.max_in_flight.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
            if in_flight > most {
                return Err(format!("{in_flight} at work at once, {most} may be: {rows:?}"));
            }
            let failures = rows.iter().filter(|row| failed(row) && !operation.forgiven.contains(&row.id.node)).count();
            if let Some(Limit::Number(most)) = rollout.max_failures
                && failures > usize::try_from(most).unwrap_or(usize::MAX)
            {
                return Err(format!(
                    "{failures} failed since it was resumed, {most} may, and more is given out: {rows:?}"
                ));
            }
        }
        Ok(())
    }

    /// What is true at any time.
    pub(super) async fn check(&mut self) -> Outcome {
        let mut active: BTreeSet<NodeId> = BTreeSet::new();
        for operation in &self.operations {
            self.state(&operation.id).await?;
            let rows = self.executions(&operation.id).await?;
            if rows.len() != operation.nodes {
                return Err(format!("{} of {} parts are there", rows.len(), operation.nodes));
            }
            for row in rows {
                let Some(pi) = self.pis.iter().find(|pi| pi.id == row.id.node) else { continue };
                let done: Vec<bool> = pi.log.iter().filter(|(id, _)| *id == row.id).map(|(_, off)| *off).collect();
                if done.len() > 1 {
                    return Err(format!("{} was done {} times", row.id, done.len()));
                }
                let proved = done.first() == Some(&matches!(operation.action, Action::PowerOff(_)));
                if row.state == ExecutionState::Succeeded && !proved && !self.liars.contains(&row.id.node) {
                    return Err(format!("{} is SUCCEEDED, and the node's log has {done:?}", row.id));
                }
                if row.state.is_active() && !active.insert(row.id.node.clone()) {
                    return Err(format!("{} holds two executions", row.id.node));
                }
                let given_up = row.error.as_ref().is_some_and(|error| error.reason == "NEVER_RETURNED");
                match self.ended.get(&row.id) {
                    Some(end) if *end != row.state => return Err(format!("{} was {end} and is {}", row.id, row.state)),
                    // One that was given up may still tell how it ended.
                    None if row.state.is_final() && !given_up => {
                        self.ended.insert(row.id, row.state);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}
