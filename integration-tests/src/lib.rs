//! The Fleet harness: a real controller, real agents on virtual Pis, real databases and clients.

pub mod postgres;
