//! Whole machines under QEMU with a real kernel. The card is a file. At each start this harness plays the firmware from
//! the card's files, by the documented rules.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use node_agent::system::virtual_pi::firmware::{self, Boot, Outcome, Partitions};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub mod board;
pub mod card;
pub mod disk_image;
pub mod lab;
pub mod manifest;
pub mod rig;
pub mod system;

use crate::process::{Recipe, tool};
use board::{Board, Kernel};
use card::Card;

/// The agent's console message right before a restart, on a kernel that has no Raspberry Pi firmware to notify. It
/// names the kind of the next boot.
const TRYBOOT: &str = "marco-test-firmware: tryboot";
const REBOOT: &str = "marco-test-firmware: reboot";
/// The kernel's last message when it powers off.
const POWER_DOWN: &str = "reboot: Power down";
/// Its last message if QEMU's board cannot power off, in older and in newer kernels.
const NOT_OFF: [&str; 2] = ["reboot: System halted", "reboot: Power off not available: System halted instead"];
/// The kernel's last message if QEMU's board cannot restart.
const NOT_RESTARTED: &str = "Reboot failed -- System halted";
/// Maximum silence on the console after the agent's message, on a PC. After that the kernel hangs during shutdown, and
/// a real board's watchdog would reset it.
const GOING_DOWN: Duration = Duration::from_secs(30);
/// Interval between two looks at the console.
const LOOK: Duration = Duration::from_secs(1);
/// Starts in a row without anything to boot, after which the harness gives up.
const DEAD_STARTS: usize = 3;

/// One start of the machine.
#[derive(Debug, Clone)]
pub struct Start {
    /// The firmware's decision.
    pub outcome: Outcome,
    /// File with the console's output.
    pub console: PathBuf,
    /// End of this run; `None` while it runs.
    pub end: Option<End>,
    /// True if the kernel hung during shutdown, and the harness reset the machine in place of the watchdog.
    pub hung: bool,
}

/// Reason for the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A restart, a kernel crash or the watchdog: the next boot is the default one.
    Reset,
    /// A restart that asked for a trial boot.
    TrialBoot,
    /// The machine powered itself off.
    PowerOff,
    /// The power was cut.
    PowerCut,
}

/// A machine that is off, with its card.
#[derive(Debug, Clone)]
pub struct Machine {
    board: Board,
    card: Card,
    dir: PathBuf,
    tap: String,
    starts: Arc<watch::Sender<Vec<Start>>>,
}

/// Result of a play of the firmware.
#[derive(Debug)]
pub struct Firmware {
    /// The boot that it chose.
    pub outcome: Outcome,
    /// Folder with a copy of the recovery partition.
    pub recovery: PathBuf,
    /// Folder with a copy of the system's boot partition; empty if there is none.
    pub boot: PathBuf,
    /// Files that a power cut left unreadable.
    pub unreadable: Vec<String>,
}

/// A machine that is on. Dropping it cuts the power.
#[derive(Debug)]
pub struct Power {
    cut: CancellationToken,
    task: JoinHandle<Result<End>>,
}

impl Drop for Power {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Machine {
    /// A machine with this card, on this network interface. Consoles, and the firmware's copies of partitions, go to
    /// `dir`.
    pub fn new(board: Board, card: Card, tap: &str, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self { board, card, dir: dir.to_owned(), tap: tap.to_owned(), starts: Arc::default() })
    }

    /// The kind of machine.
    pub fn board(&self) -> Board {
        self.board
    }

    /// The card. Read it only while the machine is off.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// All starts since the machine was made; the last one may still run.
    pub fn starts(&self) -> Vec<Start> {
        self.starts.borrow().clone()
    }

    /// Notifies of each new start and each change of the last one.
    pub fn watch(&self) -> watch::Receiver<Vec<Start>> {
        self.starts.subscribe()
    }

    /// Plays the firmware after this kind of reset: the boot it would choose, and the files it read.
    pub async fn firmware(&self, tryboot: bool) -> Result<Firmware> {
        let (recovery, boot) = (self.dir.join("p1"), self.dir.join("p4"));
        let mut unreadable = Vec::new();
        unreadable.extend(self.card.copy_fat(1, &recovery).await?.unwrap_or_default());
        let copied = self.card.copy_fat(4, &boot).await?;
        let partitions =
            // The pure function of the firmware takes paths: a folder that does not exist is a partition without boot
            // files.
            Partitions { recovery: &recovery, boot: if copied.is_some() { &boot } else { Path::new("/nonexistent") } };
        let outcome = firmware::boot(&self.board.model(), partitions, tryboot);
        unreadable.extend(copied.unwrap_or_default().into_iter().map(|path| format!("p4's {path}")));
        Ok(Firmware { outcome, recovery, boot, unreadable })
    }

    /// Switches the power on. The machine runs, with all its restarts, until it is off.
    pub fn power_on(&self) -> Power {
        let cut = CancellationToken::new();
        let (machine, token) = (self.clone(), cut.clone());
        Power { cut, task: tokio::spawn(async move { machine.run(&token).await }) }
    }

    async fn run(&self, cut: &CancellationToken) -> Result<End> {
        let mut tryboot = false;
        let mut dead = 0;
        loop {
            let Firmware { outcome, recovery, boot, .. } = self.firmware(tryboot).await?;
            // Like the real firmware's flag, this one is valid for one boot.
            let flag = std::mem::take(&mut tryboot);
            let number = self.starts.borrow().len();
            let console = self.dir.join(format!("console-{number:02}"));
            std::fs::write(&console, "")?;
            let start = Start { outcome: outcome.clone(), console: console.clone(), end: None, hung: false };
            self.starts.send_modify(|starts| starts.push(start));
            let end = match outcome {
                Outcome::Booted(found) => {
                    dead = 0;
                    let partition = if found.partition == 1 { recovery } else { boot };
                    self.run_once(&found, flag, &partition, &console, cut).await?
                }
                Outcome::Dead(reason) => {
                    dead += 1;
                    // A board whose firmware finds nothing resets and tries again, without end.
                    ensure!(dead < DEAD_STARTS, "nothing boots, time and again: {reason}");
                    End::Reset
                }
            };
            self.starts.send_modify(|starts| {
                if let Some(start) = starts.last_mut() {
                    start.end = Some(end);
                }
            });
            match end {
                End::Reset => {}
                End::TrialBoot => tryboot = true,
                End::PowerOff | End::PowerCut => return Ok(end),
            }
        }
    }

    /// Runs QEMU once, from the kernel's start to its end.
    async fn run_once(
        &self,
        boot: &Boot,
        tryboot: bool,
        partition: &Path,
        console: &Path,
        cut: &CancellationToken,
    ) -> Result<End> {
        let initramfs = self.initramfs(boot, partition)?;
        // Real firmware passes partition and trial flag in the device tree. QEMU has no such firmware, so the agent
        // reads them from the command line.
        let (partition_number, trial, board) = (boot.partition, u8::from(tryboot), self.board.words());
        let cmdline = format!("{} marco.test_firmware={partition_number},{trial} {board}", boot.cmdline);
        let device_tree = boot.device_tree.as_ref().map(|name| partition.join(name));
        let kernel = Kernel {
            kernel: &partition.join(&boot.kernel),
            initramfs: initramfs.as_deref(),
            device_tree: device_tree.as_deref(),
            cmdline: &cmdline,
            held: boot.cmdline.split_whitespace().any(|word| word == system::HOLD),
        };
        let (program, arguments) = self.board.qemu(&kernel, self.card.path(), &self.tap, console);
        let mut qemu = Recipe::new(tool(program)?, arguments, self.dir.join("qemu.log")).start()?;
        tokio::select! {
            // Dropping `ended` loses nothing: the process is killed next.
            () = cut.cancelled() => {
                qemu.kill().await?;
                Ok(End::PowerCut)
            }
            () = hung(console, self.board) => {
                self.starts.send_modify(|starts| {
                    if let Some(start) = starts.last_mut() {
                        start.hung = true;
                    }
                });
                qemu.kill().await?;
                Ok(end(&String::from_utf8_lossy(&std::fs::read(console)?)))
            }
            () = unwatched(console, boot.watchdog) => {
                qemu.kill().await?;
                Ok(End::Reset)
            }
            () = halted(console) => {
                qemu.kill().await?;
                Ok(end(&String::from_utf8_lossy(&std::fs::read(console)?)))
            }
            status = qemu.ended() => {
                let status = status?;
                ensure!(status.success(), "QEMU ended with {status}\n{}", qemu.tail(20));
                Ok(end(&String::from_utf8_lossy(&std::fs::read(console)?)))
            }
        }
    }

    /// Concatenates the initial RAM file systems, as the firmware does.
    fn initramfs(&self, boot: &Boot, partition: &Path) -> Result<Option<PathBuf>> {
        if boot.initramfs.is_empty() {
            return Ok(None);
        }
        // QEMU takes one file. The kernel unpacks concatenated archives one after the other.
        let joined = self.dir.join("initramfs");
        let mut bytes = Vec::new();
        for name in &boot.initramfs {
            bytes.extend(std::fs::read(partition.join(name)).with_context(|| format!("reading {}", name.display()))?);
        }
        std::fs::write(&joined, bytes)?;
        Ok(Some(joined))
    }
}

/// Plays the watchdog that the firmware starts (`kernel_watchdog_timeout`): waits until its time is over, and returns if no
/// kernel has said a word. Pends forever for a kernel that runs: QEMU's machines have no Pi's watchdog that it could feed.
async fn unwatched(console: &Path, timeout: Option<Duration>) {
    if let Some(timeout) = timeout {
        tokio::time::sleep(timeout).await;
        if std::fs::read(console).is_ok_and(|said| said.is_empty()) {
            return;
        }
    }
    std::future::pending().await
}

/// Waits until the kernel has halted on a board that can neither power off nor restart, so that QEMU does not end.
async fn halted(console: &Path) {
    let halted = |said: Vec<u8>| {
        let said = String::from_utf8_lossy(&said);
        NOT_OFF.iter().chain([&NOT_RESTARTED]).any(|word| said.contains(word))
    };
    while !std::fs::read(console).is_ok_and(halted) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until the kernel hangs during shutdown on a board without a watchdog. Pends forever on a board that resets
/// itself.
async fn hung(console: &Path, board: Board) {
    if board.has_watchdog() {
        return std::future::pending().await;
    }
    let (mut known, mut since) = (0, Instant::now());
    loop {
        let said = std::fs::read(console).unwrap_or_default();
        // New output shows that the kernel is still alive, also during a slow shutdown.
        if said.len() != known {
            (known, since) = (said.len(), Instant::now());
        }
        if hangs(&String::from_utf8_lossy(&said), since.elapsed(), board.patience(GOING_DOWN)) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// True if a kernel that was told to restart has been silent for too long.
fn hangs(console: &str, silent: Duration, patience: Duration) -> bool {
    silent > patience && (console.contains(TRYBOOT) || console.contains(REBOOT))
}

/// The reason for the end of a run, from the last messages on its console.
fn end(console: &str) -> End {
    if NOT_OFF.iter().chain([&POWER_DOWN]).any(|word| console.contains(word)) {
        return End::PowerOff;
    }
    match (console.rfind(TRYBOOT), console.rfind(REBOOT)) {
        // The console may show both words. The last one counts.
        (Some(trial), plain) if plain.is_none_or(|plain| plain < trial) => End::TrialBoot,
        _ => End::Reset,
    }
}

impl Power {
    /// Returns an error if the machine, or its task, has ended: for loops that wait for the running machine.
    pub async fn check(&mut self) -> Result<()> {
        if self.task.is_finished() {
            let end = (&mut self.task).await.context("the machine's task")??;
            bail!("the machine went off by itself: {end:?}");
        }
        Ok(())
    }

    /// Waits until the machine has powered itself off, at most for `limit`.
    pub async fn off(mut self, limit: Duration) -> Result<()> {
        let ended = tokio::time::timeout(limit, &mut self.task).await;
        let end = ended.with_context(|| format!("the machine is not off after {limit:?}"))?.context("its task")??;
        ensure!(end == End::PowerOff, "the machine ended by {end:?}");
        Ok(())
    }

    /// Cuts the power: kills QEMU (`-9`) and waits for its end.
    pub async fn cut(mut self) -> Result<()> {
        self.cut.cancel();
        let end = (&mut self.task).await.context("the machine's task")??;
        ensure!(end == End::PowerCut, "before the power was cut the machine ended by {end:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{End, GOING_DOWN, end, hangs};

    #[test]
    fn only_a_machine_that_was_told_to_restart_and_is_silent_hangs() {
        let (short, long) = (GOING_DOWN / 2, GOING_DOWN * 2);
        for (said, silent, wanted) in [
            ("marco-test-firmware: tryboot\n", long, true),
            ("marco-test-firmware: reboot\n", long, true),
            ("marco-test-firmware: tryboot\n", short, false),
            ("[ 61.0] unpacking\n", long, false),
        ] {
            assert_eq!(hangs(said, silent, GOING_DOWN), wanted, "{said}");
        }
    }

    #[test]
    fn the_last_word_of_the_agent_says_which_boot_comes_next() {
        for (console, wanted) in [
            ("[ 3.1] x\nmarco-test-firmware: tryboot\n[ 3.2] reboot: Restarting system\n", End::TrialBoot),
            ("marco-test-firmware: tryboot\nmarco-test-firmware: reboot\nreboot: Restarting system\n", End::Reset),
            ("Kernel panic - not syncing\nRebooting in 1 seconds..\n", End::Reset),
            ("[ 9.9] reboot: Power down\n", End::PowerOff),
            ("[ 9.9] reboot: System halted\n", End::PowerOff),
            ("[ 9.9] reboot: Power off not available: System halted instead\n", End::PowerOff),
            ("marco-test-firmware: tryboot\n[ 9.9] Reboot failed -- System halted\n", End::TrialBoot),
        ] {
            assert_eq!(end(console), wanted, "{console}");
        }
    }
}
