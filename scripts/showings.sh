#!/usr/bin/env bash
# Shows that the model (make model) and the fault driver (make faults) find the faults that they are there for: takes one
# mending out at a time, by the patches in scripts/showings, in a copy of this commit. The model runs histories until one
# fails, and how many were kept before is printed; the driver plays the plan in the first line of a patch in
# scripts/showings/faults. A mending that nobody misses is an error. Arguments: the names of patches; without any, all.
set -uo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
histories=${HISTORIES:-1000} seed=${MODEL_SEED:-1}
copy=$repo/target/showings

git worktree remove --force "$copy" 2>/dev/null
git worktree add --quiet --detach "$copy" HEAD || exit 1
trap 'git -C "$repo" worktree remove --force "$copy"' EXIT
patches=("$@")
[ $# -gt 0 ] || patches=($(cd scripts/showings && ls *.patch faults/*.patch | sed 's/\.patch$//'))

missed=0
for name in "${patches[@]}"; do
    git -C "$copy" checkout --quiet .
    git -C "$copy" apply "$repo/scripts/showings/$name.patch" || exit 1
    log=$(mktemp)
    run=(store model:: --) said='model: after' plan=
    case $name in faults/*)
        plan=$(sed -n '1s/^FAULT_PLAN=//p' "scripts/showings/$name.patch")
        run=(faults update_keeps_its_promises_under_faults -- --ignored --exact) said='^FAILED '
    esac
    # The libraries are taken from this target; only what is of the workspace is built again.
    (cd "$copy" && env HISTORIES="$histories" MODEL_SEED="$seed" FAULT_PLAN="$plan" CARGO_TARGET_DIR="$repo/target" \
        cargo test --workspace --test "${run[@]}" --nocapture) >"$log" 2>&1
    if found=$(grep -m1 "$said" "$log"); then
        echo "$name: ${found#model: }"
    elif grep -q '^test result: ok' "$log"; then
        echo "$name: NOT FOUND${plan:+ by $plan}"
        missed=$((missed + 1))
    else
        tail -n 20 "$log"
        exit 1
    fi
    rm -f "$log"
done
[ "$missed" = 0 ]
