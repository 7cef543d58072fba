#!/usr/bin/env bash
# The lints that CI runs. A tool that is not installed is said to be missing, not passed over in silence.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

cargo fmt --all --check
cargo clippy --quiet --workspace --all-targets -- -D warnings
if command -v buf >/dev/null; then buf lint; else echo 'buf is not installed: protos not linted (make deps)' >&2; exit 1; fi
if cargo deny --version >/dev/null 2>&1; then
    cargo deny --offline check bans licenses sources
else
    echo 'cargo-deny is not installed: dependencies not checked' >&2
fi
