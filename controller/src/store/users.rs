//! Users: roles and scopes of the people and services behind certificates.

use chrono::{DateTime, Utc};
use marco_proto::names::UserId;

use super::connection::Connection;
use super::names::{self, Claim};
use super::sql::{Row, sql};
use super::{CertificateRow, Scope, Store, StoreError, certificates};

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRow {
    /// Id, which is the common name of its certificates.
    pub id: UserId,
    /// `viewer`, `operator`, `publisher` or `admin`.
    pub role: String,
    /// Nodes that the user is limited to.
    pub scope: Scope,
    /// Time of creation.
    pub create_time: DateTime<Utc>,
    /// Name of the user who created it.
    pub creator: String,
    /// Time of revocation, if it was revoked.
    pub revoke_time: Option<DateTime<Utc>>,
}

/// Result of changing a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpdateUserOutcome {
    /// The user as it is now.
    Updated(UserRow),
    /// The user's role or scope changed since it was read. Nothing was written.
    ChangedMeanwhile,
    /// The user is revoked.
    Revoked,
}

/// Result of creating a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateUserOutcome {
    /// The user exists, and the certificate is stored.
    Created(UserRow),
    /// A user of that name exists, with another role or scope.
    Differs(UserRow),
    /// No user may have that name; the text says why.
    NameTaken(String),
}

impl Store {
    /// Stores a user and its certificate. A user that exists with the same role and scope gets a further certificate. A
    /// revoked user gets access again.
    pub async fn create_user(
        &self,
        user: &UserRow,
        certificate: &CertificateRow,
    ) -> Result<CreateUserOutcome, StoreError> {
        self.again(|| self.create_user_once(user, certificate)).await
    }

    async fn create_user_once(
        &self,
        user: &UserRow,
        certificate: &CertificateRow,
    ) -> Result<CreateUserOutcome, StoreError> {
        let tx = self.begin().await?;
        if let Claim::Refused(why) = names::take(&*tx, names::Kind::User, user.id.as_str()).await? {
            return Ok(CreateUserOutcome::NameTaken(why));
        }
        let changed = sql("INSERT INTO users (id, role, selector, create_time, creator) VALUES (?, ?, ?, ?, ?) \
             ON CONFLICT (id) DO UPDATE SET role = excluded.role, selector = excluded.selector, \
                 create_time = excluded.create_time, creator = excluded.creator, revoke_time = NULL \
             WHERE users.revoke_time IS NOT NULL")
        .bind(user.id.as_str())
        .bind(user.role.as_str())
        .json(&user.scope)
        .time(user.create_time)
        .bind(user.creator.as_str())
        .run(&*tx)
        .await?;
        let found = find(&*tx, &user.id).await?;
        let stored = found.ok_or_else(|| StoreError::Unknown { what: "user", value: user.id.to_string() })?;
        // Creating a user never changes the rights of one that is not revoked.
        if changed == 0 && (stored.role != user.role || stored.scope != user.scope) {
            return Ok(CreateUserOutcome::Differs(stored));
        }
        certificates::insert(&*tx, certificate).await?;
        self.commit(tx).await?;
        Ok(CreateUserOutcome::Created(stored))
    }

    /// Stores a certificate that the CA issued before certificates were stored, and its user, unless they are stored
    /// already. A certificate of a revoked user is revoked with the others, so that it does not become valid again with
    /// a later user of that name.
    pub async fn enter_certificate(&self, user: &UserRow, certificate: &CertificateRow) -> Result<(), StoreError> {
        self.again(|| self.enter_certificate_once(user, certificate)).await
    }

    async fn enter_certificate_once(&self, user: &UserRow, certificate: &CertificateRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        // The result does not matter: the CA's signature vouches for this user, even if another has the name.
        names::take(&*tx, names::Kind::User, user.id.as_str()).await?;
        sql("INSERT INTO users (id, role, selector, create_time, creator) VALUES (?, ?, ?, ?, ?) \
             ON CONFLICT (id) DO NOTHING")
        .bind(user.id.as_str())
        .bind(user.role.as_str())
        .json(&user.scope)
        .time(user.create_time)
        .bind(user.creator.as_str())
        .run(&*tx)
        .await?;
        // Locks the user. A concurrent revocation comes before and is seen here, or comes after and finds the
        // certificate.
        let user = sql("SELECT revoke_time FROM users WHERE id = ? {lock}").bind(user.id.as_str()).one(&*tx).await?;
        certificates::insert_if_new(&*tx, certificate).await?;
        if let Some(shut_out) = user.map(|row| row.maybe_time("revoke_time")).transpose()?.flatten() {
            sql("UPDATE certificates SET revoke_time = ? WHERE serial = ? AND node IS NULL AND revoke_time IS NULL")
                .time(shut_out)
                .bind(certificate.serial.as_str())
                .run(&*tx)
                .await?;
        }
        tx.commit().await
    }

    /// Users in the order of their ids.
    pub async fn users(&self, after: Option<&UserId>, limit: u32) -> Result<Vec<UserRow>, StoreError> {
        sql("SELECT * FROM users WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.map_or("", UserId::as_str))
            .bind(i64::from(limit))
            .all(self.reader())
            .await?
            .iter()
            .map(read)
            .collect()
    }

    /// Changes role and scope, only if both are still those of `before`: they are allowed together or not at all.
    pub async fn update_user(
        &self,
        before: &UserRow,
        role: &str,
        scope: &Scope,
    ) -> Result<UpdateUserOutcome, StoreError> {
        self.again(|| self.update_user_once(before, role, scope)).await
    }

    async fn update_user_once(
        &self,
        before: &UserRow,
        role: &str,
        scope: &Scope,
    ) -> Result<UpdateUserOutcome, StoreError> {
        let tx = self.begin().await?;
        // Two admins who changed a user at once could make an admin with a limited scope, which neither had decided.
        let changed = sql("UPDATE users SET role = ?, selector = ? \
                           WHERE id = ? AND revoke_time IS NULL AND role = ? AND selector = ?")
        .bind(role)
        .json(scope)
        .bind(before.id.as_str())
        .bind(before.role.as_str())
        .json(&before.scope)
        .run(&*tx)
        .await?;
        let row = find(&*tx, &before.id).await?;
        self.commit_if(changed == 1, tx).await?;
        Ok(match row {
            Some(row) if changed == 1 => UpdateUserOutcome::Updated(row),
            Some(row) if row.revoke_time.is_some() => UpdateUserOutcome::Revoked,
            _ => UpdateUserOutcome::ChangedMeanwhile,
        })
    }

    /// Reads one user.
    pub async fn user(&self, id: &UserId) -> Result<Option<UserRow>, StoreError> {
        find(self.reader(), id).await
    }

    /// Revokes a user and its certificates. Returns `None` if there is no such user.
    pub async fn revoke_user(&self, id: &UserId, now: DateTime<Utc>) -> Result<Option<UserRow>, StoreError> {
        self.again(|| self.revoke_user_once(id, now)).await
    }

    async fn revoke_user_once(&self, id: &UserId, now: DateTime<Utc>) -> Result<Option<UserRow>, StoreError> {
        let tx = self.begin().await?;
        sql("UPDATE users SET revoke_time = COALESCE(revoke_time, ?) WHERE id = ?")
            .time(now)
            .bind(id.as_str())
            .run(&*tx)
            .await?;
        sql("UPDATE certificates SET revoke_time = ? WHERE subject = ? AND node IS NULL AND revoke_time IS NULL")
            .time(now)
            .bind(id.as_str())
            .run(&*tx)
            .await?;
        let row = find(&*tx, id).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }

    /// Label keys that limit someone: users, API tokens, and the schedules and unfinished operations that they created.
    pub async fn scope_keys(&self) -> Result<std::collections::BTreeSet<String>, StoreError> {
        // Only admins may change labels with these keys. Otherwise a caller could move nodes into its own scope.
        let rows = sql("SELECT selector FROM users WHERE revoke_time IS NULL \
             UNION SELECT selector FROM api_tokens WHERE revoke_time IS NULL \
             UNION SELECT scope FROM schedules \
             UNION SELECT scope FROM operations WHERE state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING')")
        .all(self.reader())
        .await?;
        let mut keys = std::collections::BTreeSet::new();
        for row in &rows {
            let scope: Scope = row.json("selector")?;
            keys.extend(scope.labels().keys().cloned());
        }
        Ok(keys)
    }
}

async fn find(db: &impl Connection, id: &UserId) -> Result<Option<UserRow>, StoreError> {
    sql("SELECT * FROM users WHERE id = ?").bind(id.as_str()).one(db).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<UserRow, StoreError> {
    Ok(UserRow {
        id: row.word("id", |id| UserId::parse(id).ok())?,
        role: row.text("role")?,
        scope: row.json("selector")?,
        create_time: row.time("create_time")?,
        creator: row.text("creator")?,
        revoke_time: row.maybe_time("revoke_time")?,
    })
}
