//! A file system to install on: tmpfs, or ext4 on a loop device throttled to a card's speed. Counts the bytes written.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::process::Command;
use tokio::task::JoinHandle;

/// Throttle file of cgroup v1. The root group's limit also holds for write-back.
const THROTTLE: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";
/// Mount point of cgroup v2. A limit belongs to a group, so this process and its children enter one.
const UNIFIED: &str = "/sys/fs/cgroup";
/// Large enough for the tarballs that the old steps keep beside the tree.
const SIZE: &str = "4G";

/// Thresholds of dirty memory, for background write-back and for blocked writers: the kernel's defaults of 10 and 20 %
/// (kernel documentation, admin-guide/sysctl/vm, `dirty_background_ratio` and `dirty_ratio`) of the memory that a Pi
/// with 1 GiB has to spare. With a large machine's memory, files that are removed soon would never reach the card.
const PI_MEMORY: [(&str, &str, u64); 2] =
    [("dirty_background_bytes", "dirty_background_ratio", 90 << 20), ("dirty_bytes", "dirty_ratio", 180 << 20)];

/// The kind of file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// tmpfs, in memory.
    Tmpfs,
    /// ext4 on a device limited to this many bytes written a second.
    Card(u64),
}

/// A mounted, empty file system.
pub(crate) struct Bed {
    folder: PathBuf,
    disk: Option<Disk>,
}

/// Write-back limits of a Pi; restores the machine's own on drop.
struct WriteBack(Vec<(PathBuf, String)>);

impl WriteBack {
    fn of_a_pi() -> Result<Self> {
        let mut before = Self(Vec::new());
        for (bytes, ratio, limit) in PI_MEMORY {
            let [bytes, ratio] = [bytes, ratio].map(|name| Path::new("/proc/sys/vm").join(name));
            // Only one of the two is in effect; the other one reads 0.
            let counts = if fs::read_to_string(&bytes)?.trim() == "0" { ratio } else { bytes.clone() };
            before.0.push((counts.clone(), fs::read_to_string(&counts)?));
            fs::write(&bytes, limit.to_string()).context("cannot hold write-back as on a Pi")?;
        }
        Ok(before)
    }
}

impl Drop for WriteBack {
    fn drop(&mut self) {
        for (path, value) in &self.0 {
            // `drop` cannot report an error, and there is no remedy.
            let _ = fs::write(path, value);
        }
    }
}

struct Disk {
    _write_back: WriteBack,
    image: PathBuf,
    device: String,
    /// The device's major and minor number, as `MAJOR:MINOR`.
    number: String,
}

impl Bed {
    pub(crate) async fn new(dir: &Path, kind: Kind) -> Result<Self> {
        let folder = dir.join("bed");
        fs::create_dir_all(&folder)?;
        let shown = folder.display().to_string();
        let mut bed = Self { folder, disk: None };
        let Kind::Card(rate) = kind else {
            run("mount", &["-t", "tmpfs", "-o", &format!("size={SIZE}"), "tmpfs", &shown]).await?;
            return Ok(bed);
        };
        let image = dir.join("card.img");
        let path = image.display().to_string();
        run("truncate", &["-s", SIZE, &path]).await?;
        // Without lazy initialisation, which would write to the device during the measurement.
        run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", &path]).await?;
        let device = run("losetup", &["--find", "--show", &path]).await?;
        let number = fs::read_to_string(format!("/sys/class/block/{}/dev", device.trim_start_matches("/dev/")))?;
        let disk = bed.disk.insert(Disk {
            _write_back: WriteBack::of_a_pi()?,
            image,
            device,
            number: number.trim().to_owned(),
        });
        run("mount", &[&disk.device, &shown]).await?;
        // The limit begins after the file system's own metadata is on the device.
        run("sync", &["-f", &shown]).await?;
        limit(&disk.number, Some(rate))?;
        Ok(bed)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes written to the device so far; `None` on tmpfs.
    pub(crate) fn written(&self) -> Result<Option<u64>> {
        let Some(disk) = &self.disk else { return Ok(None) };
        let text = fs::read_to_string(format!("/sys/dev/block/{}/stat", disk.number))?;
        // The kernel's documentation, block/stat: the seventh number is sectors written.
        let sectors: u64 = text.split_whitespace().nth(6).context("no statistics of the device")?.parse()?;
        Ok(Some(sectors * 512))
    }

    fn used(folder: &Path) -> Result<u64> {
        let found = rustix::fs::statvfs(folder)?;
        Ok((found.f_blocks - found.f_bfree) * found.f_frsize)
    }

    /// Records the peak of used space, until [`Peak::end`].
    pub(crate) fn watch(&self) -> Result<Peak> {
        let (folder, before) = (self.folder.clone(), Self::used(&self.folder)?);
        let (highest, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, ended) = (Arc::clone(&highest), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            while !ended.load(Ordering::Relaxed) {
                let used = Self::used(&folder).unwrap_or(before);
                seen.fetch_max(used.saturating_sub(before), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Ok(Peak { highest, stop, task })
    }

    pub(crate) async fn remove(self) -> Result<()> {
        // Unmounting writes everything back, which would take minutes at the card's speed.
        if let Some(disk) = &self.disk {
            limit(&disk.number, None)?;
        }
        run("umount", &[&self.folder.display().to_string()]).await?;
        if let Some(disk) = &self.disk {
            run("losetup", &["--detach", &disk.device]).await?;
            fs::remove_file(&disk.image)?;
        }
        Ok(())
    }
}

/// A running record of the peak of used space.
pub(crate) struct Peak {
    highest: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Peak {
    pub(crate) async fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?;
        Ok(self.highest.load(Ordering::Relaxed))
    }
}

/// Limits a device to `rate` bytes written a second; `None` removes the limit.
fn limit(number: &str, rate: Option<u64>) -> Result<()> {
    if Path::new(THROTTLE).exists() {
        return fs::write(THROTTLE, format!("{number} {}", rate.unwrap_or(0))).context("cannot hold the device back");
    }
    let group = Path::new(UNIFIED).join("marco-bench");
    ensure!(Path::new(UNIFIED).join("cgroup.controllers").exists(), "this kernel has no control group for block I/O");
    fs::write(Path::new(UNIFIED).join("cgroup.subtree_control"), "+io +memory").context("cgroup v2")?;
    fs::create_dir_all(&group)?;
    let rate = rate.map_or_else(|| "max".to_owned(), |rate| rate.to_string());
    fs::write(group.join("io.max"), format!("{number} wbps={rate}")).context("cannot hold the device back")?;
    fs::write(group.join("cgroup.procs"), std::process::id().to_string()).context("cannot enter the control group")
}

/// Runs a program and returns its standard output, trimmed. Returns an error unless it succeeds.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().await.with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
