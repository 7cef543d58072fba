//! The one order in which transactions take locks on Postgres, and the check that each keeps it.
//!
//! 1. rows that calls name first: `tokens`, `users`, `schedules`, `artifacts`;
//! 2. `nodes`;
//! 3. `operations`;
//! 4. `executions`, each only under its operation's row, so that no two transactions ever want the same ones;
//! 5. `blobs`, then `artifact_defaults`, `certificates`, `controllers`.
//!
//! Several rows of one table are locked in the order of their ids. `SKIP LOCKED` leaves out held rows where the next
//! round can take them. A transaction that never waits may lock in any order. A table of which a transaction holds rows
//! may be written again, because those rows are its own.
//!
//! Debug builds refuse a statement that breaks this, so every test on Postgres checks it.

use std::collections::BTreeSet;

/// Tables in lock order. A row of any other table belongs to a row of one of these, and is written under its lock.
const ORDER: [&str; 11] = [
    "tokens",
    "users",
    "schedules",
    "artifacts",
    NODES,
    OPERATIONS,
    EXECUTIONS,
    "blobs",
    "artifact_defaults",
    "certificates",
    "controllers",
];
const NODES: &str = "nodes";
const OPERATIONS: &str = "operations";
const EXECUTIONS: &str = "executions";

/// The tables of which a transaction holds rows, as places in `ORDER`.
#[derive(Debug, Clone, Default)]
pub(super) struct Held(BTreeSet<usize>);

impl Held {
    /// Adds the table that a statement locks.
    ///
    /// # Errors
    /// Describes the statement if it takes the lock out of order.
    pub(super) fn take(&mut self, statement: &str) -> Result<(), String> {
        let Some((table, waits)) = taken(statement) else { return Ok(()) };
        let Some(place) = ORDER.iter().position(|name| *name == table) else { return Ok(()) };
        // Two transactions can deadlock only if they wait. A table that is held already was locked in order.
        if waits && !self.0.contains(&place) {
            if let Some(later) = self.0.last().filter(|later| **later > place) {
                let later = ORDER.get(*later).copied().unwrap_or_default();
                return Err(format!("{table} are locked after {later}: {statement}"));
            }
            // Progress was once written without its operation, while a cancel held that row and locked the same
            // executions in another order. One cancel in five of 2,000 nodes died of the deadlock.
            if table == EXECUTIONS && !self.holds(OPERATIONS) {
                return Err(format!("executions are locked without their operation: {statement}"));
            }
            if matches!(table, NODES | OPERATIONS) && !is_ordered(statement) {
                return Err(format!("several rows of {table} are locked in no order: {statement}"));
            }
        }
        self.0.insert(place);
        Ok(())
    }

    fn holds(&self, table: &str) -> bool {
        ORDER.iter().position(|name| *name == table).is_some_and(|place| self.0.contains(&place))
    }
}

/// The table whose rows a statement locks, and true if it waits for rows that are held.
fn taken(statement: &str) -> Option<(&str, bool)> {
    let waits = !statement.contains("SKIP LOCKED");
    let after = |words: &str| statement.split_once(words).and_then(|(_, rest)| rest.split_whitespace().next());
    let table = match statement.split_whitespace().next()? {
        "UPDATE" => after("UPDATE "),
        "DELETE" => after("DELETE FROM "),
        "INSERT" => after("INSERT INTO "),
        "SELECT" if statement.contains("FOR UPDATE") => after(" FROM "),
        _ => None,
    };
    table.map(|table| (table, waits))
}

/// True if the statement locks one row, new rows, or several in the order of their ids.
fn is_ordered(statement: &str) -> bool {
    statement.starts_with("INSERT")
        || statement.contains("WHERE id = $")
        || statement.split_once("ORDER BY id").is_some_and(|(_, rest)| rest.contains("FOR UPDATE"))
}

#[cfg(test)]
mod tests {
    use super::Held;

    const NODE: &str = "SELECT boot_id FROM nodes WHERE id = $1 FOR UPDATE";
    const OPERATIONS: &str = "SELECT id, state FROM operations WHERE id IN (SELECT 1) ORDER BY id FOR UPDATE";
    const PROGRESS: &str = "UPDATE executions SET phase = r.phase FROM r WHERE executions.operation = r.operation";
    const EVENT: &str = "UPDATE operations SET event_count = event_count + $1 WHERE id = $2 RETURNING event_count";

    fn all(statements: &[&str]) -> Result<(), String> {
        let mut held = Held::default();
        statements.iter().try_for_each(|statement| held.take(statement))
    }

    #[test]
    fn nodes_come_before_operations_and_operations_before_executions() {
        assert_eq!(all(&[NODE, OPERATIONS, PROGRESS, EVENT, "INSERT INTO events (operation) VALUES ($1)"]), Ok(()));
        assert_eq!(all(&["SELECT 1 FROM nodes", OPERATIONS, PROGRESS, "COMMIT"]), Ok(()));
        assert!(all(&[OPERATIONS, NODE]).is_err_and(|why| why.starts_with("nodes are locked after operations")));
        assert!(all(&[PROGRESS]).is_err_and(|why| why.contains("without their operation")));
        assert!(all(&["UPDATE controllers SET beat_time = $1", NODE]).is_err());
    }

    #[test]
    fn several_rows_are_taken_in_the_order_of_their_ids_or_not_waited_for() {
        for statement in ["UPDATE nodes SET mode = $1", "SELECT id FROM operations WHERE state = 'PAUSED' FOR UPDATE"] {
            assert!(all(&[statement]).is_err_and(|why| why.contains("in no order")), "{statement}");
        }
        let touch = "UPDATE nodes SET last_seen = $1 WHERE id IN (SELECT id FROM nodes FOR UPDATE SKIP LOCKED)";
        let release = "UPDATE executions SET not_before = 0 WHERE node IN (SELECT node FROM e FOR UPDATE SKIP LOCKED)";
        for statement in [touch, release] {
            assert_eq!(all(&[statement]), Ok(()), "{statement}");
        }
    }
}
