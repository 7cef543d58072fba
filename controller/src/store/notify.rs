//! Passes changes on between the controllers that share a Postgres database. They are hints, so that a controller need
//! not wait for its next tick. The tick finds a change whose hint was lost.

use std::time::Duration;

use sea_orm::sqlx::postgres::PgListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::sql::sql;
use super::{Store, StoreError};

const CHANNEL: &str = "marco_changes";
/// Pause between two notifications. Changes that come close together are passed on as one.
const SETTLE: Duration = Duration::from_millis(50);
/// Pause before the next try while the database is away.
const RETRY: Duration = Duration::from_secs(1);

impl Store {
    /// Passes changes on and listens for those of others, until cancelled. On SQLite there is no other controller. A
    /// pooler in transaction mode carries no notifications.
    pub async fn share_changes(self, stop: CancellationToken) {
        if !self.is_postgres() || self.reader().is_behind_pooler() {
            stop.cancelled().await;
            return;
        }
        let own = Uuid::now_v7().to_string();
        // Dropping any of them loses only hints.
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.tell(&own) => {}
            () = self.listen(&own) => {}
        }
    }

    async fn tell(&self, own: &str) {
        let mut changes = self.shared.own_changes.subscribe();
        while changes.changed().await.is_ok() {
            if sql("SELECT pg_notify(?, ?)").bind(CHANNEL).bind(own).run(self.reader()).await.is_err() {
                tracing::debug!("a change was not passed on to other controllers");
            }
            tokio::time::sleep(SETTLE).await;
        }
    }

    async fn listen(&self, own: &str) {
        loop {
            if let Err(error) = self.hear(own).await {
                tracing::debug!(error = &*crate::chain(&error), "changes of other controllers are not heard of");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Listens until the connection is lost.
    async fn hear(&self, own: &str) -> Result<(), StoreError> {
        let reader = self.reader();
        let lost = |error| StoreError::of_driver(&error, &reader.place);
        let Some(pool) = reader.as_postgres() else { return Ok(()) };
        let mut listener = PgListener::connect_with(pool).await.map_err(lost)?;
        listener.listen(CHANNEL).await.map_err(lost)?;
        // Earlier notifications are lost, so anything may have changed.
        self.hint();
        while let Some(notification) = listener.try_recv().await.map_err(lost)? {
            // Postgres sends our own notifications to us as well.
            if notification.payload() != own {
                self.hint();
            }
        }
        Ok(())
    }

    fn hint(&self) {
        self.shared.changes.send_modify(|changes| *changes = changes.wrapping_add(1));
    }
}
