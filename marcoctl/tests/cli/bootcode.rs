//! Sets of boot files, built from small artificial systems.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::made::{self, AMD64, ARM64, elf, write};
use crate::running::{Run, alone};

/// Creates a root with everything, and an agent next to it.
fn made_up() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let root = folder.path().join("root");
    made::kernel(&root);
    made::programs(&root);
    write(folder.path(), "agent", &elf(AMD64, ""));
    (folder, root)
}

async fn build(folder: &Path, more: &[&str]) -> Run {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (root, agent, zip) = (path("root"), path("agent"), path("set.zip"));
    let mut arguments = vec!["bootcode", "build", "--agent", &agent, "-o", &zip];
    if !more.contains(&"--package") {
        arguments.extend(["--root", root.as_str()]);
    }
    arguments.extend(more);
    alone(&arguments).await
}

/// Unpacks a `newc` archive: contents by path.
fn unpack_cpio(mut archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    loop {
        let field = |number: usize| {
            let text = std::str::from_utf8(&archive[6 + number * 8..14 + number * 8]).unwrap();
            usize::from_str_radix(text, 16).unwrap()
        };
        assert_eq!(&archive[..6], b"070701");
        let (size, name_size) = (field(6), field(11));
        let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
        let data = (110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            return files;
        }
        files.insert(name, archive[data..data + size].to_vec());
        archive = &archive[(data + size).next_multiple_of(4)..];
    }
}

fn initramfs(zip: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut zip = zip::ZipArchive::new(std::fs::File::open(zip).unwrap()).unwrap();
    let mut archive = Vec::new();
    flate2::read::GzDecoder::new(zip.by_name("initramfs").unwrap()).read_to_end(&mut archive).unwrap();
    unpack_cpio(&archive)
}

#[tokio::test]
async fn a_set_has_the_kernel_the_agent_and_the_modules_in_the_order_of_their_needs() {
    let (folder, _root) = made_up();
    let run = build(folder.path(), &["--output", "json"]).await;
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
    let json = run.json();
    assert_eq!((json["kernel"].as_str(), json["arch"].as_str()), (Some(made::KERNEL), Some("amd64")));
    assert_eq!(json["boards"][0], "virt");
    assert_eq!(json["missingFirmware"][0], "test/gone.fw");
    let zip = folder.path().join("set.zip");
    let summary = marco_archive::check_zip(std::fs::File::open(&zip).unwrap()).unwrap();
    marco_archive::check_installer_set(&summary).unwrap();
    assert_eq!(json["files"].as_array().unwrap().len(), summary.files.len());

    // The contents of a link are its target.
    let files = initramfs(&zip);
    assert_eq!(files["init"], b"usr/bin/marco-agent");
    assert_eq!(files["usr/lib/marco/udhcpc-hook"], b"../../bin/marco-agent");
    assert_eq!(files["usr/bin/marco-agent"], elf(AMD64, ""));
    assert_eq!(files["lib/firmware/test/there.fw"], b"firmware");
    let of_e2fsprogs = ["sbin/mke2fs", "sbin/mkfs.ext4", "sbin/e2fsck", "sbin/resize2fs"];
    for program in of_e2fsprogs.into_iter().chain(["bin/busybox", "sbin/mkfs.vfat", "sbin/blkid"]) {
        assert!(files.contains_key(program), "{program}");
    }
    let list = String::from_utf8(files["etc/marco/modules"].clone()).unwrap();
    let at = |name: &str| list.lines().position(|line| line.ends_with(&format!("/{name}.ko"))).unwrap();
    // The order of loading: the installer has no modprobe.
    assert!(at("crc32c_generic") < at("ext4") && at("jbd2") < at("ext4") && at("mbcache") < at("ext4"), "{list}");
    assert!(at("sha256_generic") < at("jbd2") && at("fat") < at("vfat"), "{list}");
    for line in list.lines() {
        assert!(files[line.trim_start_matches('/')].starts_with(b"\x7fELF"), "{line} is not there uncompressed");
    }
    let text = String::from_utf8(files["etc/marco/build"].clone()).unwrap();
    assert!(text.contains("kernel = \"6.99-test\"") && text.contains("build_time = \""), "{text}");
}

#[tokio::test]
async fn the_same_files_make_the_same_bytes() {
    let (folder, _root) = made_up();
    let mut zips = Vec::new();
    // A second build at another time. Inodes, times and the order of files must not differ.
    for _ in 0..2 {
        assert_eq!(build(folder.path(), &[]).await.code, 0);
        zips.push(std::fs::read(folder.path().join("set.zip")).unwrap());
    }
    assert!(zips[0] == zips[1], "they differ");
}

#[tokio::test]
async fn a_module_that_the_kernel_lacks_is_named() {
    let (folder, root) = made_up();
    std::fs::remove_file(root.join(format!("lib/modules/{}/kernel/drivers/net/virtio_net.ko", made::KERNEL))).unwrap();
    let run = build(folder.path(), &[]).await;
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("no module virtio_net") && run.stderr.contains("virt needs it"), "{run:?}");
    assert!(!folder.path().join("set.zip").exists());
}

#[tokio::test]
async fn what_cannot_run_is_refused_before_anything_is_written() {
    let (folder, root) = made_up();
    write(folder.path(), "agent", &elf(ARM64, ""));
    let run = build(folder.path(), &[]).await;
    assert!(run.code == 1 && run.stderr.contains("is for arm64"), "{run:?}");
    // This test is a dynamic program.
    std::fs::copy(std::env::current_exe().unwrap(), folder.path().join("agent")).unwrap();
    let run = build(folder.path(), &[]).await;
    assert!(run.code == 1 && run.stderr.contains("is not static"), "{run:?}");
    write(folder.path(), "agent", &elf(AMD64, ""));
    let run = build(folder.path(), &["--compress", "zstd"]).await;
    assert!(run.code == 1 && run.stderr.contains("CONFIG_RD_ZSTD is not set"), "{run:?}");
    std::fs::remove_file(root.join("bin/busybox")).unwrap();
    let run = build(folder.path(), &[]).await;
    assert!(run.code == 1 && run.stderr.contains("busybox-static"), "{run:?}");
    assert!(!folder.path().join("set.zip").exists());
}

#[tokio::test]
async fn a_program_brings_its_libraries_and_says_which_is_missing() {
    let (folder, root) = made_up();
    // This test is a dynamic program. It is put into the root with the libraries of this machine.
    let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    write(&root, "usr/bin/dynamic", &own);
    let run = build(folder.path(), &["--program", "/usr/bin/dynamic"]).await;
    assert!(run.code == 1 && run.stderr.contains("/usr/bin/dynamic needs "), "{run:?}");
    // The libraries that are mapped now are those that the loader chose.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for library in maps.lines().filter_map(|line| line.split_whitespace().nth(5)).filter(|path| path.contains(".so")) {
        write(&root, library.trim_start_matches('/'), &std::fs::read(library).unwrap());
    }
    let loader = if cfg!(target_arch = "x86_64") { "lib64/ld-linux-x86-64.so.2" } else { "lib/ld-linux-aarch64.so.1" };
    write(&root, loader, &std::fs::read(Path::new("/").join(loader)).unwrap());
    let run = build(folder.path(), &["--program", "/usr/bin/dynamic"]).await;
    if cfg!(target_arch = "x86_64") {
        assert_eq!(run.code, 0, "{run:?}");
        let files = initramfs(&folder.path().join("set.zip"));
        assert!(
            files.contains_key(loader) && files.keys().any(|path| path.ends_with("/libc.so.6")),
            "{:?}",
            files.keys()
        );
    }
}

#[tokio::test]
async fn packages_are_taken_as_they_are() {
    let (folder, root) = made_up();
    let debs = folder.path().join("debs");
    std::fs::create_dir(&debs).unwrap();
    let mut tarball = tar::Builder::new(Vec::new());
    tarball.append_dir_all(".", &root).unwrap();
    let data = zstd::encode_all(tarball.into_inner().unwrap().as_slice(), 1).unwrap();
    let mut package = ar::Builder::new(std::fs::File::create(debs.join("all_1_amd64.deb")).unwrap());
    for (name, bytes) in [("debian-binary", b"2.0\n".as_slice()), ("data.tar.zst", &data)] {
        let header = ar::Header::new(name.as_bytes().to_vec(), u64::try_from(bytes.len()).unwrap());
        package.append(&header, bytes).unwrap();
    }
    drop(package);
    let run = build(folder.path(), &["--package", debs.to_str().unwrap()]).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stdout.contains("kernel:    6.99-test (amd64)"), "{run:?}");
}
