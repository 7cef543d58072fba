//! Cuts the power of a machine during updates, again and again. Each time the same card must come back as the old
//! system, as the installer, which then finishes by itself, or as the new system.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use integration_tests::machine::lab::{Watch, text};
use integration_tests::machine::manifest::Manifest;
use integration_tests::machine::rig::{Options, Rig, START};
use integration_tests::machine::system::Kind;
use integration_tests::machine::{Firmware, Power, Start};
use integration_tests::wait::seconds;
use moment::{Moment, Phases, Random, UPDATE};
use node_agent::system::virtual_pi::firmware::{Boot, Outcome, Partitions, boot};

mod moment;

/// Random cuts unless `CUTS` says otherwise. The start of each phase is cut in addition.
const RANDOM: usize = 30;
/// Attempts at a moment that each update may miss. After them the cut comes `EARLY` in the next update.
const TRIES: usize = 4;
const EARLY: std::time::Duration = seconds(4);
const IMAGES: [&str; 2] = ["first", "second"];
/// One more than a card holds, so that each update has one to write.
const SETS: [&str; 3] = ["installer-1", "installer-2", "installer-3"];

/// All boot sets and systems that a card may hold.
struct Known {
    sets: Vec<Manifest>,
    systems: Vec<Manifest>,
}

pub(crate) async fn cut(options: Options, dir: &Path) -> Result<()> {
    let seed = match std::env::var("SEED") {
        Ok(text) => text.parse().context("SEED is no number")?,
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs(),
    };
    let asked = std::env::var("CUTS").ok().filter(|text| !text.is_empty());
    let asked: Option<usize> = asked.map(|text| text.parse()).transpose().context("CUTS is no number")?;
    println!("seed {seed} (SEED={seed} draws the same moments again)");
    let mut random = Random(seed);

    let mut play = Play::set_up(options, dir).await?;
    let mut power = play.first_installation().await?;

    let begun = Instant::now();
    let mut moments = play.undisturbed(&mut power).await?;
    let length = begun.elapsed();
    let names: Vec<String> = moments.iter().map(ToString::to_string).collect();
    println!("an update without a cut took {} s, in {} phases: {}", length.as_secs(), names.len(), names.join(", "));

    for _ in 0..asked.unwrap_or(RANDOM) {
        moments.push(Moment::After(length.mul_f64(random.fraction())));
    }
    if let Some(count) = asked {
        random.shuffle(&mut moments);
        moments.truncate(count);
    }
    println!("\ncut  {:58} {:12} {:32} ended", "power cut at", "came back as", "whole on the card");
    let mut outcomes = Vec::new();
    for (number, moment) in moments.iter().enumerate() {
        // The same card throughout, so that damage of one cut shows in the next.
        let (after, outcome) =
            play.cut_once(power, moment).await.with_context(|| format!("cut {}: {moment:?}", number + 1))?;
        println!("{:>3}  {outcome}", number + 1);
        power = after;
        outcomes.push(outcome);
    }
    play.rig.power_off(power, &play.node).await?;
    let found = play.check_boot_files().await?;
    ensure!(found.system.as_deref() == Some(play.runs.name), "in the end the card holds {found}");
    play.rig.machine.card().check_ext4(2).await?;
    play.rig.machine.card().check_ext4(3).await?;
    println!(
        "\n{} cuts, seed {seed}: each time the machine came back whole, and ended what it had begun",
        outcomes.len()
    );
    Ok(())
}

/// An image that was pushed.
struct Image {
    name: &'static str,
    sha256: String,
}

/// The machine and the test's view of its state.
struct Play {
    rig: Rig,
    known: Known,
    node: String,
    /// The image that the machine runs.
    runs: Image,
    /// The image for the next update.
    other: Image,
    /// The set that the firmware takes for the installer.
    default_set: &'static str,
    /// The other set on the card; it may be incomplete.
    idle_set: &'static str,
}

impl Play {
    async fn set_up(options: Options, dir: &Path) -> Result<Self> {
        let rig = Rig::start(options, dir).await?;
        let [first_set, more @ ..] = SETS;
        for name in more {
            let zip = rig.build_bootcode(name, &[]).await?;
            rig.push(&zip, "bootcode").await?;
        }
        let [runs, other] = IMAGES;
        let runs = Image { name: runs, sha256: rig.push_image(Kind::Good, runs).await? };
        let other = Image { name: other, sha256: rig.push_image(Kind::Good, other).await? };
        // The blank card gets this image without an operator's request.
        rig.lab.ask(&["artifacts", "default", runs.name]).await?;
        let sets = SETS.iter().map(|name| Manifest::of_zip(name, &rig.folder(&format!("{name}.zip"))));
        let system = |name| {
            let folder = rig.tree(name).join("boot/firmware");
            Manifest::of_folder(name, &folder).map(Manifest::without_own)
        };
        let known =
            Known { sets: sets.collect::<Result<_>>()?, systems: vec![system(runs.name)?, system(other.name)?] };
        Ok(Self { rig, known, node: String::new(), runs, other, default_set: first_set, idle_set: first_set })
    }

    async fn first_installation(&mut self) -> Result<Power> {
        let mut power = self.rig.machine.power_on();
        let operation = self
            .rig
            .until(&mut power, START, "the controller makes an operation for the new node", async || {
                let operations = self.rig.lab.ask(&["operations", "list"]).await?;
                Ok(text(&operations, "operations.0.name").ok().map(str::to_owned))
            })
            .await?;
        let execution = self.rig.ended(&mut power, &operation, UPDATE).await?;
        ensure!(text(&execution, "state")? == "STATE_SUCCEEDED", "the first installation: {execution}");
        self.node = text(&execution, "node")?.trim_start_matches("nodes/").to_owned();
        Ok(power)
    }

    /// Starts an update to the other image, with a set that the card does not hold.
    async fn begin(&mut self) -> Result<(String, Watch)> {
        // A set that the card holds already would not be written, and the cut could not hit the writing.
        let held = [self.default_set, self.idle_set];
        let set = SETS.into_iter().find(|set| !held.contains(set)).context("the card holds every set")?;
        self.idle_set = set;
        let image = self.other.name;
        let arguments = ["operations", "update", &self.node, "--image", image, "--bootcode", set, "--notice", "0s"];
        let operation = text(&self.rig.lab.ask(&arguments).await?, "name")?.to_owned();
        let watch = self.rig.lab.watch(&operation)?;
        Ok((operation, watch))
    }

    /// Records that the last update has succeeded.
    fn updated(&mut self) {
        std::mem::swap(&mut self.runs, &mut self.other);
        std::mem::swap(&mut self.default_set, &mut self.idle_set);
    }

    /// Runs an update to its end without a cut, and returns the moments at which its phases begin.
    async fn undisturbed(&mut self, power: &mut Power) -> Result<Vec<Moment>> {
        let starts = self.rig.machine.starts().len();
        let (operation, watch) = self.begin().await?;
        let moments = Phases::boundaries(watch, &self.rig.machine, starts).await?;
        let execution = self.rig.ended(power, &operation, UPDATE).await?;
        ensure!(text(&execution, "state")? == "STATE_SUCCEEDED", "without a cut it ended so: {execution}");
        self.updated();
        Ok(moments)
    }

    /// Cuts the power once. Returns the machine, running again, and the line of the table.
    async fn cut_once(&mut self, mut power: Power, moment: &Moment) -> Result<(Power, String)> {
        let (mut moment, mut tries) = (moment.clone(), 0);
        let (operation, begun_with, at) = loop {
            // Each attempt is a new update, with its own starts.
            let begun_with = self.rig.machine.starts().len();
            let (operation, watch) = self.begin().await?;
            if let Some(at) = moment.reach(watch, &self.rig.machine, begun_with).await? {
                break (operation, begun_with, at);
            }
            let execution = self.rig.ended(&mut power, &operation, UPDATE).await?;
            ensure!(text(&execution, "state")? == "STATE_SUCCEEDED", "without a cut it ended so: {execution}");
            self.updated();
            tries += 1;
            moment = if tries < TRIES { moment.sooner() } else { Moment::After(EARLY) };
            ensure!(tries <= TRIES, "{tries} updates ended before it came");
        };
        power.cut().await?;
        let starts = self.rig.machine.starts();
        let running = starts.get(begun_with..).and_then(<[Start]>::last).map_or("old system", describe);
        let found = self.check_boot_files().await?;

        let mut power = self.rig.machine.power_on();
        let machine = &self.rig.machine;
        let again = self.rig.until(&mut power, START, "it starts again", async || {
            Ok(machine.starts().get(starts.len()).map(|start| start.outcome.clone()))
        });
        let again = again.await?;
        let partition = if found.system.is_some() { 4 } else { 1 };
        ensure!(
            matches!(&again, Outcome::Booted(boot) if boot.partition == partition && !boot.tryboot),
            "after the cut it did not boot from partition {partition}: {again:?}"
        );
        let execution = self.rig.ended(&mut power, &operation, UPDATE).await?;
        let state = text(&execution, "state")?.trim_start_matches("STATE_").to_owned();
        let came_back = match &found.system {
            None => "installer",
            Some(name) if name == self.runs.name => "old system",
            Some(_) => "new system",
        };
        match state.as_str() {
            "SUCCEEDED" => self.updated(),
            // A rollback is right only if nothing was erased yet.
            "ROLLED_BACK" if came_back == "old system" => {}
            _ => bail!("it came back as {came_back} and ended {state}: {execution}\n{}", self.rig.tail()),
        }
        let node = self.rig.connected(&mut power, &self.node, "NODE_MODE_RUNNING").await?;
        let (runs, wanted) = (text(&node, "system.imageSha256")?, &self.runs.sha256);
        ensure!(runs == wanted, "it ended {state}, and runs {runs}, not {wanted}");
        let (at, files) = (format!("{at} ({running})"), found.to_string());
        Ok((power, format!("{at:58} {came_back:12} {files:32} {state}")))
    }

    /// Checks the card from outside, with the power off: the firmware's next boot is one complete set, bit for bit.
    async fn check_boot_files(&self) -> Result<Found> {
        let Firmware { outcome, recovery, boot: system, unreadable } = self.rig.machine.firmware(false).await?;
        let Outcome::Booted(found) = outcome else { bail!("nothing boots: {outcome:?}") };
        // The installer's set must be complete at all times, also if the system boots by default. Without
        // `autoboot.txt` the firmware takes the installer.
        let nowhere = Path::new("/nonexistent");
        std::fs::remove_file(recovery.join("autoboot.txt")).context("p1 has no autoboot.txt")?;
        let partitions = Partitions { recovery: &recovery, boot: nowhere };
        let installer = match boot(&self.rig.board().model(), partitions, false) {
            Outcome::Booted(installer) => installer,
            Outcome::Dead(reason) => bail!("the installer does not boot: {reason}"),
        };
        // Files of two sets in one boot are what the order of writes has to prevent.
        ensure!(installer.mixed.is_empty() && found.mixed.is_empty(), "sets are mixed: {installer:?}, {found:?}");
        let set = Manifest::of_folder("p1's set", &recovery.join(&installer.prefix))?;
        let set = set.which(&self.known.sets)?.to_owned();
        if found.partition == 1 {
            return Ok(Found { set, system: None, unreadable });
        }
        let boot_files = Manifest::of_folder("p4", &system)?.without_own();
        Ok(Found { set, system: Some(boot_files.which(&self.known.systems)?.to_owned()), unreadable })
    }
}

/// Complete boot sets on a card.
struct Found {
    /// Name of the installer's set.
    set: String,
    /// Name of the system's boot files; `None` if the installer boots by default.
    system: Option<String>,
    /// Other files, torn by a power cut.
    unreadable: Vec<String>,
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let torn =
            if self.unreadable.is_empty() { String::new() } else { format!("; torn {}", self.unreadable.join(", ")) };
        match &self.system {
            None => write!(f, "p1 {}{torn}", self.set),
            Some(system) => write!(f, "p1 {}, p4 {system}{torn}", self.set),
        }
    }
}

/// The system that runs in this start of an update.
fn describe(start: &Start) -> &'static str {
    match &start.outcome {
        Outcome::Booted(Boot { partition: 1, .. }) => "installer",
        Outcome::Booted(Boot { tryboot: true, .. }) => "new system",
        Outcome::Booted(_) => "old system",
        Outcome::Dead(_) => "dead",
    }
}
