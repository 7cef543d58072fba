//! The agent of Marco Bootstrap.

mod durable;
pub mod job;
pub mod journal;
