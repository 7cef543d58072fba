//! Controllers that share the database.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::silence::Silent;
use super::sql::sql;
use super::{Store, StoreError, micros, nodes};

/// Microseconds without a beat after which a controller is dead: three beats.
const DEAD_AFTER: i64 = 15_000_000;
/// Postgres' own time. Neither a wrong clock of a controller nor a slow connection can distort it.
const POSTGRES_TIME: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)";

/// A controller that sends beats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerRow {
    /// Id; a new one at each start.
    pub id: String,
    /// Addresses for agents: HOST:PORT, separated by commas.
    pub address: String,
    /// Time of its last beat.
    pub beat_time: DateTime<Utc>,
}

impl ControllerRow {
    /// Addresses for agents, each HOST:PORT.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.address.split(',').filter(|address| !address.is_empty())
    }
}

impl Store {
    /// Stores a beat of a controller; due every 5 s. On Postgres the database's clock dates it. SQLite has no clock of
    /// its own, but also only one controller.
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
        // No hint: nobody waits for a beat.
        tx.commit().await?;
        Ok(())
    }

    /// Controllers with a beat in the last 15 s, ordered by address.
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

    /// Ends the sessions of controllers without a beat for 15 s, and deletes these controllers. Returns the nodes of
    /// the sessions.
    pub async fn end_dead_sessions(&self, now: DateTime<Utc>) -> Result<Vec<NodeId>, StoreError> {
        self.again(|| self.end_dead_sessions_once(now)).await
    }

    async fn end_dead_sessions_once(&self, now: DateTime<Utc>) -> Result<Vec<NodeId>, StoreError> {
        // The lock of an SQLite file proves that no other controller is alive, so there is nothing to wait for.
        if self.is_shared() && !self.may_judge(Silent::Controller, now) {
            return Ok(Vec::new());
        }
        let orphaned = format!(
            "controller_id IS NOT NULL AND NOT EXISTS \
             (SELECT 1 FROM controllers c WHERE c.id = nodes.controller_id AND {})",
            self.lives(now)
        );
        // Looked for without a transaction, because mostly there are none.
        let orphans = sql(&format!("SELECT id FROM nodes WHERE {orphaned} LIMIT 1")).one(self.reader()).await?;
        if orphans.is_none() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        // The epoch rises, so that a controller that was only slow can write nothing more for these sessions.
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
        // Rows that another transaction holds are left to the next round.
        sql(&format!(
            "DELETE FROM controllers WHERE id IN (SELECT id FROM controllers c WHERE NOT ({}) {{skip}})",
            self.lives(now)
        ))
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        ended
    }

    /// SQL for the present time, by which beats are dated and judged.
    fn time_of_controllers(&self, now: DateTime<Utc>) -> String {
        if self.is_postgres() { POSTGRES_TIME.to_owned() } else { micros(now).to_string() }
    }

    /// SQL condition: the controller `c` is alive.
    fn lives(&self, now: DateTime<Utc>) -> String {
        format!("c.beat_time > {} - {DEAD_AFTER}", self.time_of_controllers(now))
    }

    /// Ends the sessions of a controller that stops, and deletes it.
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
