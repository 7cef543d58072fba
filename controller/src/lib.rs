//! The server of Marco Bootstrap.

pub mod artifacts;
pub mod clock;
pub mod identity;
pub mod operation;
