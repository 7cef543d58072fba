//! The Fleet harness: a real controller and real agents on virtual Pis, as processes that a test can kill, on a network
//! that it can break, with real databases and clients.

pub mod certs;
pub mod client;
pub mod dynamic;
pub mod extremes;
pub mod failing;
pub mod fleet;
pub mod frames;
pub mod greedy;
pub mod hostile;
pub mod image;
pub mod ledger;
pub mod machine;
pub mod mount;
pub mod netlab;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod smuggle;
pub mod tree;
pub mod upload;
pub mod wait;

/// Says that a test passes without having tested something, because this machine lacks what it needs.
pub fn not_tested(what: &str) {
    use std::io::Write as _;
    // Not by `eprintln!`, which the test framework shows only of tests that fail.
    let _ = writeln!(std::io::stderr(), "not tested: {what}");
}

pub use fleet::{Database, Fleet};
pub use wait::{seconds, wait_until};
