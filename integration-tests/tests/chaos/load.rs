//! The load: schedules, and a client that creates operations under request ids, and retries until each is acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::fleet::reboot;
use integration_tests::ledger::Dice;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{CreateOperationRequest, CreateScheduleRequest, PauseScheduleRequest, Schedule, schedule};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub(crate) const SCHEDULES: usize = 20;
/// Interval between the client's requests.
const EVERY: Duration = Duration::from_millis(400);
/// Time after which the client tries another controller.
const PATIENCE: Duration = seconds(5);

fn id(number: usize) -> String {
    format!("chaos-{number:02}")
}

/// Interval of the schedule with this id, in seconds.
pub(crate) fn period(id: &str) -> Result<u64> {
    let number: usize = id.trim_start_matches("chaos-").parse().context("the number of a schedule")?;
    Ok([6, 10, 12, 15, 20, 30].get(number % 6).copied().unwrap_or(30))
}

pub(crate) async fn create_schedules(fleet: &Fleet, ids: &[String], dice: &mut Dice) -> Result<()> {
    let mut client = ScheduleServiceClient::new(fleet.admin_channel());
    for number in 0..SCHEDULES {
        let nodes: BTreeSet<&String> = (0..3).filter_map(|_| ids.get(dice.below(ids.len()))).collect();
        let nodes: Vec<&String> = nodes.into_iter().collect();
        // Half of each policy: one leaves gaps that must have a reason, the other one queues.
        let overlap = if number % 2 == 0 { schedule::Overlap::Skip } else { schedule::Overlap::Queue };
        let request = CreateScheduleRequest {
            schedule: Some(Schedule {
                cron: format!("*/{} * * * * *", period(&id(number))?),
                time_zone: "Europe/Madrid".to_owned(),
                operation: Some(reboot(&nodes, Duration::ZERO)),
                overlap: overlap.into(),
                ..Schedule::default()
            }),
            schedule_id: id(number),
            ..CreateScheduleRequest::default()
        };
        client.create_schedule(request).await.with_context(|| format!("schedule {number}"))?;
    }
    Ok(())
}

pub(crate) async fn pause_schedules(fleet: &Fleet) -> Result<()> {
    for number in 0..SCHEDULES {
        wait_until(seconds(30), "a schedule is paused", async || {
            let mut client = ScheduleServiceClient::new(fleet.admin_channel());
            let name = format!("schedules/{}", id(number));
            // A controller may still be reconnecting to the database, so errors are retried.
            Ok(client.pause_schedule(PauseScheduleRequest { name, reason: "over".to_owned() }).await.ok().map(|_| ()))
        })
        .await?;
    }
    Ok(())
}

/// The client's request ids, each with its request, and with the operation once it was acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Asked(Mutex<BTreeMap<String, (CreateOperationRequest, Option<String>)>>);

impl Asked {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (CreateOperationRequest, Option<String>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Option<CreateOperationRequest> {
        self.lock().values().find(|(_, answer)| answer.is_none()).map(|(request, _)| request.clone())
    }

    /// Checks that a request id always stands for the same operation, on all controllers.
    fn answered(&self, request_id: &str, operation: &str) -> Result<()> {
        let mut asked = self.lock();
        let (_, answer) = asked.get_mut(request_id).context("it was never asked")?;
        let first = answer.get_or_insert_with(|| operation.to_owned());
        ensure!(first == operation, "{request_id} is {first} and {operation}");
        Ok(())
    }

    /// Checks that each acknowledged operation is stored, and that no request id stands for another one. Returns their
    /// number.
    pub(crate) fn compare(&self, stored: &[Value]) -> Result<usize> {
        let stored: BTreeMap<String, &str> = stored
            .iter()
            .filter_map(|row| Some((row["request_id"].as_str()?.to_owned(), row["id"].as_str()?)))
            .collect();
        let asked = self.lock();
        for (request_id, (_, answer)) in asked.iter() {
            let answer = answer.as_deref().with_context(|| format!("{request_id} was never answered"))?;
            let kept = stored.get(request_id).with_context(|| format!("{answer} was acknowledged and is lost"))?;
            ensure!(answer == format!("operations/{kept}"), "{request_id} is {answer} and {kept}");
        }
        // Fewer would be lost, and more would be duplicates.
        ensure!(stored.len() == asked.len(), "{} were asked for, {} are stored", asked.len(), stored.len());
        Ok(asked.len())
    }
}

/// Creates operations until `stop`. Unacknowledged requests are retried at any controller; acknowledged ones are never
/// repeated.
pub(crate) async fn ask(
    channels: Vec<Channel>,
    ids: Vec<String>,
    asked: std::sync::Arc<Asked>,
    mut dice: Dice,
    stop: CancellationToken,
) {
    let mut number = 0_usize;
    while !stop.is_cancelled() {
        // At another controller than the first time, most likely: the request id must be unique in the database.
        let again = if dice.below(3) == 0 { asked.open() } else { None };
        let request = again.unwrap_or_else(|| {
            number += 1;
            let node = ids.get(dice.below(ids.len())).map_or("", String::as_str);
            let request_id = format!("ask-{number}");
            let request = CreateOperationRequest {
                operation: Some(reboot(&[node], Duration::ZERO)),
                request_id: request_id.clone(),
            };
            asked.lock().insert(request_id, (request.clone(), None));
            request
        });
        if let Some(channel) = channels.get(dice.below(channels.len())) {
            submit(channel, &asked, request).await;
        }
        // Paces the load: there is no condition to wait for.
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn submit(channel: &Channel, asked: &Asked, request: CreateOperationRequest) {
    let request_id = request.request_id.clone();
    let mut client = OperationServiceClient::new(channel.clone());
    // An error proves nothing: the operation may be stored although its answer was lost.
    let answer = tokio::time::timeout(PATIENCE, client.create_operation(request)).await;
    if let Ok(Ok(operation)) = answer {
        asked.answered(&request_id, &operation.into_inner().name).expect("a request id has one operation");
    }
}

/// Retries all unacknowledged requests until each is acknowledged.
pub(crate) async fn settle(asked: &Asked, fleet: &Fleet) -> Result<()> {
    wait_until(seconds(60), "everything is acknowledged", async || {
        let Some(request) = asked.open() else { return Ok(Some(())) };
        submit(&fleet.admin_channel(), asked, request).await;
        Ok(None)
    })
    .await
}
