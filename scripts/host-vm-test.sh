#!/usr/bin/env bash
# The agent as a systemd service on a running system, in a virtual machine with a real kernel and a real systemd: it
# enrols from the join file on its boot partition, is refused an update, reboots, and powers off. What really happened is
# read from the machine itself: the kernel's banner on the console, the boot ids, and the end of QEMU.
# Usage: host-vm-test.sh BIN-DIR IMAGE-DIR
set -euo pipefail
bin=$(realpath "$1")
image=$2
here=$(realpath "$(dirname "$0")")
"$here/host-vm-image.sh" "$image"
image=$(realpath "$image")
work=$(mktemp -d)
pids=()
finish() {
    local status=$?
    kill "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    if [ $status -ne 0 ]; then
        echo "--- console"; tail -n 40 "$work/console" 2>/dev/null || true
        echo "--- controller"; tail -n 20 "$work/controller.log" 2>/dev/null || true
    fi
    rm -rf "$work"
    exit $status
}
trap finish EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }
until_true() { # SECONDS WHAT COMMAND...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $deadline ] || fail "not in time: $what"
        sleep 0.5
    done
}
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

api=$(free_port) enroll=$(free_port)
cd "$work"
"$bin/marco-controller" serve --data-dir data --certs certs --listen "127.0.0.1:$api" --enroll-listen "127.0.0.1:$enroll" \
    >greeting 2>controller.log &
pids+=($!)
ctl() { "$bin/marcoctl" --controller "127.0.0.1:$api" --certs certs "$@"; }
until_true 20 "the controller answers" sh -c "grep -q Try: '$work/greeting'"
token=$(ctl tokens create --ttl 20m)

# The machine's disk: the agent, its unit, and the join file; 10.0.2.2 is this host.
cp -a "$image/root" root
install -m 755 "$bin/marco-agent" root/usr/bin/marco-agent
install -m 644 "$here/../node-agent/dist/marco-agent.service" root/etc/systemd/system/
ln -s ../marco-agent.service root/etc/systemd/system/multi-user.target.wants/
mkdir -p root/boot/firmware/marco root/etc/marco
cat >root/boot/firmware/marco/join.toml <<JOIN
controllers = ["10.0.2.2:$api"]
enroll = ["10.0.2.2:$enroll"]
token = "$token"
name = "host-1"
JOIN
mke2fs -q -t ext4 -d root disk.img 700M
rm -rf root
qemu-system-x86_64 -accel tcg -cpu max -m 512 -nographic -no-user-config -nodefaults -serial stdio \
    -kernel "$image/vmlinuz" -initrd "$image/initramfs.gz" -append "console=ttyS0 panic=1 systemd.journald.forward_to_console=1" \
    -drive file=disk.img,format=raw,if=virtio,cache=unsafe -nic user,model=virtio-net-pci </dev/null >console 2>&1 &
qemu=$!
pids+=($qemu)

field() { ctl --output json nodes get host-1 2>/dev/null | python3 -c "import json,sys; print(json.load(sys.stdin)$1)" 2>/dev/null; }
connected() { [ "$(field "['connected']")" = True ]; }
boots() { grep -c 'Linux version' console || true; }

until_true 240 "the node registers by itself" connected
first=$(field "['bootId']")
[ "$(field "['system']['os']")" = "$(. "$image/root/etc/os-release" && echo "$PRETTY_NAME")" ] || fail "the node does not say which system it runs"
echo "registered: host-1, $(field "['system']['os']"), kernel $(field "['system']['kernelRelease']"), boot id $first"
[ "$(boots)" = 1 ] || fail "the machine booted $(boots) times, not once"

# All that a push asks of an image; what it is made of does not matter to a node that will not write it.
mkdir -p pi/sbin pi/boot/firmware
for file in sbin/init boot/firmware/{config.txt,cmdline.txt,kernel8.img,bcm2711-rpi-4-b.dtb}; do echo "$file" >"pi/$file"; done
tar -C pi -czf image.tar.gz .
ctl artifacts push image.tar.gz --kind image --name refused >/dev/null
if ctl --output json operations update host-1 --image refused --notice 0s --wait --timeout 60s >refused.json 2>refused.err; then
    fail "an update of a card that is not in layout resident was not refused"
fi
operation=$(ctl --output json operations list | python3 -c 'import json,sys; print(json.load(sys.stdin)["operations"][0]["name"])')
ctl operations explain "$operation" host-1 | tee explain
grep -q LAYOUT_NOT_RESIDENT explain || fail "the refusal does not say why"

ctl operations reboot host-1 --notice 3s --message "reboot test" --wait --timeout 240s
second=$(field "['bootId']")
[ "$second" != "$first" ] || fail "the boot id did not change"
[ "$(boots)" = 2 ] || fail "the kernel started $(boots) times, not twice"
echo "rebooted: the kernel started twice, boot id now $second"

until_true 240 "the node is back" connected
ctl operations power-off host-1 --notice 0s --wait --timeout 240s
until_true 120 "the machine is off" sh -c "! kill -0 $qemu 2>/dev/null"
[ "$(boots)" = 2 ] || fail "the kernel started again"
echo "powered off: QEMU ended, the kernel started no third time"
echo "3 passed, 0 failed"
