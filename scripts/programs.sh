#!/usr/bin/env bash
# Builds every program of the workspace with the features that the tests add to the libraries, so that the tests, the
# emulated machines and the demonstration share one build. (Cargo adds the features of dev-dependencies only when a test
# is built too: the smallest one.)
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo build --workspace --bins --test tidy "$@"
