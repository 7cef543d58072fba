//! Operations: builds them, asks the controller for them, and waits for their end.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::operation::{Action, Target};
use marco_proto::v1::{Board, CreateJoinTokenRequest, EnrollRequest};
use marco_proto::v1::{
    CancelOperationRequest, CreateOperationRequest, Execution, GetOperationRequest, ListExecutionsRequest, NodeList,
    Operation, PowerOff, Reboot, Update, execution, operation,
};
use tonic::Status;

use super::Fleet;
use crate::certs::NodeKey;
use crate::client::Credentials;
use crate::wait::wait_until;

/// An operation that reboots nodes after a notice.
pub fn reboot<T: AsRef<str>>(nodes: &[T], notice: Duration) -> Operation {
    let reboot = Reboot { notice: Some(length(notice)), message: "a test restarts this node".to_owned() };
    on(nodes, Action::Reboot(reboot))
}

/// An operation that powers nodes off at once.
pub fn poweroff<T: AsRef<str>>(nodes: &[T]) -> Operation {
    on(nodes, Action::PowerOff(PowerOff { notice: Some(length(Duration::ZERO)), message: String::new() }))
}

/// An operation that installs an image (or, if `image` is empty, boot files) on nodes, without notice.
pub fn update<T: AsRef<str>>(nodes: &[T], image: &str, bootcode: &str) -> Operation {
    let update = Update {
        image: image.to_owned(),
        bootcode: bootcode.to_owned(),
        notice: Some(length(Duration::ZERO)),
        ..Update::default()
    };
    on(nodes, Action::Update(update))
}

fn on<T: AsRef<str>>(nodes: &[T], action: Action) -> Operation {
    let nodes = nodes.iter().map(|id| format!("nodes/{}", id.as_ref())).collect();
    Operation { action: Some(action), target: Some(Target::Nodes(NodeList { nodes })), ..Operation::default() }
}

fn length(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

/// The name of an operation's execution on a node.
pub fn execution_name(operation: &Operation, id: &str) -> String {
    format!("{}/executions/{id}", operation.name)
}

impl Fleet {
    /// Enrols a node that no agent runs for, and returns its credentials for the API.
    pub async fn enrol_by_hand(&self, id: &str, require_approval: bool) -> Result<Credentials> {
        let request = CreateJoinTokenRequest { require_approval, ..CreateJoinTokenRequest::default() };
        let token = self.nodes().create_join_token(request).await?.into_inner().token;
        let key = NodeKey::generate()?;
        let channel = self.admin().anonymous().channel(self.addresses().enroll)?;
        let request = EnrollRequest {
            token,
            certificate_request: key.request(&key)?.pem,
            node_id: id.to_owned(),
            board: Some(Board::default()),
        };
        let enrolled = EnrollmentServiceClient::new(channel).enroll(request).await?.into_inner();
        Ok(Credentials { ca: enrolled.ca_certificate, identity: Some((enrolled.certificate, key.pem())) })
    }

    /// Creates an operation, as admin.
    pub async fn create(&self, operation: Operation) -> Result<Operation, Status> {
        let request = CreateOperationRequest { operation: Some(operation), request_id: String::new() };
        Ok(self.operations().create_operation(request).await?.into_inner())
    }

    /// Reads the operation's present state.
    pub async fn operation(&self, name: &str) -> Result<Operation> {
        Ok(self.operations().get_operation(GetOperationRequest { name: name.to_owned() }).await?.into_inner())
    }

    /// Asks the controller to cancel the operation.
    pub async fn cancel(&self, name: &str) -> Result<Operation, Status> {
        Ok(self.operations().cancel_operation(CancelOperationRequest { name: name.to_owned() }).await?.into_inner())
    }

    /// All executions of the operation.
    pub async fn executions(&self, name: &str) -> Result<Vec<Execution>> {
        let parent = name.to_owned();
        let request = ListExecutionsRequest { parent, page_size: 1000, ..ListExecutionsRequest::default() };
        let page = self.operations().list_executions(request).await?.into_inner();
        // No operation of these tests has more nodes than one page, so that paging is left out.
        if !page.next_page_token.is_empty() {
            bail!("more executions than a page has");
        }
        Ok(page.executions)
    }

    /// The operation's execution on a node.
    pub async fn execution(&self, operation: &str, id: &str) -> Result<Execution> {
        let executions = self.executions(operation).await?;
        let node = format!("nodes/{id}");
        executions
            .into_iter()
            .find(|execution| execution.node == node)
            .with_context(|| format!("{operation} has no execution on {id}"))
    }

    /// Waits until `wanted` accepts the execution. Errors of the controller are retried: it may be restarting.
    pub async fn execution_becomes(
        &self,
        operation: &str,
        id: &str,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&Execution) -> bool,
    ) -> Result<Execution> {
        wait_until(limit, &format!("the execution on {id}: {what}"), async || {
            let Ok(execution) = self.execution(operation, id).await else { return Ok(None) };
            if wanted(&execution) {
                return Ok(Some(execution));
            }
            // A final state never changes, so that waiting for the limit would only hide the reason.
            if is_final(execution.state()) {
                bail!("the execution ended before it was {what}: {execution:?}");
            }
            Ok(None)
        })
        .await
    }

    /// Waits until the execution is in this state.
    pub async fn execution_is(
        &self,
        operation: &str,
        id: &str,
        limit: Duration,
        state: execution::State,
    ) -> Result<Execution> {
        let what = state.as_str_name();
        self.execution_becomes(operation, id, limit, what, |execution| execution.state() == state).await
    }

    /// Waits until the operation has ended, and fails unless it ended in the state `wanted`.
    pub async fn ends(&self, name: &str, limit: Duration, wanted: operation::State) -> Result<Operation> {
        let ended = wait_until(limit, &format!("{name} ends"), async || {
            // A controller that restarts does not answer for a moment.
            let Ok(operation) = self.operation(name).await else { return Ok(None) };
            Ok(operation.finish_time.is_some().then_some(operation))
        })
        .await;
        let executions = self.executions(name).await?;
        let told: Vec<String> = executions.iter().take(5).map(|execution| format!("{execution:?}")).collect();
        let told = told.join("\n");
        let operation = ended.with_context(|| format!("its executions are\n{told}"))?;
        if operation.state() != wanted {
            bail!("{name} ended {}, not {}:\n{told}", operation.state().as_str_name(), wanted.as_str_name());
        }
        if let Some(open) = executions.iter().find(|execution| !is_final(execution.state())) {
            bail!("{name} ended with an open execution: {open:?}");
        }
        Ok(operation)
    }

    /// Creates an operation, waits until it has succeeded, and returns it.
    pub async fn succeeds(&self, operation: Operation, limit: Duration) -> Result<Operation> {
        let created = self.create(operation).await?;
        self.ends(&created.name, limit, operation::State::Succeeded).await
    }
}

/// True for states that an execution never leaves.
pub fn is_final(state: execution::State) -> bool {
    use execution::State;
    // Every state is named, so that a new one does not compile until it is sorted in here.
    match state {
        State::Succeeded | State::Failed | State::RolledBack | State::Cancelled | State::Expired => true,
        State::Unspecified
        | State::Pending
        | State::Assigned
        | State::Running
        | State::Rebooting
        | State::Verifying => false,
    }
}
