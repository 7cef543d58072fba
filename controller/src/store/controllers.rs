//! The controllers that share the database.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::silence::Silent;
use super::sql::sql;
use super::{Store, StoreError, micros, nodes};

/// Without a sign of life for so long, in microseconds, a controller is dead: three beats.
const DEAD_AFTER: i64 = 15_000_000;
/// Postgres' own time, which neither a controller's clock nor the way to the database can make wrong.
const POSTGRES_TIME: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)";

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
    /// Gives a sign of life of a controller; due every 5 s. Times of controllers are the database's where it has a clock;
    /// SQLite has none, and one controller.
    pub async fn beat(&self, controller_id: &str, address: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        self.again(|| self.beat_once(controller_id, address, now)).await
    }

    async fn beat_once(&self, controller_id: &str, address: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        let time = self.time_of_controllers(now);
        sql(&format!(
            "INSERT INTO controllers (id, address, beat_time) VALUES (?, ?, {time}) \
             ON CONFLICT (id) DO UPDATE SET address = excluded.address, beat_time = excluded.beat_time"
        ))
        .bind(controller_id)
        .bind(address)
        .run(&*tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    /// The controllers that gave a sign of life in the last 15 s, by address.
    pub async fn live_controllers(&self, now: DateTime<Utc>) -> Result<Vec<ControllerRow>, StoreError> {
        sql(&format!("SELECT * FROM controllers c WHERE {} ORDER BY address, id", self.lives(now)))
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
        self.again(|| self.end_dead_sessions_once(now)).await
    }

    async fn end_dead_sessions_once(&self, now: DateTime<Utc>) -> Result<Vec<NodeId>, StoreError> {
        // The lock of an SQLite file proves that nobody else is alive; nothing has to be waited for.
        if self.is_shared() && !self.may_judge(Silent::Controller, now) {
            return Ok(Vec::new());
        }
        let orphaned = format!(
            "controller_id IS NOT NULL AND NOT EXISTS \
             (SELECT 1 FROM controllers c WHERE c.id = nodes.controller_id AND {})",
            self.lives(now)
        );
        let orphans = sql(&format!("SELECT id FROM nodes WHERE {orphaned} LIMIT 1")).one(self.reader()).await?;
        if orphans.is_none() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        // The epoch rises, so that a controller that was only slow writes nothing more for these sessions.
        let ended = sql(&format!(
            "UPDATE nodes SET controller_id = NULL, disconnect_time = ?, session_epoch = session_epoch + 1 \
             WHERE id IN (SELECT id FROM nodes WHERE {orphaned} {{skip}}) RETURNING id"
        ))
        .time(now)
        .all(&*tx)
        .await?
        .iter()
        .map(nodes::read_id)
        .collect();
        sql(&format!(
            "DELETE FROM controllers WHERE id IN (SELECT id FROM controllers c WHERE NOT ({}) {{skip}})",
            self.lives(now)
        ))
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        ended
    }

    /// The time by which controllers live and die, as SQL.
    fn time_of_controllers(&self, now: DateTime<Utc>) -> String {
        if self.is_postgres() { POSTGRES_TIME.to_owned() } else { micros(now).to_string() }
    }

    /// Whether the controller `c` lives, as SQL.
    fn lives(&self, now: DateTime<Utc>) -> String {
        format!("c.beat_time > {} - {DEAD_AFTER}", self.time_of_controllers(now))
    }

    /// Ends the sessions of a controller that stops, and forgets it.
    pub async fn retire(&self, controller_id: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        self.again(|| self.retire_once(controller_id, now)).await
    }

    async fn retire_once(&self, controller_id: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
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
