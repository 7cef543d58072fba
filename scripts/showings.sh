#!/usr/bin/env bash
# Shows that the model (make model) finds the faults that it is there for: takes one mending out at a time, by the patches in
# scripts/showings, in a copy of this commit, and runs histories until one fails. Prints how many were kept before, and what the
# failure says. A mending that nobody misses is an error. Arguments: the names of patches; without any, all.
set -uo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
histories=${HISTORIES:-1000} seed=${MODEL_SEED:-1}
copy=$repo/target/showings

git worktree remove --force "$copy" 2>/dev/null
git worktree add --quiet --detach "$copy" HEAD || exit 1
trap 'git -C "$repo" worktree remove --force "$copy"' EXIT
patches=("$@")
[ $# -gt 0 ] || patches=($(basename -s .patch scripts/showings/*.patch))

missed=0
for name in "${patches[@]}"; do
    git -C "$copy" checkout --quiet .
    git -C "$copy" apply "$repo/scripts/showings/$name.patch" || exit 1
    log=$(mktemp)
    # The libraries are taken from this target; only what is of the workspace is built again.
    (cd "$copy" && HISTORIES=$histories MODEL_SEED=$seed CARGO_TARGET_DIR=$repo/target \
        cargo test --workspace --test store model:: -- --nocapture) >"$log" 2>&1
    if found=$(grep -m1 'model: after' "$log"); then
        echo "$name: ${found#model: }"
    elif grep -q '^test result: ok' "$log"; then
        echo "$name: NOT FOUND in $histories histories"
        missed=$((missed + 1))
    else
        tail -n 20 "$log"
        exit 1
    fi
    rm -f "$log"
done
[ "$missed" = 0 ]
