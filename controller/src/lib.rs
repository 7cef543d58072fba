//! The server of Marco Bootstrap.

pub mod clock;
pub mod operation;
pub mod store;
