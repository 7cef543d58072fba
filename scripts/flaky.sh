#!/usr/bin/env bash
# Looks for tests that fail now and then: runs the fleet tests FLEETS times and the whole suite SUITES times while `stress`
# holds every core, and says at the end what failed, how often, and how to run that alone.
# ONLY="race soak" takes only these files of integration-tests/tests.
set -uo pipefail
cd "$(dirname "$0")/.."
fleets=${FLEETS:-10} suites=${SUITES:-3}

command -v stress >/dev/null || { echo 'stress is not installed: apt-get install stress (make flaky does it)' >&2; exit 1; }
logs=$(mktemp -d)
stress --quiet --cpu "$(nproc)" &
stress=$!
trap 'kill "$stress" 2>/dev/null; rm -rf "$logs"' EXIT

# A fleet test is one that starts a fleet; ONLY is for a file that is suspected.
files=${ONLY:-$(grep -rlE 'Fleet::builder|Lab::' --include='*.rs' integration-tests/tests |
    sed -E 's,.*/tests/,,; s,/.*,,; s,\.rs$,,' | sort -u)}
targets=()
for file in $files; do targets+=(--test "$file"); done

runs=0 bad=0
run() { # NAME COMMAND...
    local name=$1
    shift
    runs=$((runs + 1))
    echo "--- $name"
    if "$@" >"$logs/$runs" 2>&1; then
        grep -cE '^test .* ok$' "$logs/$runs" | sed 's/$/ passed/'
    else
        bad=$((bad + 1))
        # Why it failed is gone with the next run: all of it is shown.
        sed -n '/^failures:$/,/^test result/p' "$logs/$runs"
        scripts/failed-tests.sh "$logs/$runs" | tee -a "$logs/failed"
    fi
}

for number in $(seq "$fleets"); do
    run "fleet tests, $number of $fleets" cargo test --workspace --no-fail-fast "${targets[@]}"
done
for number in $(seq "$suites"); do
    run "suite, $number of $suites" cargo test --workspace --no-fail-fast
done

echo
echo "$runs runs under stress, $bad with failures"
[ "$bad" = 0 ] && exit 0
echo 'How often each failed, and the command that runs it alone:'
grep -h '^  cargo test' "$logs/failed" | sort | uniq -c | sort -rn
exit 1
