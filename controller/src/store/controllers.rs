//! The controllers that share the database.

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::NodeId;

use super::sql::sql;
use super::{Store, StoreError, nodes};

/// Without a sign of life for so long, a controller is dead: three beats.
const DEAD_AFTER: TimeDelta = TimeDelta::seconds(15);

/// A controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerRow {
    /// Its id, another one at each start.
    pub id: String,
    /// Where agents reach it: HOST:PORT, several with commas between.
    pub address: String,
    /// When it last gave a sign of life.
    pub beat_time: DateTime<Utc>,
}

impl ControllerRow {
    /// Where agents reach it, each HOST:PORT.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.address.split(',').filter(|address| !address.is_empty())
    }
}

impl Store {
    /// Gives a sign of life of a controller; due every 5 s.
    pub async fn beat(&self, controller_id: &str, address: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        sql("INSERT INTO controllers (id, address, beat_time) VALUES (?, ?, ?) \
             ON CONFLICT (id) DO UPDATE SET address = excluded.address, beat_time = excluded.beat_time")
        .bind(controller_id)
        .bind(address)
        .time(now)
        .run(&*tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    /// The controllers that gave a sign of life in the last 15 s, by address.
    pub async fn live_controllers(&self, now: DateTime<Utc>) -> Result<Vec<ControllerRow>, StoreError> {
        sql("SELECT * FROM controllers WHERE beat_time > ? ORDER BY address, id")
            .time(now - DEAD_AFTER)
            .all(self.reader())
            .await?
            .iter()
            .map(|row| {
                Ok(ControllerRow {
                    id: row.text("id")?,
                    address: row.text("address")?,
                    beat_time: row.time("beat_time")?,
                })
            })
            .collect()
    }

    /// Ends the sessions of controllers that have given no sign of life for 15 s, and forgets these controllers.
    pub async fn end_dead_sessions(&self, now: DateTime<Utc>) -> Result<Vec<NodeId>, StoreError> {
        let orphans = sql("SELECT id FROM nodes WHERE controller_id IS NOT NULL AND NOT EXISTS \
                           (SELECT 1 FROM controllers c WHERE c.id = nodes.controller_id AND c.beat_time > ?)")
        .time(now - DEAD_AFTER)
        .all(self.reader())
        .await?;
        if orphans.is_empty() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        // The epoch rises, so that a controller that was only slow writes nothing more for these sessions.
        let ended =
            sql("UPDATE nodes SET controller_id = NULL, disconnect_time = ?, session_epoch = session_epoch + 1 \
             WHERE id IN (SELECT id FROM nodes WHERE controller_id IS NOT NULL AND NOT EXISTS \
                 (SELECT 1 FROM controllers c WHERE c.id = nodes.controller_id AND c.beat_time > ?) {skip}) \
             RETURNING id")
            .time(now)
            .time(now - DEAD_AFTER)
            .all(&*tx)
            .await?
            .iter()
            .map(nodes::read_id)
            .collect();
        sql("DELETE FROM controllers WHERE beat_time <= ?").time(now - DEAD_AFTER).run(&*tx).await?;
        self.commit(tx).await?;
        ended
    }

    /// Ends the sessions of a controller that stops, and forgets it.
    pub async fn retire(&self, controller_id: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        sql("UPDATE nodes SET controller_id = NULL, disconnect_time = ? WHERE id IN \
             (SELECT id FROM nodes WHERE controller_id = ? ORDER BY id {lock})")
        .time(now)
        .bind(controller_id)
        .run(&*tx)
        .await?;
        sql("DELETE FROM controllers WHERE id = ?").bind(controller_id).run(&*tx).await?;
        self.commit(tx).await
    }
}
