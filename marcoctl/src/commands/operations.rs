//! `marcoctl operations`.

mod create;
mod show;

pub(super) use create::{insist, rollout, target, window};
pub(super) use show::{manner, operation as operation_text};

use marco_proto::names::{ExecutionId, NodeId, OperationId};
use marco_proto::v1::execution::State;
use marco_proto::v1::{
    AbandonExecutionRequest, CancelOperationRequest, Execution, ExecutionFilter, ExplainExecutionRequest,
    GetExecutionLogRequest, GetOperationRequest, ListEventsRequest, ListEventsResponse, ListExecutionsRequest,
    ListExecutionsResponse, ListOperationsRequest, ListOperationsResponse, OperationFilter, PauseOperationRequest,
    ResumeOperationRequest, operation,
};
use tokio::time::Instant;

use super::all_pages;
use crate::args::{
    ExecutionStateArg, ListOperations, OneExecution, OperationStateArg, OperationsCommand, WhichExecutions,
};
use crate::clock;
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::follow::{End, Until, follow};
use crate::output::{Out, fields};
use crate::progress::View;

/// Page size for calls that need all executions.
const PAGE_SIZE: i32 = 1000;

pub(super) async fn run(command: OperationsCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    match command {
        OperationsCommand::Reboot(flags) => create::reboot(flags, connection, out).await,
        OperationsCommand::PowerOff(flags) => create::power_off(flags, connection, out).await,
        OperationsCommand::Update(flags) => create::update(flags, connection, out).await,
        OperationsCommand::Retry { operation, wait, force } => {
            create::retry(operation, &wait, force, connection, out).await
        }
        OperationsCommand::List(flags) => list(flags, connection, out).await,
        OperationsCommand::Get { operation } => {
            let request = GetOperationRequest { name: operation.clone() };
            let found = connection.operations().get_operation(call(request)).await?.into_inner();
            // The JSON document is the message itself, as for every other `get`.
            if out.is_json() {
                return out.document(&found, show::operation);
            }
            let executions = executions(&operation, Vec::new(), PAGE_SIZE, connection).await?;
            out.line(&show::operation(&found, clock::now()))?;
            out.line(&show::executions(&executions, clock::now()))
        }
        OperationsCommand::Executions { operation, state, paging } => {
            let states = state.into_iter().map(|state| execution_state(state).into()).collect();
            let executions = executions(&operation, states, paging.page_size, connection).await?;
            let list = ListExecutionsResponse { executions, ..Default::default() };
            out.document(&list, |list, now| show::executions(&list.executions, now))
        }
        OperationsCommand::Watch { operation, timeout } => watch(&operation, timeout, connection, out).await,
        OperationsCommand::Cancel { operation } => {
            let request = CancelOperationRequest { name: operation };
            out.document(&connection.operations().cancel_operation(call(request)).await?.into_inner(), show::operation)
        }
        OperationsCommand::Pause { operation, reason } => {
            let request = PauseOperationRequest { name: operation, reason };
            out.document(&connection.operations().pause_operation(call(request)).await?.into_inner(), show::operation)
        }
        OperationsCommand::Resume { operation } => {
            let request = ResumeOperationRequest { name: operation };
            out.document(&connection.operations().resume_operation(call(request)).await?.into_inner(), show::operation)
        }
        OperationsCommand::Explain(which) => explain(which, connection, out).await,
        OperationsCommand::Log(one) => {
            let name = one_execution(&one, "what one of its nodes logged is shown", "log")?;
            let request = GetExecutionLogRequest { name };
            let log = connection.operations().get_execution_log(call(request)).await?.into_inner();
            out.document(&log, |log, _| show::log(log))
        }
        OperationsCommand::Abandon(one) => {
            let name = one_execution(&one, "one of its nodes is given up", "abandon")?;
            let request = AbandonExecutionRequest { name };
            let execution = connection.operations().abandon_execution(call(request)).await?.into_inner();
            out.document(&execution, |execution, now| show::executions(std::slice::from_ref(execution), now))
        }
        OperationsCommand::Events { operation, paging } => {
            let events = all_pages(async |page_token| {
                let request = ListEventsRequest { parent: operation.clone(), page_size: paging.page_size, page_token };
                let page = connection.operations().list_events(call(request)).await?.into_inner();
                Ok((page.events, page.next_page_token))
            })
            .await?;
            out.document(&ListEventsResponse { events, ..Default::default() }, |list, _| show::events(&list.events))
        }
    }
}

async fn list(flags: ListOperations, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let states: Vec<i32> = flags.state.iter().map(|state| operation_state(*state).into()).collect();
    let wanted = !states.is_empty() || !flags.node.is_empty();
    let filter = wanted.then_some(OperationFilter { states, node: flags.node });
    let operations = all_pages(async |page_token| {
        let request = ListOperationsRequest { page_size: flags.paging.page_size, page_token, filter: filter.clone() };
        let page = connection.operations().list_operations(call(request)).await?.into_inner();
        Ok((page.operations, page.next_page_token))
    })
    .await?;
    out.document(&ListOperationsResponse { operations, ..Default::default() }, |list, now| {
        show::operations(&list.operations, now)
    })
}

async fn executions(
    operation: &str,
    states: Vec<i32>,
    page_size: i32,
    connection: &Connection,
) -> Result<Vec<Execution>, Failure> {
    let filter = (!states.is_empty()).then_some(ExecutionFilter { states });
    all_pages(async |page_token| {
        let request =
            ListExecutionsRequest { parent: operation.to_owned(), page_size, page_token, filter: filter.clone() };
        let page = connection.operations().list_executions(call(request)).await?.into_inner();
        Ok((page.executions, page.next_page_token))
    })
    .await
}

async fn watch(
    operation: &str,
    timeout: Option<std::time::Duration>,
    connection: &Connection,
    out: &mut Out,
) -> Result<(), Failure> {
    // Checked: an absurd duration means no deadline, not a panic.
    let until = Until { deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)), stuck: false };
    let mut view = View::for_watch(out);
    let followed = follow(connection, operation, until, &mut view, out).await;
    view.finish();
    let (known, end) = followed?;
    if !out.is_json() && end == End::Ended {
        out.line(&show::results(&known))?;
    }
    create::verdict(&known, end, operation, connection).await
}

/// Explains one execution, or every execution that has not succeeded.
async fn explain(which: WhichExecutions, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let ask = async |name: String| {
        let request = ExplainExecutionRequest { name };
        Ok::<_, Failure>(connection.operations().explain_execution(call(request)).await?.into_inner())
    };
    if let Some(name) = execution_name(&which.operation, which.node.as_deref())? {
        return out.document(&ask(name).await?, |explained, _| show::explanation(explained));
    }
    let mut open = executions(&which.operation, Vec::new(), PAGE_SIZE, connection).await?;
    open.retain(|execution| execution.state() != State::Succeeded);
    if out.is_json() {
        let mut explained = Vec::new();
        for execution in open {
            explained.push(ask(execution.name).await?);
        }
        return out.documents("explanations", &explained);
    }
    if open.is_empty() {
        return out.line(fields(&[(&which.operation, "every node succeeded".to_owned())]).trim_end());
    }
    let mut texts = Vec::new();
    // One call per group: explaining hundreds of nodes that wait for the same reason would take as many calls.
    for alike in show::alike(&open) {
        let Some(first) = alike.first() else { continue };
        texts.push(show::explanation_of_all(&alike, &ask(first.name.clone()).await?));
    }
    out.line(texts.join("\n").trim_end())
}

/// Returns the name of the execution that a command is about.
fn one_execution(one: &OneExecution, what: &str, command: &str) -> Result<String, Failure> {
    execution_name(&one.operation, one.node.as_deref())?.ok_or_else(|| Failure::Usage {
        message: format!("{} is an operation, and {what}: which?", one.operation),
        hint: format!("marcoctl operations {command} OPERATION NODE"),
    })
}

/// Parses an execution's name from operation and node, or from a full name. `None`: only an operation is given.
fn execution_name(operation: &str, node: Option<&str>) -> Result<Option<String>, Failure> {
    let wrong = |error: marco_proto::names::InvalidName| Failure::Usage {
        message: error.to_string(),
        hint: "marcoctl operations list shows operations, marcoctl operations get OPERATION their nodes".to_owned(),
    };
    match node {
        None if operation.contains("/executions/") => Ok(Some(ExecutionId::parse(operation).map_err(wrong)?.name())),
        None => Ok(None),
        Some(node) => {
            let operation = OperationId::parse(operation).map_err(wrong)?;
            let node = NodeId::parse(node).map_err(wrong)?;
            Ok(Some(ExecutionId { operation, node }.name()))
        }
    }
}

fn operation_state(state: OperationStateArg) -> operation::State {
    match state {
        OperationStateArg::Scheduled => operation::State::Scheduled,
        OperationStateArg::Running => operation::State::Running,
        OperationStateArg::Paused => operation::State::Paused,
        OperationStateArg::Cancelling => operation::State::Cancelling,
        OperationStateArg::Succeeded => operation::State::Succeeded,
        OperationStateArg::Failed => operation::State::Failed,
        OperationStateArg::Cancelled => operation::State::Cancelled,
    }
}

fn execution_state(state: ExecutionStateArg) -> State {
    match state {
        ExecutionStateArg::Pending => State::Pending,
        ExecutionStateArg::Assigned => State::Assigned,
        ExecutionStateArg::Running => State::Running,
        ExecutionStateArg::Rebooting => State::Rebooting,
        ExecutionStateArg::Verifying => State::Verifying,
        ExecutionStateArg::Succeeded => State::Succeeded,
        ExecutionStateArg::Failed => State::Failed,
        ExecutionStateArg::RolledBack => State::RolledBack,
        ExecutionStateArg::Cancelled => State::Cancelled,
        ExecutionStateArg::Expired => State::Expired,
    }
}

#[cfg(test)]
mod tests {
    use super::execution_name;

    #[test]
    fn an_execution_is_named_by_operation_and_node_or_by_its_full_name() {
        let full = "operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01";
        let operation = "0198a6e0-0000-7000-8000-000000000001";
        assert_eq!(execution_name(operation, Some("nodes/pi-01")).unwrap().as_deref(), Some(full));
        assert_eq!(execution_name(full, None).unwrap().as_deref(), Some(full));
        assert_eq!(execution_name(operation, None).unwrap(), None);
        assert_eq!(execution_name(full, Some("pi-01")).unwrap_err().exit_code(), 2);
    }
}
