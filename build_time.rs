//! Records the build time for agent and controller, as a lower bound for the clock. A correct clock shows no earlier
//! time, and no certificate in use expired before it.

#![allow(clippy::print_stdout, reason = "cargo reads what a build script prints")]

use std::time::{SystemTime, UNIX_EPOCH};

fn main() {
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    // A reproducible build sets this variable, so the same sources give the same binary.
    let reproducible = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default();
    println!("cargo:rustc-env=MARCO_BUILD_SECONDS={}", reproducible.unwrap_or(now));
}
