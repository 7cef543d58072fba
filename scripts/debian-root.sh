#!/usr/bin/env bash
# Makes a folder with Debian's kernel and the few programs that an installer calls, for the emulated boots: the packages
# of that architecture, unpacked, nothing run. Kept for the next time.
# Usage: debian-root.sh amd64|arm64|armel KERNEL-PACKAGE DIR
set -euo pipefail
arch=$1 kernel=$2 dir=$3
stamp=$(sha256sum "$0" | cut -c1-16)
[ -f "$dir/complete-$stamp" ] && exit 0

rm -rf "$dir"
mkdir -p "$dir"/apt/{lists/partial,cache/archives/partial} "$dir/debs" "$dir/root"
touch "$dir/apt/status"
dir=$(realpath "$dir")
# Package lists of another architecture, apart from this machine's own.
options=(-o "APT::Architecture=$arch" -o "APT::Architectures=$arch" -o "Dir::State::Lists=$dir/apt/lists"
    -o "Dir::State::status=$dir/apt/status" -o "Dir::Cache=$dir/apt/cache" -o APT::Sandbox::User=root)
echo "downloading $kernel and e2fsprogs, dosfstools, busybox-static, util-linux for $arch" >&2
apt-get "${options[@]}" update -qq
# The name of a kernel's package without a version stands for the newest.
package=$(apt-cache "${options[@]}" depends "$kernel" | awk '/Depends: linux-image/ { print $2; exit }')
packages=("${package:-$kernel}" busybox-static dosfstools e2fsprogs libblkid1 libc6 libcom-err2 libext2fs2 libss2 libuuid1
    util-linux)
(cd "$dir/debs" && apt-get "${options[@]}" download -qq "${packages[@]}")
for file in "$dir"/debs/*.deb; do dpkg -x "$file" "$dir/root"; done
# For an initramfs with a shell.
ln -s busybox "$dir/root/bin/sh"
version=$(ls "$dir/root/lib/modules")
depmod -b "$dir/root" "$version"
rm -rf "$dir/apt" "$dir/debs" "$dir"/root/usr/share/{doc,man,locale,lintian}
touch "$dir/complete-$stamp"
