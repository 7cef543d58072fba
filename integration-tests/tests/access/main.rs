//! Access: authentication, rights, and how fast they end. A real controller over TLS.

#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests, which clippy sees only in the functions that bear the attribute"
)]

mod audit;
mod clocks;
mod doors;
mod filters;
mod keys;
mod leaving;
mod live;
mod recorded;
mod renewal;
mod scene;
mod schedules;
mod table;
mod tokens;
mod users;
mod walk;
