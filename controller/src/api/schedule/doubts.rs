//! Findings about a schedule that are allowed but rarely intended. They are shown at its creation or change. None is an
//! error, because nodes, labels and artifacts may appear before the first fire.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};

use super::super::operation::Operations;
use super::super::status::ApiError;
use super::Schedules;
use crate::calendar::later;
use crate::operation::{Action, Target};
use crate::schedule::Recurrence;
use crate::store::{NodeQuery, ScheduleRow};

/// Times that are closer than this are more likely a surplus field than intended.
const OFTEN: TimeDelta = TimeDelta::seconds(60);
/// A first time that is further away than this is more likely a typing error than intended.
const FAR: TimeDelta = TimeDelta::days(10 * 366);

impl Schedules {
    /// The findings as sentences.
    ///
    /// # Errors
    /// Returns the store's error.
    pub(super) async fn doubts(&self, row: &ScheduleRow, now: DateTime<Utc>) -> Result<Vec<String>, ApiError> {
        let mut doubts = of_its_times(row, now);
        // The errors that a fire would get now.
        let operations = Operations::new(self.context.clone());
        let refused = |error: ApiError| match error {
            ApiError::Store(error) => Err(ApiError::Store(error)),
            refused => Ok(format!("a fire would be skipped now: {refused}")),
        };
        let targets = match operations.resolve(&row.template.target, &row.scope).await {
            Ok(targets) => Some(targets),
            // All nodes, present or future: that names no missing one.
            Err(ApiError::Precondition { .. }) if row.template.target == Target::All => None,
            Err(error) => {
                doubts.push(refused(error)?);
                None
            }
        };
        if let Action::Update(update) = &row.template.action {
            let families = targets.as_ref().map(|targets| targets.families.clone()).unwrap_or_default();
            let frozen = operations.freeze(&mut update.clone(), &families).await;
            let startable = frozen.and_then(|facts| match &targets {
                Some(targets) => targets.startable(&row.template.action, facts.as_ref()),
                None => Ok(()),
            });
            if let Err(error) = startable {
                doubts.push(refused(error)?);
            }
        }
        // Approved or not: a misspelt label matches no node at all.
        if let Target::Labels(labels) = &row.template.target
            && self.context.store.nodes(&NodeQuery { limit: 1, ..with(row, labels.clone()) }).await?.is_empty()
        {
            let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            doubts.push(format!("no node has the label {}", pairs.join(",")));
        }
        if let Some(key) = row.template.rollout.as_ref().and_then(|rollout| rollout.group_by.as_ref()) {
            let nodes = self.context.store.nodes(&NodeQuery { limit: u32::MAX, ..with(row, BTreeMap::new()) }).await?;
            if !nodes.iter().any(|node| node.labels.contains_key(key)) {
                doubts.push(format!("no node has a label {key:?}, by which its nodes are grouped"));
            }
        }
        Ok(doubts)
    }
}

/// Nodes with these labels that the schedule can reach.
fn with(row: &ScheduleRow, labels: BTreeMap<String, String>) -> NodeQuery {
    NodeQuery { labels, scope: row.scope.clone(), ..NodeQuery::default() }
}

fn of_its_times(row: &ScheduleRow, now: DateTime<Utc>) -> Vec<String> {
    let Ok(recurrence) = Recurrence::parse(&row.cron, &row.time_zone) else { return Vec::new() };
    let fires: Vec<DateTime<Utc>> = recurrence.fires_after(now).take(3).collect();
    let closest = fires.windows(2).filter_map(|pair| Some(pair.last()?.signed_duration_since(*pair.first()?))).min();
    let mut doubts = Vec::new();
    if let Some(apart) = closest.filter(|apart| *apart < OFTEN) {
        doubts.push(format!(
            "{:?} fires each {} s ({}); with six fields the first is the second",
            row.cron,
            apart.num_seconds(),
            recurrence.words()
        ));
    }
    if let Some(first) = fires.first().filter(|first| **first > later(now, FAR)) {
        doubts.push(format!("{:?} fires first in more than ten years, at {}", row.cron, first.to_rfc3339()));
    }
    doubts
}
