//! Everything that an emulated boot needs: the lab, images, a card with the installer, and the machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::board::Board;
use super::card::Card;
use super::disk_image;
use super::lab::{Lab, TAP, text};
use super::system::{self, Kind, Pieces};
use super::{Machine, Power};
use crate::process::{binary, run};
use crate::wait::seconds;

/// Timeout of building a set or writing a card.
const BUILD: Duration = seconds(300);
/// Timeout of a start on an emulated PC that shares its processors with others; [`Rig`] scales it for other boards.
pub const START: Duration = seconds(240);

/// Inputs of a rig.
#[derive(Debug, Clone)]
pub struct Options {
    /// The emulated machine.
    pub board: Board,
    /// Folder with unpacked Debian packages, made by `scripts/debian-root.sh`.
    pub debian: PathBuf,
    /// A statically linked agent for the board.
    pub agent: PathBuf,
}

/// A machine with a card, a controller that knows its images, and the network between them.
#[derive(Debug)]
pub struct Rig {
    /// Network and controller.
    pub lab: Lab,
    /// The machine; it is off until a test switches it on.
    pub machine: Machine,
    options: Options,
    dir: PathBuf,
}

impl Rig {
    /// Starts the lab in `dir`, builds an installer's set with `marcoctl bootcode build`, and writes a card with that
    /// set and a join file with `marcoctl card write`. The rest of the card is empty.
    pub async fn start(options: Options, dir: &Path) -> Result<Self> {
        let lab = Lab::start(dir).await?;
        let card = dir.join("card.img");
        let machine = Machine::new(options.board, Card::new(&card), TAP, &dir.join("machine"))?;
        let rig = Self { lab, machine, options, dir: dir.to_owned() };
        let zip = rig.build_bootcode("installer-1", &[]).await?;
        rig.write_card(&zip, "").await?;
        rig.push(&zip, "bootcode").await?;
        Ok(rig)
    }

    /// Builds an installer's set as a zip, with these additional options of `bootcode build`. The name goes into its
    /// command line, so that two sets always differ.
    pub async fn build_bootcode(&self, name: &str, options: &[&str]) -> Result<PathBuf> {
        let zip = self.dir.join(format!("{name}.zip"));
        // `panic=10`: a kernel that panics restarts by itself, as on a Pi.
        let cmdline = format!("console={} rdinit=/init panic=10 marco.set={name}", self.options.board.console());
        let (debian, agent) = (self.options.debian.display().to_string(), self.options.agent.display().to_string());
        let file = zip.display().to_string();
        let arguments = [
            "bootcode",
            "build",
            "--root",
            &debian,
            "--agent",
            &agent,
            "--arch",
            self.options.board.architecture(),
            "--board",
            self.options.board.family(),
            "--cmdline",
            &cmdline,
            "-o",
            &file,
        ];
        let arguments = [&arguments, options].concat();
        run(&binary("marcoctl")?, &arguments, BUILD).await?.success().context("marcoctl bootcode build")?;
        Ok(zip)
    }

    /// Writes a new card as an operator does, in place of the machine's present one: a recovery partition, and nothing
    /// behind it. `more` is appended to the board's settings of the installer.
    pub async fn write_card(&self, zip: &Path, more: &str) -> Result<()> {
        let (settings, card) = (self.dir.join("install.toml"), self.machine.card().path());
        let (size, usual) = self.board().card();
        std::fs::write(&settings, format!("{usual}{more}"))?;
        if card.exists() {
            std::fs::remove_file(card).context("removing the card")?;
        }
        let (zip, card) = (zip.display().to_string(), card.display().to_string());
        let settings = settings.display().to_string();
        // The join file names no controller: an address of this machine is of no use to the emulated one. The node
        // discovers its controller.
        let arguments = ["card", "write", &card, "--bootcode", &zip, "--size", size, "--install-config", &settings];
        self.lab.call(&arguments, BUILD).await?.success().context("marcoctl card write")?;
        Ok(())
    }

    /// Makes an image, pushes it and returns its SHA-256. Its source tree is [`tree`](Self::tree).
    pub async fn push_image(&self, kind: Kind, name: &str) -> Result<String> {
        let pieces = Pieces { board: self.options.board, debian: self.options.debian.clone() };
        let tarball = system::make(&pieces, kind, name, &self.dir.join("images")).await?;
        self.push(&tarball, "image").await
    }

    /// Makes a whole-disk image, pushes it and returns its SHA-256.
    pub async fn push_disk_image(&self, name: &str) -> Result<String> {
        let pieces = Pieces { board: self.options.board, debian: self.options.debian.clone() };
        system::make(&pieces, Kind::Good, name, &self.dir.join("images")).await?;
        self.push(&disk_image::make(&self.tree(name)).await?, "image").await
    }

    /// Pushes a file and returns its SHA-256.
    pub async fn push(&self, file: &Path, kind: &str) -> Result<String> {
        let artifact = self.lab.ask(&["artifacts", "push", &file.display().to_string(), "--kind", kind]).await?;
        Ok(text(&artifact, "sha256")?.to_owned())
    }

    /// The kind of machine.
    pub fn board(&self) -> Board {
        self.options.board
    }

    /// The source tree of an image.
    pub fn tree(&self, image: &str) -> PathBuf {
        self.dir.join("images").join(image)
    }

    /// A path in the rig's own folder.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Polls a condition while the machine runs, with a timeout scaled to the board. Returns an error with the
    /// console's end if the machine goes off or the time runs out.
    pub async fn until<T, F>(&self, power: &mut Power, limit: Duration, what: &str, mut condition: F) -> Result<T>
    where
        F: AsyncFnMut() -> Result<Option<T>>,
    {
        let (begun, limit) = (Instant::now(), self.board().patience(limit));
        loop {
            let found = match power.check().await {
                Ok(()) => condition().await,
                Err(error) => Err(error),
            };
            match found {
                Ok(Some(found)) => return Ok(found),
                Ok(None) if begun.elapsed() < limit => tokio::time::sleep(Duration::from_millis(500)).await,
                Ok(None) => bail!("waited {limit:?} in vain: {what}\n{}", self.tail()),
                // The console's end is the only trace of a failure in the machine.
                Err(error) => return Err(error.context(format!("{what}\n{}", self.tail()))),
            }
        }
    }

    /// Waits until the node is connected in this mode, and returns the node.
    pub async fn connected(&self, power: &mut Power, node: &str, mode: &str) -> Result<Value> {
        self.until(power, START, &format!("{node} is connected, {mode}"), async || {
            let node = self.lab.ask(&["nodes", "get", node]).await?;
            let is = node.get("connected") == Some(&Value::Bool(true)) && text(&node, "mode")? == mode;
            Ok(is.then_some(node))
        })
        .await
    }

    /// Waits until an operation has ended, with a timeout scaled to the board, and returns its only execution.
    pub async fn ended(&self, power: &mut Power, operation: &str, limit: Duration) -> Result<Value> {
        let (begun, limit) = (Instant::now(), self.board().patience(limit));
        let mut watch = self.lab.watch(operation)?;
        loop {
            // `select!` drops a half-read message only if `alive` ends, and then the wait is over.
            let alive = async {
                loop {
                    tokio::time::sleep(seconds(1)).await;
                    power.check().await?;
                    ensure!(begun.elapsed() < limit, "waited {limit:?} in vain");
                }
            };
            let message: Result<Option<Value>> = tokio::select! {
                message = watch.next() => message,
                end = alive => end,
            };
            match message {
                Ok(Some(_)) => {}
                Ok(None) => return self.execution(operation).await,
                Err(error) => return Err(error.context(format!("{operation} ends\n{}", self.tail()))),
            }
        }
    }

    /// The only execution of an operation.
    pub async fn execution(&self, operation: &str) -> Result<Value> {
        // The first message of a watch is the whole present state.
        let Some(message) = self.lab.watch(operation)?.next().await? else { bail!("{operation} was not told") };
        let executions = message.get("executions").and_then(Value::as_array).cloned().unwrap_or_default();
        ensure!(executions.len() == 1, "{operation} is for {} nodes", executions.len());
        executions.into_iter().next().context("no execution")
    }

    /// Powers the machine off by an operation, and waits until it is off.
    pub async fn power_off(&self, power: Power, node: &str) -> Result<()> {
        self.lab.ask(&["operations", "power-off", node, "--notice", "0s"]).await?;
        self.off(power).await
    }

    /// Waits until the machine has powered itself off.
    pub async fn off(&self, power: Power) -> Result<()> {
        power.off(self.board().patience(START)).await.map_err(|error| error.context(self.tail()))
    }

    /// The last lines of the console and of the controller's log.
    pub fn tail(&self) -> String {
        let starts = self.machine.starts();
        let Some(last) = starts.last() else { return "the machine was never on".to_owned() };
        let console = std::fs::read(&last.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        let lines: Vec<&str> = console.lines().collect();
        let lines = lines.get(lines.len().saturating_sub(40)..).unwrap_or_default();
        let controller = self.lab.controller_says();
        format!(
            "start {} ({:?}), its console:\n    {}\nthe controller:\n{controller}",
            starts.len(),
            last.outcome,
            lines.join("\n    ")
        )
    }
}
