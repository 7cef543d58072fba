#!/usr/bin/env bash
# The lints that CI runs. A tool that is not installed is an error, not passed over.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

cargo fmt --all --check
cargo clippy --quiet --workspace --all-targets -- -D warnings
# A patch that no longer applies shows nothing any more (make showings).
for patch in scripts/showings/*.patch scripts/showings/faults/*.patch; do git apply --check "$patch"; done
if command -v buf >/dev/null; then buf lint; else echo 'buf is not installed: protos not linted (make deps)' >&2; exit 1; fi
if ! cargo deny --version >/dev/null 2>&1; then
    echo 'cargo-deny is not installed: dependencies not checked (make deps)' >&2
    exit 1
fi
# Not --offline: it reads the manifests of crates for other systems too, which a build here never fetched.
cargo deny --locked check bans licenses sources

# How much of the system the services can reach, from 0 (nothing) to 100. What they need stands in the units.
command -v systemd-analyze >/dev/null || { echo 'systemd-analyze is not installed: units not checked (make deps)' >&2; exit 1; }
exposure() { # MOST UNIT
    systemd-analyze security --offline=true --no-pager --threshold="$1" "$2" | tail -n 1
    return "${PIPESTATUS[0]}"
}
exposure 12 controller/dist/marco-controller.service
exposure 32 node-agent/dist/marco-agent.service
