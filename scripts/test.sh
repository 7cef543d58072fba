#!/usr/bin/env bash
# Runs `cargo test` over the whole workspace to its end, whatever fails, and says at the end what failed and how to run
# that alone. Arguments go to `cargo test`.
set -uo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A file that fails does not keep the others from running: one failure more is worth knowing now, not after the next run.
cargo test --workspace --no-fail-fast "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
scripts/failed-tests.sh "$log"
# Tests that passed without having what they need.
grep -o 'not tested: .*' "$log" | sort -u
exit "$status"
