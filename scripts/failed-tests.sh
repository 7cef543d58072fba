#!/usr/bin/env bash
# Reads the output of `cargo test --no-fail-fast` and prints each test that failed with the command that runs it alone.
# Prints nothing when none failed. Usage: failed-tests.sh LOG
set -euo pipefail

# cargo lists the targets that failed, in the order in which they ran: "    `-p integration-tests --test race`". What
# failed inside of each stands between its "Running" line and the next one.
awk '
    function close_block() {
        if (running && (failed != "" || !ended)) {
            blocks++
            tests[blocks] = failed
        }
        running = 0
    }
    /^     Running |^   Doc-tests / { close_block(); running = 1; ended = 0; failed = "" }
    # A doc test is named by its place: "test src/lib.rs - name (line 5) ... FAILED".
    /^test .* \.\.\. FAILED$/ {
        name = $0
        sub(/^test /, "", name)
        sub(/ \.\.\. FAILED$/, "", name)
        failed = failed name "\n"
    }
    /^test result: / { ended = 1 }
    /^error: [0-9]+ targets? failed:$/ { close_block(); listing = 1; next }
    listing && /^    `.*`$/ {
        target = $0
        gsub(/^    `|`$/, "", target)
        targets[++count] = target
        next
    }
    { if (listing) listing = 0 }
    END {
        if (!count) exit
        print ""
        print "These failed; each line runs one of them alone:"
        for (number = 1; number <= count; number++) {
            # Where the two lists disagree, a test may be another target'\''s: then only targets are named.
            names = count == blocks ? tests[number] : ""
            kind = names == "" ? 0 : split(substr(names, 1, length(names) - 1), each, "\n")
            if (!kind) print "  cargo test " targets[number]
            for (test = 1; test <= kind; test++) {
                exact = each[test] ~ / / ? "\"" each[test] "\"" : each[test] " --exact"
                print "  cargo test " targets[number] " -- " exact
            }
        }
    }
' "$1"
