//! An artificial root with a kernel, modules and programs, small enough for quick builds.

use std::path::Path;

/// Machine number of x86-64 in an ELF header.
pub(crate) const AMD64: u16 = 62;
/// Machine number of 64-bit ARM.
pub(crate) const ARM64: u16 = 183;

/// Version of the artificial kernel.
pub(crate) const KERNEL: &str = "6.99-test";

/// Builds an ELF file that contains this `.modinfo` and nothing else.
pub(crate) fn elf(machine: u16, modinfo: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let (header, section) = (64_u64, 64_u64);
    let text = modinfo.as_bytes();
    let names_at = header + u64::try_from(text.len()).unwrap();
    let sections_at = (names_at + u64::try_from(names.len()).unwrap()).next_multiple_of(8);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([1_u16, machine].iter().flat_map(|number| number.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([0, 0, sections_at].iter().flat_map(|number| number.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 0, 0, 64, 3, 2].iter().flat_map(|number| number.to_le_bytes()));
    assert_eq!(u64::try_from(file.len()).unwrap(), header);
    file.extend(text);
    file.extend(names);
    file.resize(usize::try_from(sections_at).unwrap(), 0);
    let places = [(0_u32, 0_u32, 0, 0), (1, 1, header, text.len()), (10, 3, names_at, names.len())];
    for (name, kind, at, size) in places {
        let start = file.len();
        file.extend([name, kind].iter().flat_map(|number| number.to_le_bytes()));
        file.extend([0, 0, at, u64::try_from(size).unwrap()].iter().flat_map(|number| number.to_le_bytes()));
        file.resize(start + usize::try_from(section).unwrap(), 0);
    }
    file
}

/// Writes a file and creates its parent folders.
pub(crate) fn write(root: &Path, path: &str, bytes: &[u8]) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Writes a module. `path`: below `kernel/`. `records`: its `.modinfo`, with blanks instead of NULs and `+` for blanks.
pub(crate) fn module(root: &Path, path: &str, records: &str) {
    let modinfo: String = records.split(' ').map(|record| format!("{}\0", record.replace('+', " "))).collect();
    let modinfo = format!("vermagic={KERNEL} SMP\0{modinfo}");
    let bytes = elf(AMD64, &modinfo);
    let packed = if path.ends_with(".xz") {
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        std::io::Write::write_all(&mut xz, &bytes).unwrap();
        xz.finish().unwrap()
    } else if path.ends_with(".zst") {
        zstd::encode_all(bytes.as_slice(), 1).unwrap()
    } else {
        bytes
    };
    write(root, &format!("lib/modules/{KERNEL}/kernel/{path}"), &packed);
}

/// Writes the kernel and its modules.
pub(crate) fn kernel(root: &Path) {
    let mut image = vec![7; 4096];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    write(root, &format!("boot/vmlinuz-{KERNEL}"), &image);
    write(root, &format!("boot/config-{KERNEL}"), b"CONFIG_RD_GZIP=y\n# CONFIG_RD_ZSTD is not set\n");
    write(
        root,
        &format!("lib/modules/{KERNEL}/modules.builtin"),
        b"kernel/drivers/virtio/virtio_pci.ko\nkernel/net/packet/af_packet.ko\n",
    );
    module(root, "fs/ext4/ext4.ko.xz", "depends=jbd2,mbcache softdep=pre:+crc32c alias=fs-ext4");
    // Newer kernels name an algorithm here, which is not the name of a file.
    module(root, "fs/jbd2/jbd2.ko", "depends= softdep=pre:+crypto-sha256");
    module(root, "crypto/sha256_generic.ko", "alias=crypto-sha256 depends=");
    module(root, "fs/mbcache.ko.zst", "depends=");
    module(root, "crypto/crc32c_generic.ko", "alias=crypto-crc32c depends=");
    module(root, "fs/fat/vfat.ko", "depends=fat");
    module(root, "fs/fat/fat.ko", "depends=");
    module(root, "fs/nls/nls_cp437.ko", "depends=");
    module(root, "fs/nls/nls_ascii.ko", "depends=");
    module(root, "drivers/block/virtio_blk.ko", "depends=");
    module(root, "drivers/net/virtio_net.ko", "depends= firmware=test/there.fw firmware=test/gone.fw");
    write(root, "lib/firmware/test/there.fw.zst", &zstd::encode_all(b"firmware".as_slice(), 1).unwrap());
}

/// Writes the programs that the installer runs.
pub(crate) fn programs(root: &Path) {
    let of_e2fsprogs = ["usr/sbin/mke2fs", "usr/sbin/e2fsck", "usr/sbin/resize2fs"];
    for program in of_e2fsprogs.into_iter().chain(["bin/busybox", "usr/sbin/mkfs.vfat", "usr/sbin/blkid"]) {
        write(root, program, &elf(AMD64, ""));
    }
    write(root, "etc/mke2fs.conf", b"[defaults]\n");
}
