//! Images that are judged before the card is touched, and boot files below a prefix.

use std::sync::Arc;

use marco_proto::v1::ImageFacts;

use super::{Bed, digest, downloader, image, image_job, job, raw_job, zip};
use crate::bootpart::{InstallJob, Instruction};
use crate::download::tests::{CHUNK, Wrong, serve_judged, serve_packed};
use crate::system::{Mode, Reboot};

fn facts(refusal: &str, files: &[&str]) -> Option<ImageFacts> {
    Some(ImageFacts {
        refusal: refusal.to_owned(),
        boot_files: files.iter().map(|file| (*file).to_owned()).collect(),
        texts: [("config.txt".to_owned(), "arm_64bit=1\n".to_owned())].into(),
        ..ImageFacts::default()
    })
}

/// The controller's judgement alone: the image itself is good, so nothing else can refuse it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_that_is_known_not_to_start_this_board_touches_nothing() {
    let pi3 = ["kernel8.img", "config.txt", "cmdline.txt", "bcm2710-rpi-3-b.dtb"];
    for (said, word) in [(facts("it has no init", &[]), "no init"), (facts("", &pi3), "bcm2711-rpi-4-b.dtb")] {
        let tar = image("boot/firmware", 10, "");
        let (downloader, _server) = serve_judged(tar.clone().into(), Arc::new(|_| Wrong::Nothing), said).await;
        let mut bed = Bed::new().await;
        let error = bed.install(&image_job(&tar), &downloader).await.unwrap_err();
        assert_eq!((error.reason, error.retryable), ("NOT_A_SYSTEM", false));
        assert!(error.message.contains(word), "{error}");
        assert!(bed.has("root/old"), "the card was touched");
        bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
        assert_eq!(bed.powered.boot().await.mode(), Mode::Running, "the old system is back");
        bed.powered.kill().await;
    }
    let tar = image("boot/firmware", 10, "");
    let good = facts("", &["kernel8.img", "config.txt", "cmdline.txt", "bcm2711-rpi-4-b.dtb"]);
    let (downloader, _server) = serve_judged(tar.clone().into(), Arc::new(|_| Wrong::Nothing), good).await;
    let bed = Bed::new().await;
    bed.install(&image_job(&tar), &downloader).await.unwrap();
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_neither_tarball_nor_disk_touches_nothing() {
    let seven = [b"7z\xbc\xaf\x27\x1c".as_slice(), &[7; 4000]].concat();
    let (downloader, _server) = downloader(seven.clone(), |_| Wrong::Nothing).await;
    let bed = Bed::new().await;
    let error = bed.install(&image_job(&seven), &downloader).await.unwrap_err();
    assert!(error.reason == "IMAGE_REFUSED" && error.message.contains("unpack it first"), "{error}");
    assert!(bed.has("root/old"), "the card was touched");
    bed.powered.kill().await;
}

/// A home or root that is kept and that the installer cannot mount: with and without boot files alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_and_not_understood_stays_and_the_old_system_comes_back() {
    let (tar, zip) = (image("boot/firmware", 10, ""), zip("other kernel", ""));
    let boot_only = job(Instruction::BootOnly { sha256: digest(&zip) });
    for (place, holds, bytes, job, reason) in [
        ("home", "crypto_LUKS", &tar, image_job(&tar), "PARTITION_NOT_UNDERSTOOD"),
        ("home", "unreadable", &tar, image_job(&tar), "PARTITION_UNREADABLE"),
        ("home", "LVM2_member", &zip, boot_only.clone(), "PARTITION_NOT_UNDERSTOOD"),
        ("root", "ntfs", &zip, boot_only.clone(), "PARTITION_NOT_UNDERSTOOD"),
        ("root", "unreadable", &zip, boot_only.clone(), "PARTITION_UNREADABLE"),
        ("root", "", &zip, boot_only, "ROOT_EMPTY"),
    ] {
        let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
        let mut bed = Bed::new().await;
        std::fs::write(bed.dir.path().join(format!("{place}-holds")), holds).unwrap();
        let error = bed.install(&job, &downloader).await.unwrap_err();
        assert_eq!((error.reason, error.retryable), (reason, false), "{place}: {holds}");
        assert!(bed.has("root/old") && bed.read("boot/kernel8.img") != "other kernel");
        assert_eq!(bed.read("home/pi/notes"), "mine");
        bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
        assert_eq!(bed.powered.boot().await.mode(), Mode::Running, "the old system is back");
        bed.powered.kill().await;
    }
}

/// The front of a disk image whose root has `root` MiB.
fn disk(root: u32) -> Vec<u8> {
    let mut disk = vec![0; 64 << 10];
    for (number, kind, start, length) in [(0, 0x0c, 2048, 64 << 11), (1, 0x83, 65 << 11, root << 11)] {
        let entry = &mut disk[446 + number * 16..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&u32::to_le_bytes(start));
        entry[12..16].copy_from_slice(&u32::to_le_bytes(length));
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// The first chunk tells it: this card's root would have two thirds of 1228 MiB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_does_not_fit_is_refused_before_anything_is_touched() {
    // Its root begins within the boot partition.
    let mut senseless = disk(1);
    senseless[446 + 16 + 8..446 + 16 + 12].copy_from_slice(&[0, 9, 0, 0]);
    for (bytes, reason, word) in [
        (disk(1000), "NO_ROOM", "root has 1000 MiB"),
        (disk(800), "SYSTEM_ERROR", "push a tarball"),
        (senseless, "IMAGE_REFUSED", "overlap"),
    ] {
        let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
        let mut bed = Bed::new().await;
        std::fs::write(bed.dir.path().join("card-size"), "2000\n").unwrap();
        let error = bed.install(&image_job(&bytes), &downloader).await.unwrap_err();
        assert_eq!((error.reason, error.retryable), (reason, false), "{error}");
        assert!(error.message.contains(word), "{error}");
        assert!(bed.has("root/old"), "the card was touched");
        bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
        assert_eq!(bed.powered.boot().await.mode(), Mode::Running, "the old system is back");
        bed.powered.kill().await;
    }
}

/// The push has seen that it is a disk. Its first chunk alone, a frame that is skipped, would make it a tarball.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn push_decides_what_an_image_is_and_not_its_first_chunk() {
    // A skippable frame of zstd (RFC 8878, 3.1.2) that fills the first chunk.
    let length = u32::try_from(CHUNK).unwrap();
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18], length.to_le_bytes().as_slice(), &vec![0; CHUNK]].concat();
    let bytes = [skipped, zstd::encode_all(disk(1000).as_slice(), 1).unwrap()].concat();
    let (downloader, _server) = serve_packed(bytes.clone().into(), "zstd disk").await;
    let bed = Bed::new().await;
    for (job, reason, word) in
        [(image_job(&bytes), "SYSTEM_ERROR", "push a tarball"), (raw_job(&bytes), "IMAGE_REFUSED", "compress it again")]
    {
        let error = bed.install(&job, &downloader).await.unwrap_err();
        assert!(error.reason == reason && error.message.contains(word), "{error}");
        assert!(bed.has("root/old"), "the card was touched");
    }
    bed.powered.kill().await;
}

/// The push read the partitions, and counts more than the table, by which the root is larger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn room_is_asked_for_what_the_push_saw() {
    let bytes = disk(1000);
    for (root_mib, word) in [(700, "push a tarball"), (900, "root has 900 MiB")] {
        let said = ImageFacts { root_bytes: root_mib << 20, boot_bytes: 1 << 20, ..ImageFacts::default() };
        let (downloader, _server) = serve_judged(bytes.clone().into(), Arc::new(|_| Wrong::Nothing), Some(said)).await;
        let bed = Bed::new().await;
        std::fs::write(bed.dir.path().join("card-size"), "2000\n").unwrap();
        let error = bed.install(&image_job(&bytes), &downloader).await.unwrap_err();
        assert!(error.message.contains(word), "{error}");
        assert!(bed.has("root/old"), "the card was touched");
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn home_that_is_given_up_goes_whatever_it_holds() {
    let tar = image("boot/firmware", 10, "");
    let (downloader, _server) = downloader(tar.clone(), |_| Wrong::Nothing).await;
    let bed = Bed::new().await;
    std::fs::write(bed.dir.path().join("home-holds"), "crypto_LUKS").unwrap();
    bed.install(&InstallJob { discard_home: true, ..image_job(&tar) }, &downloader).await.unwrap();
    assert!(!bed.has("home/pi/notes"));
    bed.powered.kill().await;
}

/// As Ubuntu lays its boot partition out: everything below a prefix, and another one for trial boots of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn system_below_os_prefix_comes_up_on_trial_and_afterwards() {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in [
        ("usr/sbin/init", "#!/bin/sh\n"),
        ("etc/fstab", "LABEL=writable / ext4 defaults 0 1\nLABEL=system-boot /boot/firmware vfat defaults 0 1\n"),
        (
            "boot/firmware/config.txt",
            "[all]\nos_prefix=current/\n[tryboot]\nos_prefix=new/\n[all]\narm_64bit=1\nkernel=vmlinuz\n\
             cmdline=cmdline.txt\ninitramfs initrd.img followkernel\n[pi4]\nmax_framebuffers=2",
        ),
        ("boot/firmware/current/vmlinuz", "kernel"),
        ("boot/firmware/current/initrd.img", "initrd"),
        ("boot/firmware/current/cmdline.txt", "console=tty1 root=LABEL=writable rootwait fixrtc\n"),
        ("boot/firmware/current/bcm2711-rpi-4-b.dtb", "tree"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let (downloader, _server) = downloader(tar.clone(), |_| Wrong::Nothing).await;
    let mut bed = Bed::new().await;
    bed.install(&image_job(&tar), &downloader).await.unwrap();
    let cmdline = bed.read("boot/current/cmdline.txt");
    assert!(cmdline.contains("root=PARTUUID=") && !cmdline.contains("writable"), "{cmdline}");
    assert!(!bed.has("boot/cmdline.txt"));
    assert_eq!(bed.trial().await.mode(), Mode::Running);
    bed.powered.kill().await;
}
