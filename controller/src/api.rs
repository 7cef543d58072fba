//! The gRPC services. They read and check requests, and answer from the store. Only this module knows the proto types.

mod access;
mod agent;
mod artifact;
mod convert;
pub(crate) mod downloads;
mod enrollment;
mod explain;
mod node;
mod operation;
mod outbox;
mod page;
mod peers;
mod remedy;
mod schedule;
mod scope;
mod status;
mod watch;

use std::sync::Arc;

use marco_proto::v1::access_service_server::AccessServiceServer;
use marco_proto::v1::agent_service_server::AgentServiceServer;
use marco_proto::v1::artifact_service_server::ArtifactServiceServer;
use marco_proto::v1::enrollment_service_server::EnrollmentServiceServer;
use marco_proto::v1::node_service_server::NodeServiceServer;
use marco_proto::v1::operation_service_server::OperationServiceServer;
use marco_proto::v1::schedule_service_server::ScheduleServiceServer;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::{Routes, RoutesBuilder};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::artifacts::Artifacts;
use crate::clock::Clock;
use crate::identity::access::Access;
use crate::identity::ca::Ca;
use crate::identity::calls::MAX_MESSAGE;
use crate::identity::gate::code_word;
use crate::identity::record::{self, OK};
use crate::identity::{Caller, shown};
use crate::sessions::Sessions;
use crate::store::{AuditRow, ControllerRow, Record, Store};

pub(crate) use artifact::{judge_stored, remove_unneeded, sweep};
pub use downloads::Downloads;
pub(crate) use peers::{fetcher, others_serve};
pub use schedule::prepare_fire;
pub use status::{ApiError, Violation};

/// Largest message to reflection, whose requests are names.
const REFLECTION_MESSAGE: usize = 16 << 10;

macro_rules! limited {
    ($server:ident, $service:expr) => {
        $server::new($service).max_decoding_message_size(MAX_MESSAGE)
    };
}

/// The parts of the controller that every service uses.
#[derive(Clone)]
pub struct Context {
    /// The store: the only truth.
    pub store: Store,
    /// Admission of callers.
    pub access: Arc<Access>,
    /// The live sessions.
    pub sessions: Arc<Sessions>,
    /// The stored files.
    pub artifacts: Arc<Artifacts>,
    /// Downloads under way.
    pub downloads: Downloads,
    /// Issues certificates.
    pub ca: Arc<Ca>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// This controller's id, as in the rows of its nodes.
    pub controller: String,
    /// Addresses at which agents reach this controller.
    pub addresses: Vec<String>,
    /// True while this controller does its work; the state of the health service.
    pub serving: channel::Receiver<bool>,
    /// The tasks of streams, awaited at the end.
    pub tasks: TaskTracker,
    /// Cancelled when the controller stops.
    pub stop: CancellationToken,
}

impl Context {
    /// Addresses of the live controllers, this one first.
    async fn live_addresses(&self) -> Vec<String> {
        let mut addresses = self.addresses.clone();
        match self.store.live_controllers(self.clock.now()).await {
            Ok(live) => {
                for address in live.iter().flat_map(ControllerRow::addresses) {
                    if !addresses.iter().any(|known| known == address) {
                        addresses.push(address.to_owned());
                    }
                }
            }
            // The agent keeps the addresses that it has.
            Err(error) => tracing::debug!(error = &*crate::chain(&error), "the live controllers are not known"),
        }
        addresses
    }

    /// The record of a call, which is stored with the call's change.
    fn record(&self, caller: &Caller, method: &str, target: &str) -> Arc<Record> {
        let record = Record::new(record::cleaned(self.row(caller, method, target)));
        caller.record_with_change(Arc::clone(&record));
        record
    }

    fn row(&self, caller: &Caller, method: &str, target: &str) -> AuditRow {
        AuditRow {
            time: self.clock.now(),
            actor: caller.name.clone(),
            credential: caller.credential(),
            from: shown(caller.from).to_string(),
            method: method.to_owned(),
            target: target.to_owned(),
            result: OK.to_owned(),
            message: String::new(),
        }
    }

    /// Records a call that was refused, or changed nothing. A change is recorded in its own transaction.
    async fn audit<T>(&self, caller: &Caller, method: &str, target: &str, result: &Result<T, ApiError>) {
        if let Some(row) = caller.recorded_with_change() {
            return record::log(&row, Some(caller.from.ip()));
        }
        caller.leave_recording();
        let mut row = self.row(caller, method, target);
        if let Err(error) = result {
            code_word(error.code()).clone_into(&mut row.result);
            row.message = error.to_string();
        }
        self.access.recorder().record(row, Some(caller.from.ip())).await;
    }
}

/// The caller, which the gate has put there; no call passes without it.
fn caller<T>(request: &tonic::Request<T>) -> Result<Caller, ApiError> {
    request.extensions().get::<Caller>().cloned().ok_or_else(|| ApiError::Unauthenticated {
        reason: "NO_CREDENTIALS",
        message: "the call carries no client certificate".to_owned(),
    })
}

/// The services of the API listener, behind the gate: reflection (both versions; older clients speak only the alpha),
/// health, and ours.
///
/// # Errors
/// Returns an error if the descriptor set cannot serve reflection.
pub async fn routes(context: &Context) -> Result<Routes, tonic_reflection::server::Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(marco_proto::DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // Clients that work from reflection can then show the details of an error.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    // The empty name stands for the whole server (grpc.health.v1).
    reporter.set_service_status("", ServingStatus::Serving).await;
    context.tasks.spawn(report_health(reporter, context.serving.clone(), context.stop.clone()));

    let mut routes = RoutesBuilder::default();
    routes
        .add_service(reflection().build_v1()?.max_decoding_message_size(REFLECTION_MESSAGE))
        .add_service(reflection().build_v1alpha()?.max_decoding_message_size(REFLECTION_MESSAGE))
        .add_service(health)
        .add_service(limited!(AccessServiceServer, access::Doors::new(context.clone())))
        .add_service(limited!(AgentServiceServer, agent::Agent::new(context.clone())))
        .add_service(limited!(ArtifactServiceServer, artifact::ArtifactsApi::new(context.clone())))
        .add_service(limited!(NodeServiceServer, node::Nodes::new(context.clone())))
        .add_service(limited!(OperationServiceServer, operation::Operations::new(context.clone())))
        .add_service(limited!(ScheduleServiceServer, schedule::Schedules::new(context.clone())));
    Ok(routes.routes())
}

/// Reports the watchdog's state in the health service, until cancelled.
async fn report_health(reporter: HealthReporter, mut serving: channel::Receiver<bool>, stop: CancellationToken) {
    loop {
        let status = if *serving.borrow_and_update() { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        // Dropping the wait on a stop loses nothing.
        tokio::select! {
            () = stop.cancelled() => return,
            changed = serving.changed() => if changed.is_err() {
                return;
            }
        }
    }
}

/// The service of the enrolment listener.
pub fn enrollment_routes(context: &Context) -> Routes {
    Routes::new(limited!(EnrollmentServiceServer, enrollment::Enrollments::new(context.clone())))
}
