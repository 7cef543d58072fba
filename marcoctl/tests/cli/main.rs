//! Runs the real `marcoctl` against a controller made for the test: what it prints, and with which exit code.

mod certificates;
mod controller;
mod operations;
mod proxy;
mod push;
mod running;
mod verbs;
