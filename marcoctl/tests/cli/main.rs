//! Runs the real `marcoctl` against a scripted controller, and checks output and exit codes.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy.toml allows them in tests, but does not see that all of this is one"
)]

mod bootcode;
mod card;
mod certificates;
mod controller;
mod devices;
mod image;
mod made;
mod operations;
mod proxy;
mod push;
mod running;
mod verbs;
mod words;
