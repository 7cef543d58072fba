//! The agent of Marco Bootstrap: runs on every Raspberry Pi, and installs it.

mod backoff;
pub mod bootpart;
mod cause;
pub mod config;
pub mod discovery;
pub mod download;
mod durable;
pub mod executor;
pub mod health;
pub mod identity;
pub mod init;
pub mod install;
pub mod job;
pub mod journal;
pub mod logbook;
pub mod network;
pub mod notify;
pub mod run;
pub mod session;
pub mod settings;
pub mod simulate;
pub mod step;
pub mod supervise;
pub mod system;
#[cfg(test)]
mod testing;
