//! Tells agent and controller when they were built: no clock that is right shows an earlier time, and no certificate that
//! they meet ended before.

#![allow(clippy::print_stdout, reason = "cargo reads what a build script prints")]

use std::time::{SystemTime, UNIX_EPOCH};

fn main() {
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let reproducible = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default();
    println!("cargo:rustc-env=MARCO_BUILD_SECONDS={}", reproducible.unwrap_or(now));
}
