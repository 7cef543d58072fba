//! Errors of the database: those that may pass, and faults of the disk.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use sea_orm::sqlx;
use sea_orm::sqlx::error::ErrorKind;
use sea_orm::sqlx::postgres::{PgDatabaseError, PgSeverity};
use sea_orm::{DbErr, RuntimeErr};

use super::StoreError;

/// A fault of the disk below the database. An operator has to fix it; a retry does not help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No room is left.
    DiskFull,
    /// The file, its file system or the server takes no writes.
    ReadOnly,
    /// A read, write or fsync failed.
    Io,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::DiskFull => "disk full",
            Self::ReadOnly => "read-only",
            Self::Io => "I/O error",
        })
    }
}

/// An error of the database or its driver.
#[derive(Debug)]
pub struct DatabaseError {
    said: String,
    /// A fault of the disk, and its place: the database's file, or the server's address.
    fault: Option<(Fault, Arc<str>)>,
    /// SQLSTATE of Postgres, or SQLite's (extended) result code.
    code: Option<String>,
    violation: Option<Violation>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Violation {
    Unique,
    ForeignKey,
}

impl std::fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.fault {
            Some((fault, place)) => write!(f, "{fault}: {place}: {}", self.said),
            None => f.write_str(&self.said),
        }
    }
}

impl Error for DatabaseError {}

impl DatabaseError {
    /// The fault of the disk, if it is one.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.as_ref().map(|(fault, _)| *fault)
    }

    fn said(said: String) -> Self {
        Self { said, fault: None, code: None, violation: None }
    }
}

impl StoreError {
    /// Classifies an error of the driver. `place` is the database's file or address.
    pub(super) fn of_driver(error: &sqlx::Error, place: &Arc<str>) -> Self {
        let sqlx::Error::Database(answer) = error else {
            let mut said = DatabaseError::said(crate::chain(error));
            // The driver's own text does not name the database.
            if matches!(error, sqlx::Error::PoolTimedOut) {
                said.said = format!("no connection to {place} in time");
            }
            return if is_of_connection(error) { Self::Unavailable(said) } else { Self::Refused(said) };
        };
        let code = answer.code().map(|code| code.into_owned());
        let of_postgres = answer.try_downcast_ref::<PgDatabaseError>();
        let source = of_postgres.and_then(PgDatabaseError::file).unwrap_or_default();
        let fault =
            code.as_deref().and_then(|code| fault_of_code(code, source)).map(|fault| (fault, Arc::clone(place)));
        // All sessions end with a panic of the server, whatever the code says. It recovers by itself.
        let ended = of_postgres.is_some_and(|answer| matches!(answer.severity(), PgSeverity::Panic));
        // A fault counts as transient too: nothing was written, and the same call succeeds once the disk works.
        let transient = fault.is_some() || ended || code.as_deref().is_some_and(is_transient_code);
        let violation = match answer.kind() {
            ErrorKind::UniqueViolation => Some(Violation::Unique),
            ErrorKind::ForeignKeyViolation => Some(Violation::ForeignKey),
            _ => None,
        };
        let said = match &code {
            Some(code) => format!("{} (code {code})", answer.message()),
            None => answer.message().to_owned(),
        };
        let error = DatabaseError { said, fault, code, violation };
        if transient { Self::Unavailable(error) } else { Self::Refused(error) }
    }

    /// No answer came in time.
    pub(super) fn silent(place: &str, waited: Duration) -> Self {
        Self::Unavailable(DatabaseError::said(format!("{place} did not answer within {} ms", waited.as_millis())))
    }

    /// The permit to write did not come in time.
    pub(super) fn busy(place: &str) -> Self {
        Self::Unavailable(DatabaseError::said(format!("{place} is busy: the turn to write did not come in time")))
    }

    /// A statement of the transaction failed, so it cannot be committed.
    pub(super) fn aborted() -> Self {
        Self::Refused(DatabaseError::said("a statement of the transaction failed, so it was rolled back".to_owned()))
    }

    /// A statement breaks the order of locks: a defect of this program.
    pub(super) fn out_of_order(why: String) -> Self {
        Self::Refused(DatabaseError::said(why))
    }

    /// True if the database aborted the transaction in favour of another one: a serialization failure or a deadlock.
    /// Nothing of it was stored, and a retry may well succeed.
    pub(super) fn is_conflict(&self) -> bool {
        self.code().is_some_and(|code| matches!(code, "40001" | "40P01"))
    }

    /// True if a row with the same unique key exists.
    pub(super) fn is_duplicate(&self) -> bool {
        self.database().is_some_and(|error| error.violation == Some(Violation::Unique))
    }

    /// True if a foreign key failed: the row names one that does not exist, or is named by one.
    pub(super) fn is_dangling(&self) -> bool {
        self.database().is_some_and(|error| error.violation == Some(Violation::ForeignKey))
    }

    /// True if other transactions were in the way: a lock that was not released in time, a deadlock or a serialization
    /// failure.
    pub fn is_contention(&self) -> bool {
        self.code().is_some_and(|code| code == "55P03" || (code.len() == 5 && code.starts_with("40")))
    }

    /// SQLSTATE of Postgres, or SQLite's (extended) result code.
    pub(super) fn code(&self) -> Option<&str> {
        self.database().and_then(|error| error.code.as_deref())
    }

    /// The fault of the disk, if it is one.
    pub fn fault(&self) -> Option<Fault> {
        self.database().and_then(DatabaseError::fault)
    }

    fn database(&self) -> Option<&DatabaseError> {
        match self {
            Self::Unavailable(error) | Self::Refused(error) => Some(error),
            _ => None,
        }
    }
}

/// For errors of migrations and of reading columns, which go through sea-orm.
impl From<DbErr> for StoreError {
    fn from(error: DbErr) -> Self {
        match &error {
            DbErr::Conn(RuntimeErr::SqlxError(cause))
            | DbErr::Exec(RuntimeErr::SqlxError(cause))
            | DbErr::Query(RuntimeErr::SqlxError(cause)) => Self::of_driver(cause, &Arc::from("the database")),
            DbErr::ConnectionAcquire(_) | DbErr::Conn(_) => Self::Unavailable(DatabaseError::said(error.to_string())),
            _ => Self::Refused(DatabaseError::said(error.to_string())),
        }
    }
}

/// True if the connection failed, not the statement.
fn is_of_connection(error: &sqlx::Error) -> bool {
    matches!(
        error,
        sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
    )
}

/// Takes an SQLSTATE (appendix A of Postgres' manual) or a result code of SQLite. The low byte of an extended code is
/// the primary one: READONLY 8, IOERR 10, FULL 13, CANTOPEN 14. `source`: the file of Postgres' source code that reports the
/// error. Error numbers without a code of their own become general codes there (`errcode_for_file_access`), so that a
/// read-only file system and a missing permission for a table have the same one.
fn fault_of_code(code: &str, source: &str) -> Option<Fault> {
    let of_files = ["fd.c", "md.c", "slru.c", "smgr.c", "xlog.c"].contains(&source);
    match code {
        "53100" => return Some(Fault::DiskFull),
        "25006" => return Some(Fault::ReadOnly),
        "42501" if of_files => return Some(Fault::ReadOnly),
        // Also a file that is gone, and a page or an index that is damaged.
        "58030" | "58P01" | "XX001" | "XX002" => return Some(Fault::Io),
        "XX000" if of_files => return Some(Fault::Io),
        // Five characters are an SQLSTATE; SQLite's codes are shorter.
        _ if code.len() == 5 => return None,
        _ => {}
    }
    match code.parse::<u32>().ok()? & 0xff {
        8 => Some(Fault::ReadOnly),
        10 | 14 => Some(Fault::Io),
        13 => Some(Fault::DiskFull),
        _ => None,
    }
}

/// True if a later retry may help. SQLSTATE classes: 08 connection, 40 rollback, 53 resources, 57 operator
/// intervention. 55P03 is a lock that was not released in time, 25P03 a transaction that stood idle too long. SQLite:
/// BUSY 5, LOCKED 6.
fn is_transient_code(code: &str) -> bool {
    if code.len() == 5 {
        ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class)) || matches!(code, "55P03" | "25P03")
    } else {
        code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6))
    }
}

#[cfg(test)]
mod tests {
    use super::{Fault, fault_of_code, is_transient_code};

    #[test]
    fn faults_of_the_disk_are_told_from_other_errors() {
        for (code, fault) in [
            ("42501", None),
            ("XX000", None),
            ("XX001", Some(Fault::Io)),
            ("13", Some(Fault::DiskFull)),
            ("53100", Some(Fault::DiskFull)),
            ("8", Some(Fault::ReadOnly)),
            ("1032", Some(Fault::ReadOnly)),
            ("25006", Some(Fault::ReadOnly)),
            ("778", Some(Fault::Io)),
            ("1034", Some(Fault::Io)),
            ("58030", Some(Fault::Io)),
            ("5", None),
            ("2067", None),
            ("23505", None),
            ("40P01", None),
        ] {
            assert_eq!(fault_of_code(code, "aclchk.c"), fault, "{code}");
        }
        assert_eq!(fault_of_code("42501", "xlog.c"), Some(Fault::ReadOnly));
        assert_eq!(fault_of_code("XX000", "md.c"), Some(Fault::Io));
    }

    #[test]
    fn locks_and_outages_pass_and_constraints_do_not() {
        for code in ["5", "517", "40001", "40P01", "55P03", "57P01", "08006", "53300"] {
            assert!(is_transient_code(code), "{code}");
        }
        for code in ["1555", "2067", "23505", "42601", "22P02"] {
            assert!(!is_transient_code(code), "{code}");
        }
    }
}
