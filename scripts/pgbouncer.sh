#!/usr/bin/env bash
# Puts trixie's PgBouncer beside the one that this system packages, so that the tests run both: from 1.21 on it keeps
# prepared statements of its own. With its own libraries, because those of an older Debian do not fit.
# Without Debian's archive nothing is done, and the tests say which versions they ran.
set -euo pipefail

suite=trixie
goal=/usr/local/lib/pgbouncer-$suite
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

[ -x $goal/pgbouncer ] && exit 0
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null | grep '/debian$') || {
    echo "no Debian archive: PgBouncer of $suite is not fetched" >&2
    exit 0
}
mirror=${mirror%%$'\n'*}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,root,made/lib}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$work/sources.list"
# Lists of their own: the system must not see packages of another suite.
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
    -o "Dir::Cache=$work/cache" -o Dir::State::status=/dev/null -o "APT::Sandbox::User=$(id -un)")
"${apt[@]}" update
(cd "$work/debs" && "${apt[@]}" download pgbouncer libc6 libcares2 libevent-2.1-7t64 libpam0g libssl3t64 libsystemd0 \
    libcap2 libaudit1 libcap-ng0 libzstd1 zlib1g)
for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done

libraries=$work/root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch)
loader=$(find "$libraries" -name 'ld-linux*.so.*' | head -n 1)
program=$work/root/usr/sbin/pgbouncer
"$loader" --library-path "$libraries" --list "$program" | awk '$3 ~ "^/" { print $3 }' |
    xargs cp --dereference --target-directory="$work/made/lib"
cp --dereference "$loader" "$work/made/lib/loader"
cp "$program" "$work/made/lib/pgbouncer"
cat > "$work/made/pgbouncer" << WRAPPER
#!/bin/sh
exec $goal/lib/loader --library-path $goal/lib $goal/lib/pgbouncer "\$@"
WRAPPER
# The servers of the tests run as another user.
chmod -R u=rwX,go=rX "$work/made"
chmod 755 "$work/made/pgbouncer" "$work"/made/lib/{loader,pgbouncer}
as_root rm -rf $goal.new
as_root mkdir -p "${goal%/*}"
as_root cp -r --no-preserve=ownership "$work/made" $goal.new
# At once, so that an interrupted copy is not taken for the program.
as_root mv $goal.new $goal
$goal/pgbouncer --version | head -n 1
