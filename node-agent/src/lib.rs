//! The agent of Marco Bootstrap: runs on every Raspberry Pi, and installs it.

pub mod bootpart;
pub mod download;
pub mod install;
pub mod system;
