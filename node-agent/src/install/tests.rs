#![expect(clippy::as_conversions, reason = "sizes of a few megabytes fit every integer type")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Context, InstallError, Phase, Progress, WriteJournal, install};
use crate::bootpart::{InstallJob, Instruction, JOB_VERSION, Prefix};
use crate::download::Downloader;
use crate::download::tests::{CHUNK, Wrong, serve_bytes};
use crate::job::Labels;
use crate::system::virtual_pi::tests::Powered;
use crate::system::{Booted, Mode, Reboot, Release, System};

mod judged;

const SOON: Duration = Duration::from_secs(30);
const EXECUTION: &str = "operations/x/executions/pi-01";

/// A system with its boot files in `boot`; `big` bytes make it longer than a few chunks.
fn image(boot: &str, big: usize, without: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    // Hardly compressible, so that it is several chunks of the download, too.
    let noise: Vec<u8> = (0..big).map(|at| (at * at / 7 + at / 13) as u8).collect();
    let files: [(String, u32, &[u8]); 12] = [
        ("usr/share/noise".into(), 0o644, &noise),
        ("usr/lib/systemd/systemd".into(), 0o755, b"init"),
        ("etc/os-release".into(), 0o644, b"PRETTY_NAME=\"New system\"\n"),
        ("etc/hostname".into(), 0o644, b"raspberrypi\n"),
        ("etc/machine-id".into(), 0o644, b"uninitialized\n"),
        ("etc/hosts".into(), 0o644, b"127.0.0.1 localhost\n127.0.1.1 raspberrypi\n"),
        ("etc/fstab".into(), 0o644, b"PARTUUID=aa-02 / ext4 noatime 0 1\n"),
        ("etc/ssh/ssh_host_ed25519_key".into(), 0o600, b"everybody's"),
        (format!("{boot}/kernel8.img"), 0o755, b"new kernel"),
        (format!("{boot}/bcm2711-rpi-4-b.dtb"), 0o755, b"dtb"),
        (format!("{boot}/config.txt"), 0o755, b"arm_64bit=1\n"),
        (
            format!("{boot}/cmdline.txt"),
            0o755,
            b"console=tty1 root=PARTUUID=aa-02 init=/usr/lib/raspi-config/init_resize.sh\n",
        ),
    ];
    for (name, mode, bytes) in files {
        if name.ends_with(without) && !without.is_empty() {
            continue;
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, name, bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zip(kernel: &str, without: &str) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, text) in [
        ("kernel8.img", kernel),
        ("bcm2711-rpi-4-b.dtb", "dtb"),
        ("config.txt", "arm_64bit=1\n"),
        ("cmdline.txt", "console=tty1 root=/dev/mmcblk0p7\n"),
    ] {
        if name != without {
            zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
    }
    zip.finish().unwrap().into_inner()
}

/// A Pi in its installer, on a trial boot, as step 3 of an update leaves it.
struct Bed {
    dir: TempDir,
    powered: Powered,
    installer: Arc<dyn System>,
    labels: watch::Sender<Option<Labels>>,
}

impl Bed {
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let mut powered = Powered::new(dir.path());
        powered.boot().await;
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("home/pi/notes", "mine");
        put("root/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        put("root/etc/ssh/ssh_host_ed25519_key", "my own");
        put("root/old", "old");
        powered.pi.reboot(Reboot::TryBoot, None, "").await.unwrap();
        let installer = powered.boot().await;
        assert_eq!(installer.mode(), Mode::Installer);
        Self { dir, powered, installer, labels: watch::Sender::new(None) }
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.path().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn has(&self, path: &str) -> bool {
        self.dir.path().join(path).exists()
    }

    async fn install(&self, job: &InstallJob, downloader: &Downloader) -> Result<Vec<Phase>, InstallError> {
        let phases = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&phases);
        let progress: Progress = Arc::new(move |phase, _, _| told.lock().unwrap().push(phase));
        let journal: WriteJournal = Arc::new(|folder: &Path| fs::write(folder.join("journal.json"), "trial"));
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let never = CancellationToken::new();
        let context = Context { journal, now, progress, labels: self.labels.subscribe(), stands: Arc::new(|| true) };
        timeout(SOON, install(job, &self.installer, downloader, context, &never)).await.unwrap()?;
        let mut phases = phases.lock().unwrap().clone();
        phases.dedup();
        Ok(phases)
    }

    /// Makes the trial boot. Returns the system that came up.
    async fn trial(&mut self) -> Arc<dyn System> {
        self.installer.reboot(Reboot::TryBoot, Some(EXECUTION), "").await.unwrap();
        self.powered.boot().await
    }
}

fn job(instruction: Instruction) -> InstallJob {
    InstallJob {
        version: JOB_VERSION,
        instruction,
        execution: EXECUTION.into(),
        attempt: 1,
        sequence: 3,
        boot_id: "before".into(),
        controllers: Vec::new(),
        enroll: String::new(),
        node: "pi-01".into(),
        discard_home: false,
        trials: 0,
        prefix: Prefix::B0,
        disk: None,
    }
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn image_job(bytes: &[u8]) -> InstallJob {
    job(Instruction::Install { image: "image".into(), sha256: digest(bytes), raw: false })
}

fn raw_job(bytes: &[u8]) -> InstallJob {
    job(Instruction::Install { image: "image".into(), sha256: digest(bytes), raw: true })
}

async fn downloader(
    bytes: Vec<u8>,
    fault: impl Fn(usize) -> Wrong + Send + Sync + 'static,
) -> (Downloader, impl Sized) {
    serve_bytes(Bytes::from(bytes), Arc::new(fault)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_becomes_this_nodes_system() {
    let bytes = gzip(&image("boot/firmware", 300_000, ""));
    let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
    let mut bed = Bed::new().await;
    let phases = bed.install(&image_job(&bytes), &downloader).await.unwrap();
    assert_eq!(
        phases,
        [
            Phase::Connecting,
            Phase::Partitioning,
            Phase::Unpacking,
            Phase::BootFiles,
            Phase::Personalising,
            Phase::Syncing
        ]
    );
    assert!(!bed.has("root/old"));
    assert_eq!(bed.read("home/pi/notes"), "mine");
    assert_eq!(bed.read("boot/kernel8.img"), "new kernel");
    assert!(!bed.has("root/boot/firmware/kernel8.img"));
    let cmdline = bed.read("boot/cmdline.txt");
    let trial = "marco.trial=begin panic=10 watchdog_disarm=0 watchdog.open_timeout=600 \
                 init=/var/lib/marco-agent/supervise marco.limit=840 marco.trial=end";
    assert!(bed.has("root/var/lib/marco-agent/supervise"));
    assert!(cmdline.starts_with(&format!("{trial} console=tty1 root=PARTUUID=")), "{cmdline}");
    assert!(!cmdline.contains("resize"), "{cmdline}");
    assert!(bed.read("root/etc/fstab").contains("-04 /boot/firmware vfat"));
    assert_eq!(bed.read("root/etc/hostname"), "pi-01\n");
    assert_eq!(bed.read("root/etc/machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert_eq!(bed.read("root/etc/ssh/ssh_host_ed25519_key"), "my own");
    assert_eq!(bed.read("root/var/lib/marco-agent/journal.json"), "trial");
    let system = bed.trial().await;
    assert_eq!(system.booted(), Some(Booted { partition: 4, tryboot: true }));
    assert_eq!(system.facts().unwrap().system.os, "New system");
    let release = system.release().unwrap().unwrap();
    assert_eq!((release.execution.as_str(), release.image_sha256), (EXECUTION, digest(&bytes)));
    // Not confirmed: any further reset brings the installer back.
    system.reboot(Reboot::Plain, None, "").await.unwrap();
    assert_eq!(bed.powered.boot().await.mode(), Mode::Installer);
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_host_keys_gets_fresh_ones_and_not_the_images() {
    let tar = image("boot/firmware", 10, "");
    let (downloader, _server) = downloader(tar.clone(), |_| Wrong::Nothing).await;
    let bed = Bed::new().await;
    fs::remove_file(bed.dir.path().join("root/etc/ssh/ssh_host_ed25519_key")).unwrap();
    bed.install(&image_job(&tar), &downloader).await.unwrap();
    let key = bed.dir.path().join("root/etc/ssh/ssh_host_ed25519_key");
    assert!(bed.read("root/etc/ssh/ssh_host_ed25519_key").starts_with("-----BEGIN OPENSSH PRIVATE KEY-----"));
    assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_with_files_for_labels_is_not_touched_before_the_nodes_labels_are_known() {
    let tar = image("boot/firmware", 10, "");
    let (downloader, _server) = downloader(tar.clone(), |_| Wrong::Nothing).await;
    let bed = Bed::new().await;
    for (folder, text) in [("", "everybody's"), ("room=a1", "of room a1"), ("room=a2", "of room a2")] {
        let folder = bed.dir.path().join("recovery/marco/first-boot").join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("user-data"), text).unwrap();
    }
    let job = image_job(&tar);
    let (installed, ()) = tokio::join!(bed.install(&job, &downloader), async {
        // Two receivers: the installation's own, and the one that waits.
        while bed.labels.receiver_count() < 2 {
            tokio::task::yield_now().await;
        }
        assert!(bed.has("root/old") && bed.read("boot/kernel8.img") != "new kernel");
        bed.labels.send_replace(Some(Labels::from([("room".to_owned(), "a2".to_owned())])));
    });
    installed.unwrap();
    assert_eq!(bed.read("boot/user-data"), "of room a2");
    assert!(!bed.has("boot/meta-data"), "there is no cloud-init that would read it");
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_compression_is_known_by_its_first_bytes() {
    let tar = image("boot", 10_000, "");
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&tar).unwrap();
    for bytes in [tar.clone(), zstd::encode_all(tar.as_slice(), 1).unwrap(), xz.finish().unwrap()] {
        let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
        let mut bed = Bed::new().await;
        bed.install(&image_job(&bytes), &downloader).await.unwrap();
        assert!(bed.read("root/etc/fstab").contains("-04 /boot vfat"));
        assert_eq!(bed.trial().await.mode(), Mode::Running);
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cuts_do_not_show_in_what_is_installed() {
    let tar = image("boot/firmware", 10 * CHUNK, "");
    let cuts = |round| if round < 8 { Wrong::CutAfter(CHUNK + 77) } else { Wrong::Nothing };
    let (downloader, _server) = downloader(tar.clone(), cuts).await;
    let bed = Bed::new().await;
    bed.install(&image_job(&tar), &downloader).await.unwrap();
    assert_eq!(bed.read("boot/kernel8.img"), "new kernel");
    assert_eq!(fs::metadata(bed.dir.path().join("root/usr/share/noise")).unwrap().len(), 10 * CHUNK as u64);
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_first_chunk_nothing_is_touched() {
    let tar = image("boot/firmware", 10, "");
    for fault in [Wrong::Missing, Wrong::Flip(100), Wrong::OtherDigest, Wrong::CutAfter(0)] {
        let (downloader, _server) = downloader(tar.clone(), move |_| fault).await;
        let mut bed = Bed::new().await;
        bed.install(&image_job(&tar), &downloader).await.unwrap_err();
        assert!(bed.has("root/old"));
        bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
        assert_eq!(bed.powered.boot().await.mode(), Mode::Running, "the old system is back");
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_boot_this_board_is_refused_and_the_installer_stays() {
    for (without, reason) in
        [("kernel8.img", "kernel"), ("4-b.dtb", "bcm2711-rpi-4-b.dtb"), ("cmdline.txt", "cmdline.txt")]
    {
        let tar = image("boot/firmware", 10, without);
        let (downloader, _server) = downloader(tar.clone(), |_| Wrong::Nothing).await;
        let mut bed = Bed::new().await;
        let error = bed.install(&image_job(&tar), &downloader).await.unwrap_err();
        assert_eq!((error.reason, error.retryable), ("NOT_A_SYSTEM", false));
        assert!(error.message.contains(reason), "{error}");
        assert_eq!(bed.trial().await.mode(), Mode::Installer);
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_tarball_is_refused() {
    for bytes in [vec![7; 5000], gzip(&[9; 5000]), {
        let mut cut = gzip(&image("boot", 50_000, ""));
        cut.truncate(cut.len() / 2);
        cut
    }] {
        let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
        let bed = Bed::new().await;
        let error = bed.install(&image_job(&bytes), &downloader).await.unwrap_err();
        assert_eq!(error.reason, "IMAGE_REFUSED", "{error}");
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_installation_that_was_interrupted_starts_over() {
    let tar = image("boot/firmware", 20 * CHUNK, "");
    // Silent after ten chunks: the job is dropped there, as a power cut drops it.
    let stuck = |round| if round == 0 { Wrong::CutAfter(10 * CHUNK) } else { Wrong::Silent };
    let (first, _server) = downloader(tar.clone(), stuck).await;
    let mut bed = Bed::new().await;
    let job = image_job(&tar);
    let noise = bed.dir.path().join("root/usr/share/noise");
    let begun = async {
        while !noise.exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::select! {
        installed = bed.install(&job, &first) => panic!("it ended: {installed:?}"),
        begun = timeout(SOON, begun) => begun.expect("it begins in time"),
    }
    fs::write(bed.dir.path().join("power-cut"), "").unwrap();
    bed.installer = bed.powered.boot().await;
    assert_eq!(
        bed.installer.booted(),
        Some(Booted { partition: 1, tryboot: false }),
        "the installer is the default now"
    );
    let (second, _server) = downloader(tar.clone(), |_| Wrong::Nothing).await;
    bed.install(&job, &second).await.unwrap();
    assert_eq!(bed.read("root/etc/ssh/ssh_host_ed25519_key"), "my own", "kept over the interruption");
    assert_eq!(bed.trial().await.mode(), Mode::Running);
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn boot_files_alone_leave_the_root_alone() {
    let bytes = zip("other kernel", "");
    let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
    let mut bed = Bed::new().await;
    // Larger ones were interrupted before, by this agent and by an earlier one.
    for rest in ["boot.zip", "download-00"] {
        fs::write(bed.dir.path().join("recovery/marco").join(rest), vec![0; 4 << 20]).unwrap();
    }
    bed.install(&job(Instruction::BootOnly { sha256: digest(&bytes) }), &downloader).await.unwrap();
    assert!(bed.has("root/old"));
    let names = fs::read_dir(bed.dir.path().join("recovery/marco")).unwrap().map(|entry| entry.unwrap().file_name());
    let names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name == "boot.zip" || name.starts_with("download-")), "{names:?}");
    assert_eq!(bed.read("boot/kernel8.img"), "other kernel");
    let system = bed.trial().await;
    assert_eq!(system.mode(), Mode::Running);
    let release: Release = system.release().unwrap().unwrap();
    assert_eq!((release.execution.as_str(), release.boot_sha256), (EXECUTION, digest(&bytes)));
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn boot_files_that_are_no_system_are_refused_before_anything_is_touched() {
    for without in ["kernel8.img", "cmdline.txt", "config.txt"] {
        let bytes = zip("other kernel", without);
        let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
        let mut bed = Bed::new().await;
        let error = bed.install(&job(Instruction::BootOnly { sha256: digest(&bytes) }), &downloader).await.unwrap_err();
        assert_eq!(error.reason, "BOOTCODE_REFUSED");
        bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
        assert_eq!(bed.powered.boot().await.mode(), Mode::Running);
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_in_an_image_leads_nothing_out_of_the_root() {
    let dir = TempDir::new().unwrap();
    let outside: PathBuf = dir.path().join("outside");
    fs::create_dir_all(outside.join("lib/marco-agent")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    header.set_mode(0o777);
    tar.append_link(&mut header, "var", &outside).unwrap();
    let whole = image("boot/firmware", 10, "");
    let mut bytes = tar.into_inner().unwrap();
    // Without the two blocks that end a tarball, so that the rest of the image follows the link.
    bytes.truncate(bytes.len() - 1024);
    bytes.extend_from_slice(&whole);
    let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
    let bed = Bed::new().await;
    // The image may be refused, or the link followed inside the root. Nothing outside changes.
    let _ = bed.install(&image_job(&bytes), &downloader).await;
    assert_eq!(fs::read_dir(outside.join("lib/marco-agent")).unwrap().count(), 0);
    bed.powered.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_disk_is_refused_by_a_card_of_folders_before_anything_is_touched() {
    let mut disk = vec![0; 2 << 20];
    // One partition of type Linux: 2048 sectors from sector 2048.
    disk[446 + 4] = 0x83;
    disk[446 + 9..446 + 14].copy_from_slice(&[8, 0, 0, 0, 8]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for bytes in [disk.clone(), gzip(&disk), zstd::encode_all(disk.as_slice(), 1).unwrap()] {
        let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
        let mut bed = Bed::new().await;
        for job in [image_job(&bytes), raw_job(&bytes)] {
            let error = bed.install(&job, &downloader).await.unwrap_err();
            assert!(!error.retryable && error.message.contains("push a tarball"), "{error}");
        }
        assert!(bed.has("root/old"));
        bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
        assert_eq!(bed.powered.boot().await.mode(), Mode::Running);
        bed.powered.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tarball_is_not_written_to_a_whole_card() {
    let bytes = image("boot/firmware", 10, "");
    let (downloader, _server) = downloader(bytes.clone(), |_| Wrong::Nothing).await;
    let mut bed = Bed::new().await;
    let error = bed.install(&raw_job(&bytes), &downloader).await.unwrap_err();
    assert!(error.reason == "IMAGE_REFUSED" && error.message.contains("no image of a whole disk"), "{error}");
    assert!(bed.has("root/old"));
    bed.installer.reboot(Reboot::Plain, None, "").await.unwrap();
    assert_eq!(bed.powered.boot().await.mode(), Mode::Running);
    bed.powered.kill().await;
}
