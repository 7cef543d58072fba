//! Everything that an emulated boot needs, put together: the lab, images, a card with the installer on it, the machine.

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

/// How long building a set or writing a card may take.
const BUILD: Duration = seconds(300);
/// How long a start may take on an emulated PC that shares its processors with others; [`Rig`] gives other boards more.
pub const START: Duration = seconds(240);

/// Where the pieces come from.
#[derive(Debug, Clone)]
pub struct Options {
    /// The machine.
    pub board: Board,
    /// The root of Debian's packages.
    pub debian: PathBuf,
    /// The static agent.
    pub agent: PathBuf,
}

/// A machine with a card, a controller that knows its images, and the network between them.
#[derive(Debug)]
pub struct Rig {
    /// Network and controller.
    pub lab: Lab,
    /// The machine, off until it is switched on.
    pub machine: Machine,
    options: Options,
    dir: PathBuf,
}

impl Rig {
    /// Starts the lab in `dir`, builds an installer's set with `marcoctl bootcode build`, and writes a card with it and
    /// a join file with `marcoctl card write`. The rest of the card is empty.
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

    /// An installer's set as a zip, with these further options of `bootcode build`; the name goes into its command line,
    /// so that no two are the same.
    pub async fn build_bootcode(&self, name: &str, options: &[&str]) -> Result<PathBuf> {
        let zip = self.dir.join(format!("{name}.zip"));
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

    /// A card as an operator makes it, in place of the one that the machine had: the recovery partition, and nothing
    /// behind it. To the usual settings of the installer these are added.
    pub async fn write_card(&self, zip: &Path, more: &str) -> Result<()> {
        let (settings, card) = (self.dir.join("install.toml"), self.machine.card().path());
        let (size, usual) = self.board().card();
        std::fs::write(&settings, format!("{usual}{more}"))?;
        if card.exists() {
            std::fs::remove_file(card).context("removing the card")?;
        }
        let (zip, card) = (zip.display().to_string(), card.display().to_string());
        let settings = settings.display().to_string();
        // The address of a controller on this machine is none for others: the card's join file has none, and the node looks
        // for its controller by itself.
        let arguments = ["card", "write", &card, "--bootcode", &zip, "--size", size, "--install-config", &settings];
        self.lab.call(&arguments, BUILD).await?.success().context("marcoctl card write")?;
        Ok(())
    }

    /// Makes an image and pushes it; answers with its SHA-256. The tree that it was made from is [`tree`](Self::tree).
    pub async fn push_image(&self, kind: Kind, name: &str) -> Result<String> {
        let pieces = Pieces { board: self.options.board, debian: self.options.debian.clone() };
        let tarball = system::make(&pieces, kind, name, &self.dir.join("images")).await?;
        self.push(&tarball, "image").await
    }

    /// Makes an image of a whole disk and pushes it, as [`push_image`](Self::push_image) does.
    pub async fn push_disk_image(&self, name: &str) -> Result<String> {
        let pieces = Pieces { board: self.options.board, debian: self.options.debian.clone() };
        system::make(&pieces, Kind::Good, name, &self.dir.join("images")).await?;
        self.push(&disk_image::make(&self.tree(name)).await?, "image").await
    }

    /// Pushes a file; answers with its SHA-256.
    pub async fn push(&self, file: &Path, kind: &str) -> Result<String> {
        let artifact = self.lab.ask(&["artifacts", "push", &file.display().to_string(), "--kind", kind]).await?;
        Ok(text(&artifact, "sha256")?.to_owned())
    }

    /// The machine's kind.
    pub fn board(&self) -> Board {
        self.options.board
    }

    /// The tree that an image was made from.
    pub fn tree(&self, image: &str) -> PathBuf {
        self.dir.join("images").join(image)
    }

    /// A folder of the rig's own.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits while the machine runs, with the board's patience; when the machine ends by itself, or time runs out, its console is in the error.
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
                Err(error) => return Err(error.context(format!("{what}\n{}", self.tail()))),
            }
        }
    }

    /// Waits until the node is connected in this role; answers with the node.
    pub async fn connected(&self, power: &mut Power, node: &str, mode: &str) -> Result<Value> {
        self.until(power, START, &format!("{node} is connected, {mode}"), async || {
            let node = self.lab.ask(&["nodes", "get", node]).await?;
            let is = node.get("connected") == Some(&Value::Bool(true)) && text(&node, "mode")? == mode;
            Ok(is.then_some(node))
        })
        .await
    }

    /// Waits until an operation has ended, with the board's patience, and answers with its only execution.
    pub async fn ended(&self, power: &mut Power, operation: &str, limit: Duration) -> Result<Value> {
        let (begun, limit) = (Instant::now(), self.board().patience(limit));
        let mut watch = self.lab.watch(operation)?;
        loop {
            // A message that was read by half is only lost when the wait is over for good.
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
        let Some(message) = self.lab.watch(operation)?.next().await? else { bail!("{operation} was not told") };
        let executions = message.get("executions").and_then(Value::as_array).cloned().unwrap_or_default();
        ensure!(executions.len() == 1, "{operation} is for {} nodes", executions.len());
        executions.into_iter().next().context("no execution")
    }

    /// Powers the machine off by an operation and waits until it is off.
    pub async fn power_off(&self, power: Power, node: &str) -> Result<()> {
        self.lab.ask(&["operations", "power-off", node, "--notice", "0s"]).await?;
        self.off(power).await
    }

    /// Waits until the machine has powered itself off.
    pub async fn off(&self, power: Power) -> Result<()> {
        power.off(self.board().patience(START)).await.map_err(|error| error.context(self.tail()))
    }

    /// The console's last words.
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
