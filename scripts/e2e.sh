#!/usr/bin/env bash
# Boots whole machines under QEMU with a real kernel and the installer, on a network of their own.
# Usage: e2e.sh boot|failures|trials|powercut [amd64|arm64|raspi3b|raspi0]
# It needs root, or user namespaces; what is missing is installed with apt-get, Debian's kernel is kept in target/e2e.
# KEEP=DIR keeps the card and the consoles of a run that failed. For powercut: CUTS=N moments, SEED=N.
# For trials: LIMIT=60 seconds of each trial, ONLY='names of faults'.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-} machine=${2:-amd64}
case $machine in
    amd64)   arch=amd64 kernel=linux-image-cloud-amd64 target=x86_64-unknown-linux-gnu  qemu=qemu-system-x86 ;;
    arm64)   arch=arm64 kernel=linux-image-cloud-arm64 target=aarch64-unknown-linux-gnu qemu=qemu-system-arm ;;
    raspi3b) arch=arm64 kernel=linux-image-arm64       target=aarch64-unknown-linux-gnu qemu=qemu-system-arm ;;
    raspi0)  arch=armel kernel=linux-image-rpi         target=arm-unknown-linux-gnueabi qemu=qemu-system-arm ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

case $qemu in qemu-system-x86) emulator=qemu-system-x86_64 ;; *) emulator=qemu-system-aarch64 ;; esac
missing=()
for program in "$emulator:$qemu" busybox:busybox-static mcopy:mtools mkfs.vfat:dosfstools depmod:kmod cpio:cpio debugfs:e2fsprogs ip:iproute2 \
    unshare:util-linux; do
    command -v "${program%%:*}" >/dev/null || missing+=("${program##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || { echo "install these first: ${missing[*]}" >&2; exit 1; }
    echo "installing ${missing[*]}"
    as_root=(); [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    # A newer qemu-utils than Debian's own qemu-system keeps that from being installed: take both from one release.
    case " ${missing[*]} " in
        *" qemu-system-"*) missing+=("qemu-utils=$(apt-cache madison qemu-system-common | awk 'NR == 1 { print $3 }')") ;;
    esac
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends --allow-downgrades "${missing[@]}" >/dev/null
fi

scripts/debian-root.sh "$arch" "$kernel" "target/e2e/$machine"
PROFILE=quick scripts/static-agent.sh "$target" >/dev/null
scripts/programs.sh --quiet

namespaces=(--net)
[ "$(id -u)" = 0 ] || namespaces+=(--map-root-user)
exec unshare "${namespaces[@]}" target/debug/marco-e2e "$what" "$machine" "target/e2e/$machine/root" "target/$target/quick/marco-agent"
