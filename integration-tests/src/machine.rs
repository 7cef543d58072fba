//! Whole machines under QEMU with a real kernel: the card is a file, and this harness plays the firmware, by its
//! documented rules, from what is on the card, at each start.

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

/// What the agent writes to the console right before it restarts a machine whose kernel has no Raspberry Pi firmware to
/// tell: which boot comes next.
const TRYBOOT: &str = "marco-test-firmware: tryboot";
const REBOOT: &str = "marco-test-firmware: reboot";
/// The kernel's last word when it powers off.
const POWER_DOWN: &str = "reboot: Power down";
/// The same where QEMU's board has nothing that could do it, in older kernels and newer ones.
const NOT_OFF: [&str; 2] = ["reboot: System halted", "reboot: Power off not available: System halted instead"];
/// The kernel's last word where QEMU's board has nothing that could restart it.
const NOT_RESTARTED: &str = "Reboot failed -- System halted";
/// For so long the console may be silent after the agent's word, on a PC: then the kernel hangs on its way down, and a
/// board's watchdog would reset it.
const GOING_DOWN: Duration = Duration::from_secs(30);
/// How often the console is looked at for that.
const LOOK: Duration = Duration::from_secs(1);
/// After so many starts in a row that found nothing to boot somebody would look.
const DEAD_STARTS: usize = 3;

/// One start of the machine.
#[derive(Debug, Clone)]
pub struct Start {
    /// What the firmware did.
    pub outcome: Outcome,
    /// What the machine's console said.
    pub console: PathBuf,
    /// How it ended; none while it runs.
    pub end: Option<End>,
    /// Its kernel hung on its way down, where a board's watchdog would have reset it, and the harness did that.
    pub hung: bool,
}

/// How a run of the machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By a restart, a crash of the kernel, or the watchdog: the next boot is the default one.
    Reset,
    /// By a restart that asked for a trial boot.
    TrialBoot,
    /// It is off.
    PowerOff,
    /// The power was cut.
    PowerCut,
}

/// A machine with its card, off.
#[derive(Debug, Clone)]
pub struct Machine {
    board: Board,
    card: Card,
    dir: PathBuf,
    tap: String,
    starts: Arc<watch::Sender<Vec<Start>>>,
}

/// What the firmware did, or would do.
#[derive(Debug)]
pub struct Firmware {
    /// What it boots.
    pub outcome: Outcome,
    /// A copy of the recovery partition.
    pub recovery: PathBuf,
    /// A copy of the system's boot partition; empty when there is none.
    pub boot: PathBuf,
    /// Files that a power cut has left so that they cannot be read.
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
    /// A machine with this card in it, on this network interface. Its consoles and what the firmware reads go to `dir`.
    pub fn new(board: Board, card: Card, tap: &str, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self { board, card, dir: dir.to_owned(), tap: tap.to_owned(), starts: Arc::default() })
    }

    /// What it is.
    pub fn board(&self) -> Board {
        self.board
    }

    /// Its card. To be read only while the machine is off.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Every start since it was made, the last one is perhaps still running.
    pub fn starts(&self) -> Vec<Start> {
        self.starts.borrow().clone()
    }

    /// To wait for a start.
    pub fn watch(&self) -> watch::Receiver<Vec<Start>> {
        self.starts.subscribe()
    }

    /// What the firmware would boot after this kind of reset, and what it read for that.
    pub async fn firmware(&self, tryboot: bool) -> Result<Firmware> {
        let (recovery, boot) = (self.dir.join("p1"), self.dir.join("p4"));
        let mut unreadable = Vec::new();
        unreadable.extend(self.card.copy_fat(1, &recovery).await?.unwrap_or_default());
        let copied = self.card.copy_fat(4, &boot).await?;
        let partitions =
            Partitions { recovery: &recovery, boot: if copied.is_some() { &boot } else { Path::new("/nonexistent") } };
        let outcome = firmware::boot(&self.board.model(), partitions, tryboot);
        unreadable.extend(copied.unwrap_or_default().into_iter().map(|path| format!("p4's {path}")));
        Ok(Firmware { outcome, recovery, boot, unreadable })
    }

    /// Switches the power on. The machine runs, through all its restarts, until it is off.
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
            // The flag is for one boot.
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

    /// From the kernel's start to the end of QEMU.
    async fn run_once(
        &self,
        boot: &Boot,
        tryboot: bool,
        partition: &Path,
        console: &Path,
        cut: &CancellationToken,
    ) -> Result<End> {
        let initramfs = self.initramfs(boot, partition)?;
        let (partition_number, trial, board) = (boot.partition, u8::from(tryboot), self.board.words());
        let cmdline = format!("{} marco.test_firmware={partition_number},{trial} {board}", boot.cmdline);
        let device_tree = boot.device_tree.as_ref().map(|name| partition.join(name));
        let kernel = Kernel {
            kernel: &partition.join(&boot.kernel),
            initramfs: initramfs.as_deref(),
            device_tree: device_tree.as_deref(),
            cmdline: &cmdline,
        };
        let (program, arguments) = self.board.qemu(&kernel, self.card.path(), &self.tap, console);
        let mut qemu = Recipe::new(tool(program)?, arguments, self.dir.join("qemu.log")).start()?;
        tokio::select! {
            // Dropping the wait loses nothing: the process is killed next.
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

    /// The firmware loads several initial RAM file systems one behind the other.
    fn initramfs(&self, boot: &Boot, partition: &Path) -> Result<Option<PathBuf>> {
        if boot.initramfs.is_empty() {
            return Ok(None);
        }
        let joined = self.dir.join("initramfs");
        let mut bytes = Vec::new();
        for name in &boot.initramfs {
            bytes.extend(std::fs::read(partition.join(name)).with_context(|| format!("reading {}", name.display()))?);
        }
        std::fs::write(&joined, bytes)?;
        Ok(Some(joined))
    }
}

/// Waits until the kernel has nothing left to do and cannot say so by ending QEMU.
async fn halted(console: &Path) {
    let halted = |said: Vec<u8>| {
        let said = String::from_utf8_lossy(&said);
        NOT_OFF.iter().chain([&NOT_RESTARTED]).any(|word| said.contains(word))
    };
    while !std::fs::read(console).is_ok_and(halted) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a kernel has hung on its way down: on a board without a watchdog it would for ever. Others reset themselves.
async fn hung(console: &Path, board: Board) {
    if board.has_watchdog() {
        return std::future::pending().await;
    }
    let (mut known, mut since) = (0, Instant::now());
    loop {
        let said = std::fs::read(console).unwrap_or_default();
        if said.len() != known {
            (known, since) = (said.len(), Instant::now());
        }
        if hangs(&String::from_utf8_lossy(&said), since.elapsed(), board.patience(GOING_DOWN)) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether a kernel that was told to restart has been silent for too long.
fn hangs(console: &str, silent: Duration, patience: Duration) -> bool {
    silent > patience && (console.contains(TRYBOOT) || console.contains(REBOOT))
}

/// How a run ended, by the last words of its console.
fn end(console: &str) -> End {
    if NOT_OFF.iter().chain([&POWER_DOWN]).any(|word| console.contains(word)) {
        return End::PowerOff;
    }
    match (console.rfind(TRYBOOT), console.rfind(REBOOT)) {
        (Some(trial), plain) if plain.is_none_or(|plain| plain < trial) => End::TrialBoot,
        _ => End::Reset,
    }
}

impl Power {
    /// Whether the machine, or the play, has ended, and why: an error while somebody waits for the machine.
    pub async fn check(&mut self) -> Result<()> {
        if self.task.is_finished() {
            let end = (&mut self.task).await.context("the machine's task")??;
            bail!("the machine went off by itself: {end:?}");
        }
        Ok(())
    }

    /// Waits until the machine has powered itself off.
    pub async fn off(mut self, limit: Duration) -> Result<()> {
        let ended = tokio::time::timeout(limit, &mut self.task).await;
        let end = ended.with_context(|| format!("the machine is not off after {limit:?}"))?.context("its task")??;
        ensure!(end == End::PowerOff, "the machine ended by {end:?}");
        Ok(())
    }

    /// Cuts the power: QEMU is killed (`-9`). Answers when it is gone.
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
