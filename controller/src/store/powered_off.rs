//! Nodes that are offline because an operation powered them off.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, OperationId};

use super::sql::sql;
use super::{Store, StoreError, operations};

/// The power-off of a node that has not come back since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoweredOff {
    /// The operation.
    pub operation: OperationId,
    /// Time at which its success was proved.
    pub time: DateTime<Utc>,
}

impl Store {
    /// Those of these nodes that were powered off and have had no stream since.
    pub async fn powered_off(&self, ids: &[NodeId]) -> Result<BTreeMap<NodeId, PoweredOff>, StoreError> {
        // A power-off succeeds only after the node was silent for a while, so it ends after the node's last stream.
        let rows = sql("SELECT n.id AS node, o.id AS id, e.finish_time AS finish_time FROM nodes n \
                 JOIN executions e ON e.node = n.id JOIN operations o ON o.id = e.operation \
             WHERE n.id IN {each} AND n.controller_id IS NULL AND o.action_kind = 'power-off' \
                 AND e.state = 'SUCCEEDED' AND e.finish_time >= n.disconnect_time ORDER BY n.id, o.id")
        .each(ids.iter().map(NodeId::as_str))
        .all(self.reader())
        .await?;
        rows.iter()
            .map(|row| {
                let operation = operations::read_id(row)?;
                Ok((
                    row.word("node", |id| NodeId::parse(id).ok())?,
                    PoweredOff { operation, time: row.time("finish_time")? },
                ))
            })
            .collect()
    }
}
