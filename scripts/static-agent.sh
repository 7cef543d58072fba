#!/usr/bin/env bash
# Builds a static marco-agent for a Pi, or for the virtual machines of the tests: scripts/static-agent.sh TARGET
#
#   aarch64-unknown-linux-gnu        64-bit systems, Pi 3 and later
#   armv7-unknown-linux-gnueabihf    32-bit systems, Pi 2 and later
#   arm-unknown-linux-gnueabi        every Pi, also the first and the Zero. Soft float: Debian's hard-float C library is
#                                    for ARMv7 and dies on ARMv6
#   x86_64-unknown-linux-gnu         a PC, or a virtual machine
#
# PROFILE=quick builds without link-time optimisation, several times faster, for tests.
#
# A Rust toolchain that has the target's standard library is used as it is (`rustup target add TARGET`); otherwise, on
# Debian, its own Rust compiler builds the standard library from source, once for each target.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-}
profile=${PROFILE:-release}
case $target in
    aarch64-unknown-linux-gnu)     gnu=aarch64-linux-gnu   libc=libc6-dev-arm64-cross ;;
    armv7-unknown-linux-gnueabihf) gnu=arm-linux-gnueabihf libc=libc6-dev-armhf-cross ;;
    arm-unknown-linux-gnueabi)     gnu=arm-linux-gnueabi   libc=libc6-dev-armel-cross ;;
    x86_64-unknown-linux-gnu)      gnu=x86_64-linux-gnu    libc=libc6-dev ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

install() {
    command -v apt-get >/dev/null || { echo "install these first: $*" >&2; exit 1; }
    local as_root=(); [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

command -v "$gnu-gcc" >/dev/null || install "gcc-$gnu" "$libc"
variable=${target//-/_}
export "CARGO_TARGET_${variable^^}_LINKER=$gnu-gcc" "CC_$variable=$gnu-gcc" "AR_$variable=$gnu-ar"
export "CARGO_TARGET_${variable^^}_RUSTFLAGS=-C target-feature=+crt-static"

cargo=cargo
std=()
if ! [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
    if ! [ -x /usr/bin/rustc ] || ! [ -d "$(/usr/bin/rustc --print sysroot)/lib/rustlib/src/rust/library" ]; then
        install rustc-web cargo-web rust-web-src
    fi
    cargo=/usr/bin/cargo
    # Building std is not in stable cargo; this compiler and this source are a pair, so it is safe here.
    export RUSTC=/usr/bin/rustc RUSTDOC=/usr/bin/rustdoc RUSTC_BOOTSTRAP=1
    std=(-Z "build-std=std,panic_abort")
fi

"$cargo" build --profile "$profile" --locked --package node-agent --bin marco-agent --target "$target" "${std[@]}"
folder=$profile; [ "$profile" != dev ] || folder=debug
agent=${CARGO_TARGET_DIR:-target}/$target/$folder/marco-agent
ls -l "$agent"
# Whoever copies this to a Pi wants to know before that it needs nothing there.
if "$gnu-readelf" --program-headers "$agent" | grep -q INTERP; then
    echo "$agent is not static" >&2
    exit 1
fi
