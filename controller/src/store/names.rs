//! Names of nodes and users. They share one list, in lower case, so that no two differ by case only and no node is
//! taken for a user in the audit.

use super::StoreError;
use super::connection::Connection;
use super::sql::sql;

/// Names that the controller signs its own events and operations with.
const RESERVED: [&str; 2] = ["controller", "marco-controller"];

/// Who has a name.
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

/// What became of asking for a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claim {
    /// It was free, or is the asker's already.
    Granted,
    /// One of the same kind has exactly this name.
    Taken,
    /// Nobody may have it; the sentence says why.
    Refused(String),
}

/// Takes a name in a transaction. A concurrent transaction that asks for the same waits for this one.
pub(super) async fn take(tx: &impl Connection, kind: Kind, id: &str) -> Result<Claim, StoreError> {
    let folded = id.to_ascii_lowercase();
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

/// Gives a name back, in a transaction.
pub(super) async fn give_back(tx: &impl Connection, kind: Kind, id: &str) -> Result<(), StoreError> {
    sql("DELETE FROM taken_names WHERE folded = ? AND kind = ? AND id = ?")
        .bind(id.to_ascii_lowercase())
        .bind(kind.as_str())
        .bind(id)
        .run(tx)
        .await?;
    Ok(())
}
