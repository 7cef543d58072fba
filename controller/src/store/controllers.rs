//! The controllers that share the database.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::{Store, StoreError};

/// A controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerRow {
    /// Its id, another one at each start.
    pub id: String,
    /// Where agents reach it, HOST:PORT.
    pub address: String,
    /// When it last gave a sign of life.
    pub beat_time: DateTime<Utc>,
}

impl Store {
    /// Gives a sign of life of a controller; due every 5 s.
    pub async fn beat(&self, controller_id: &str, address: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        let _ = (controller_id, address, now);
        todo!()
    }

    /// The controllers that gave a sign of life in the last 15 s, by address.
    pub async fn live_controllers(&self, now: DateTime<Utc>) -> Result<Vec<ControllerRow>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Ends the sessions of controllers that have given no sign of life for 15 s, and forgets these controllers.
    pub async fn end_dead_sessions(&self, now: DateTime<Utc>) -> Result<Vec<NodeId>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Ends the sessions of a controller that stops, and forgets it.
    pub async fn retire(&self, controller_id: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        let _ = (controller_id, now);
        todo!()
    }
}
