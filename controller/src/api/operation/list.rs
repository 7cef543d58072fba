//! Lists of operations, of their executions and of their events.

use marco_proto::names::NodeId;
use marco_proto::v1;

use super::super::status::ApiError;
use super::super::{convert, page};
use super::{Operations, operation_id};
use crate::identity::Caller;
use crate::operation::{ExecutionState, OperationState};
use crate::store::OperationQuery;

impl Operations {
    pub(super) async fn list(
        &self,
        caller: &Caller,
        request: v1::ListOperationsRequest,
    ) -> Result<v1::ListOperationsResponse, ApiError> {
        const LIST: &str = "operations";
        let size = page::size(request.page_size)?;
        let filter = request.filter.unwrap_or_default();
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(operation_id("page_token", &id)?),
            None => None,
        };
        let states = filter
            .states
            .iter()
            .map(|state| {
                convert::operation_state(*state)
                    .ok_or_else(|| ApiError::invalid("filter.states", "has an unknown state"))
            })
            .collect::<Result<Vec<OperationState>, _>>()?;
        let node = match filter.node.as_str() {
            "" => None,
            name => Some(NodeId::parse(name).map_err(|error| ApiError::invalid("filter.node", error.to_string()))?),
        };
        let scope = caller.scope();
        if let Some(node) = &node
            && !scope.is_everything()
        {
            // A limited caller sees operations that are partly outside its scope, but must not learn that they include
            // this node.
            self.context.node_for(caller, node).await?;
        }
        let query = OperationQuery { after, limit: size + 1, states, node, scope: scope.clone() };
        let rows = self.context.store.operations(&query).await?;
        let (mut rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        self.context.limit(&scope, &mut rows).await?;
        Ok(v1::ListOperationsResponse { operations: rows.iter().map(convert::operation).collect(), next_page_token })
    }

    pub(super) async fn list_executions(
        &self,
        caller: &Caller,
        request: v1::ListExecutionsRequest,
    ) -> Result<v1::ListExecutionsResponse, ApiError> {
        const LIST: &str = "executions";
        let parent = operation_id("parent", &request.parent)?;
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(NodeId::parse(&id).map_err(|error| ApiError::invalid("page_token", error.to_string()))?),
            None => None,
        };
        let states = request
            .filter
            .unwrap_or_default()
            .states
            .iter()
            .map(|state| {
                convert::execution_state(*state)
                    .ok_or_else(|| ApiError::invalid("filter.states", "has an unknown state"))
            })
            .collect::<Result<Vec<ExecutionState>, _>>()?;
        self.context.operation_for(caller, &parent).await?;
        let scope = caller.scope();
        let rows = self.context.store.executions_within(&scope, &parent, after.as_ref(), size + 1, &states).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.node.as_str().to_owned());
        Ok(v1::ListExecutionsResponse { executions: rows.iter().map(convert::execution).collect(), next_page_token })
    }

    pub(super) async fn list_events(
        &self,
        caller: &Caller,
        request: v1::ListEventsRequest,
    ) -> Result<v1::ListEventsResponse, ApiError> {
        const LIST: &str = "events";
        let parent = operation_id("parent", &request.parent)?;
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(number) => number.parse().map_err(|_| ApiError::invalid("page_token", "is damaged"))?,
            None => 0,
        };
        self.context.operation_for(caller, &parent).await?;
        let rows = self.context.store.events_within(&caller.scope(), &parent, after, size + 1).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.number.to_string());
        Ok(v1::ListEventsResponse { events: rows.iter().map(convert::event).collect(), next_page_token })
    }
}
