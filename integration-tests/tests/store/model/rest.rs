//! Liveness: after all faults are healed, every execution ends.

use std::collections::BTreeSet;

use chrono::TimeDelta;
use marco_controller::operation::OperationState;
use marco_controller::store::OperationQuery;
use marco_proto::names::OperationId;
use node_agent::job::Mode;

use super::counts::Counts;
use super::world::{Outcome, World};
use super::{CONTROLLERS, PIS};

/// Turns until everything must have ended, once all faults are healed.
const REST: usize = 160;
/// One in this many turns takes long, so that windows open and time limits run out.
const LONG_TURN: usize = 24;
/// Turn from which operators resolve conflicts between nodes and the store. Late, so that a history that can end
/// without them does.
const DECIDE: usize = 50;

impl World {
    pub(super) async fn comes_to_rest(mut self) -> Outcome<Counts> {
        let mut open = String::new();
        for turn in 0..REST {
            self.database.heal();
            for number in 0..CONTROLLERS {
                self.start(number).await?;
            }
            for number in 0..self.operations.len() {
                // A caller without an answer repeats its request. `send` may remove a request that cannot succeed any
                // more, so the length is not the one of the loop's beginning.
                if self.operations.get(number).is_some_and(|asked| asked.id.is_none()) {
                    self.send(number).await?;
                }
            }
            self.store_ends().await?;
            for number in 0..PIS {
                self.node_goes_on(number, turn).await?;
            }
            self.operators_go_on(turn).await?;
            let wait = if turn % LONG_TURN == LONG_TURN - 1 { TimeDelta::minutes(31) } else { TimeDelta::seconds(5) };
            self.clock.advance(wait);
            for number in 0..CONTROLLERS {
                self.round(number).await?;
            }
            self.check().await?;
            match self.what_is_open().await? {
                None => return self.rests().await,
                Some(what) => open = what,
            }
        }
        Err(format!("it never ends: {open}"))
    }

    async fn node_goes_on(&mut self, number: usize, turn: usize) -> Outcome {
        let now = self.now();
        // An installer without a job would wait forever. A technician takes the card out and writes a system onto it.
        if self.pis[number].mode == Mode::Installer && self.pis[number].unfinished().is_none() {
            self.cut_power(number).await?;
        }
        self.pis[number].boot(true, now).await?;
        if self.pis[number].link.as_ref().is_none_or(|link| !self.is_live(link)) {
            self.connect(number, (number + turn) % CONTROLLERS, false).await?;
        }
        self.read(number).await?;
        self.work(number).await?;
        self.say_all(number).await
    }

    async fn operators_go_on(&mut self, turn: usize) -> Outcome {
        for (place, asked) in self.operations.clone().iter().enumerate() {
            let Some(id) = asked.id.as_ref().filter(|id| !self.settled.contains(id)) else { continue };
            if self.state(id).await? == Some(OperationState::Paused) {
                self.steer_one(place, id, "resume").await?;
            }
        }
        if turn >= DECIDE {
            for number in 0..PIS {
                // A lie must not be accepted: the delivery that it claims never existed.
                let lied = self.liars.contains(&self.pis[number].id);
                self.resolve(number, !lied).await?;
            }
            for id in self.overdue_of_liars().await? {
                self.abandon_one(&id).await?;
            }
        }
        Ok(())
    }

    async fn what_is_open(&mut self) -> Outcome<Option<String>> {
        if let Some(asked) = self.operations.iter().find(|asked| asked.id.is_none()) {
            return Ok(Some(format!("{:?} was not answered", asked.new.request)));
        }
        if let Some(row) = self.open_execution().await? {
            return Ok(Some(format!("{row:?}")));
        }
        for pi in &self.pis {
            if let Some(entry) = pi.entries().iter().find(|entry| !entry.state.is_final() || !entry.is_acked()) {
                return Ok(Some(format!("{} is not settled: {entry:?}", pi.id)));
            }
        }
        for number in 0..PIS {
            let row = self.store().node(&self.pis[number].id).await.map_err(|error| format!("{error:?}"))?;
            if let Some(conflict) = row.and_then(|row| row.conflicts.into_iter().find(|conflict| conflict.holds)) {
                return Ok(Some(format!("{conflict:?}")));
            }
        }
        Ok(None)
    }

    /// Checks that the store holds the acknowledged operations and no others.
    async fn rests(mut self) -> Outcome<Counts> {
        let query = OperationQuery { limit: 1000, ..OperationQuery::default() };
        let found = self.store().operations(&query).await.map_err(|error| format!("{error:?}"))?;
        let found: BTreeSet<OperationId> = found.into_iter().map(|row| row.id).collect();
        let acknowledged: BTreeSet<OperationId> = self.acknowledged().into_iter().map(|(id, _)| id).collect();
        if found != acknowledged {
            return Err(format!("operations are stored that nobody knows of: {found:?}, not {acknowledged:?}"));
        }
        self.check_shelf().await?;
        self.count_all().await?;
        Ok(self.counts)
    }
}
