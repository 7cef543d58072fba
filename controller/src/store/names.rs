//! Names of nodes and users. They share one list in lower case. So no two names differ only by case, and no node is
//! taken for a user in the audit.

use super::StoreError;
use super::connection::Connection;
use super::sql::sql;

/// Names under which the controller itself signs events and operations.
const RESERVED: [&str; 2] = ["controller", "marco-controller"];

/// Kind of a name's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Node,
    User,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::User => "users",
        }
    }
}

/// Result of taking a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claim {
    /// It was free.
    Granted,
    /// An owner of the same kind has exactly this name.
    Taken,
    /// No node or user may have it; the text says why.
    Refused(String),
}

/// Takes a name, inside a transaction. A concurrent transaction that takes the same name waits for this one.
pub(super) async fn take(tx: &impl Connection, kind: Kind, id: &str) -> Result<Claim, StoreError> {
    let folded = id.to_ascii_lowercase();
    // A user of such a name could pass for the controller in events and in the audit.
    if RESERVED.contains(&folded.as_str()) {
        return Ok(Claim::Refused(format!("{id} is a name of the controller itself")));
    }
    let taken = sql("INSERT INTO taken_names (folded, kind, id) VALUES (?, ?, ?) ON CONFLICT (folded) DO NOTHING")
        .bind(folded.as_str())
        .bind(kind.as_str())
        .bind(id)
        .run(tx)
        .await?;
    if taken == 1 {
        return Ok(Claim::Granted);
    }
    let Some(row) = sql("SELECT kind, id FROM taken_names WHERE folded = ?").bind(folded.as_str()).one(tx).await?
    else {
        return Ok(Claim::Taken);
    };
    let (owner, owned) = (row.text("kind")?, row.text("id")?);
    if owner == kind.as_str() && owned == id {
        return Ok(Claim::Taken);
    }
    let how = if owned == id { "is the name of" } else { "differs by case only from" };
    Ok(Claim::Refused(format!("{id} {how} {owner}/{owned}")))
}

/// Gives a name back, inside a transaction.
pub(super) async fn give_back(tx: &impl Connection, kind: Kind, id: &str) -> Result<(), StoreError> {
    sql("DELETE FROM taken_names WHERE folded = ? AND kind = ? AND id = ?")
        .bind(id.to_ascii_lowercase())
        .bind(kind.as_str())
        .bind(id)
        .run(tx)
        .await?;
    Ok(())
}
