#!/usr/bin/env bash
# Builds a small Debian with systemd for a virtual machine: kernel, initramfs and root tree, kept in DIR for the next time.
# Usage: host-vm-image.sh DIR
set -euo pipefail
dir=$1
stamp=$(sha256sum "$0" | cut -c1-16)
[ -f "$dir/complete-$stamp" ] && exit 0
export DEBIAN_FRONTEND=noninteractive

missing=()
for program in qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap cpio:cpio depmod:kmod mke2fs:e2fsprogs; do
    command -v "${program%%:*}" >/dev/null || missing+=("${program##*:}")
done
# The kernel is looked up below, so the lists are needed even when no program is missing.
apt-get update -qq
if [ ${#missing[@]} -gt 0 ]; then
    # A newer qemu-utils than Debian's own qemu-system keeps that from being installed: take both from one release.
    version=$(apt-cache madison qemu-system-common | awk 'NR == 1 { print $3 }')
    apt-get install -y -qq --no-install-recommends --allow-downgrades "qemu-utils=$version" "${missing[@]}" >/dev/null
fi

rm -rf "$dir"
mkdir -p "$dir/kernel" "$dir/initramfs"
cd "$dir"
package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
# Not the busybox that is installed: that one may need libraries, which the initramfs has not.
(cd kernel && apt-get download -qq "$package" busybox-static 2>/dev/null && for file in ./*.deb; do dpkg -x "$file" .; done && rm ./*.deb)
version=$(ls kernel/lib/modules)
cp "kernel/boot/vmlinuz-$version" vmlinuz
depmod -b kernel "$version"

mkdir -p initramfs/{bin,modules,proc,sys,dev,root}
cp kernel/bin/busybox initramfs/bin/busybox
for module in virtio_pci virtio_blk virtio_net; do
    modprobe -d "$PWD/kernel" -S "$version" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
done | awk '!seen[$0]++' | while read -r file; do
    cp "$file" initramfs/modules/
    echo "/modules/$(basename "$file")" >>initramfs/modules/list
done
cat >initramfs/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "$module"; done </modules/list
until [ -b /dev/vda ]; do /bin/busybox usleep 100000; done
/bin/busybox mount -t ext4 /dev/vda /root
exec /bin/busybox switch_root /root /sbin/init
INIT
chmod +x initramfs/init
(cd initramfs && find . | cpio -o -H newc --quiet | gzip -1) >initramfs.gz

mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,udev,dbus,util-linux bookworm root
rm -rf initramfs kernel root/var/cache/apt/* root/var/lib/apt/lists/* root/usr/share/{doc,man,locale}
cat >root/etc/systemd/network/eth.network <<'NETWORK'
[Match]
Name=e*
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
NETWORK
ln -sf /usr/lib/systemd/system/systemd-networkd.service root/etc/systemd/system/multi-user.target.wants/
# Nobody logs in, and nothing should wait for a terminal.
ln -sf /dev/null root/etc/systemd/system/serial-getty@ttyS0.service
ln -sf /dev/null root/etc/systemd/system/getty@.service
echo host >root/etc/hostname
: >root/etc/machine-id
touch "complete-$stamp"
