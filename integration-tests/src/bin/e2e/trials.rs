//! New systems that hang on trial, each in its own way: the installer comes back within the limit, without hands. And one
//! that restarts by itself, which is no failure.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use integration_tests::machine::board::Board;
use integration_tests::machine::lab::text;
use integration_tests::machine::rig::{Options, Rig, START};
use integration_tests::machine::system::Kind;
use integration_tests::machine::{End, Start};
use integration_tests::wait::seconds;
use node_agent::system::virtual_pi::firmware::Outcome;

use crate::failures::NODE;

/// The faults: name of the image, and a text on the console of its trial that shows the fault; empty: it says nothing.
const FAULTS: [(Kind, &str, &str); 7] = [
    (Kind::Panics, "panics", "Kernel panic"),
    (Kind::Holds, "holds", ""),
    (Kind::HangsEarly, "hangs-early", "hangs early"),
    (Kind::HangsInInit, "hangs-in-init", "init hangs"),
    (Kind::Emergency, "emergency", "You are in emergency mode"),
    (Kind::NoAgent, "no-agent", "back to the installer"),
    (Kind::NoNetwork, "no-network", "back to the installer"),
];
/// Seconds of a trial unless `LIMIT` says otherwise. Long enough to boot on a busy machine.
const LIMIT: u64 = 60;
/// Time that a restart may take in addition: the kernel waits ten seconds after a panic, and the softdog a minute.
const RESTART: Duration = seconds(90);

/// Promise of docs/reliability.md for a trial that hangs, until the installer is back.
const MOST: Duration = seconds(15 * 60);

pub(crate) async fn run(options: Options, dir: &Path) -> Result<()> {
    let begun = Instant::now();
    let limit = std::env::var("LIMIT").ok().filter(|seconds| !seconds.is_empty());
    let limit = Duration::from_secs(limit.map_or(Ok(LIMIT), |seconds| seconds.parse()).context("LIMIT")?);
    let only = std::env::var("ONLY").unwrap_or_default();
    let chosen = |name: &str| only.is_empty() || only.split_whitespace().any(|word| word == name);
    let step = |what: &str| println!("\n== {:4} s  {what}", begun.elapsed().as_secs());

    // The harness plays the firmware's watchdog by a softdog, which their emulations lack.
    let has_watchdog = matches!(options.board, Board::Amd64 | Board::Arm64);
    ensure!(has_watchdog || !chosen("hangs-early"), "this board cannot play hangs-early: name the others in ONLY");
    step("a controller, and an installer");
    let rig = Rig::start(options, dir).await?;
    let mut told = Vec::new();
    for (kind, name, says) in FAULTS.into_iter().filter(|(_, name, _)| chosen(name)) {
        step(&format!("a trial that fails: {name}, with a limit of {} s", limit.as_secs()));
        let (took, console) = fails(&rig, kind, name, limit).await?;
        ensure!(console.contains(says), "the console does not say {says:?}:\n{console}");
        let last = console.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing at all");
        println!("the installer was back after {} s; last the console said: {last}", took.as_secs());
        told.push(format!("{name} {} s", took.as_secs()));
    }
    if chosen("restarts") {
        step("a system that restarts once by itself");
        restarts(&rig).await?;
    }
    println!("\nback in the installer: {}", told.join(", "));
    Ok(())
}

/// Installs this image on an empty card. Returns the time from the start of its trial to that of the installer, and the
/// trial's console.
async fn fails(rig: &Rig, kind: Kind, name: &str, limit: Duration) -> Result<(Duration, String)> {
    let known = rig.machine.starts().len();
    ready(rig, kind, name, limit).await?;
    let mut power = rig.machine.power_on();
    let trial = rig
        .until(&mut power, START * 2, "the trial begins", async || {
            Ok(rig.machine.starts().into_iter().skip(known).find(is_trial))
        })
        .await?;
    let begun = Instant::now();
    let number = rig.machine.starts().iter().filter(|start| is_trial(start)).count();
    rig.until(&mut power, limit + RESTART, "the installer comes back", async || {
        let starts = rig.machine.starts();
        let at = starts.iter().position(|start| start.console == trial.console);
        let next = at.and_then(|at| starts.get(at + 1)).map(is_trial);
        Ok((next == Some(false)).then_some(()))
    })
    .await?;
    let took = begun.elapsed();
    rig.connected(&mut power, NODE, "NODE_MODE_INSTALLER").await?;
    let starts = rig.machine.starts();
    let ended = starts.iter().find(|start| start.console == trial.console).and_then(|start| start.end);
    ensure!(ended == Some(End::Reset), "the trial ended by {ended:?}");
    ensure!(took <= MOST, "the installer was back after {} s only", took.as_secs());
    ensure!(starts.iter().filter(|start| is_trial(start)).count() <= number + 1, "it was tried again at once");
    power.cut().await?;
    Ok((took, String::from_utf8_lossy(&std::fs::read(&trial.console)?).into_owned()))
}

/// Installs a system that restarts once. The installer must not run in between, and the system is accepted.
async fn restarts(rig: &Rig) -> Result<()> {
    let known = rig.machine.starts().len();
    ready(rig, Kind::Restarts, "restarts", seconds(840)).await?;
    let mut power = rig.machine.power_on();
    rig.until(&mut power, START, "the node registers", async || Ok(is_known(rig).await?.then_some(()))).await?;
    // The installation, and two trials.
    rig.until(&mut power, START * 2, "the second trial begins", async || {
        let trials = rig.machine.starts().into_iter().skip(known).filter(is_trial).count();
        Ok((trials == 2).then_some(()))
    })
    .await?;
    let node = rig.connected(&mut power, NODE, "NODE_MODE_RUNNING").await?;
    println!("{} runs {}", text(&node, "name")?, text(&node, "system.os")?);
    let starts: Vec<Start> = rig.machine.starts().into_iter().skip(known).collect();
    let trials: Vec<bool> = starts.iter().map(is_trial).collect();
    ensure!(trials == [false, true, true], "installer, trial and trial again, not {trials:?}");
    power.cut().await
}

/// Makes the image the default one, and a card with nothing but the installer.
async fn ready(rig: &Rig, kind: Kind, name: &str, limit: Duration) -> Result<()> {
    rig.push_image(kind, name).await?;
    rig.lab.ask(&["artifacts", "default", name]).await?;
    // The node of the last card, with its unfinished update. There is none yet for the first one.
    if is_known(rig).await? {
        rig.lab.call(&["nodes", "delete", NODE, "--force"], START).await?.success().context("marcoctl nodes delete")?;
    }
    rig.write_card(&rig.folder("installer-1.zip"), &format!("[trial]\nlimit = \"{}s\"\n", limit.as_secs())).await
}

async fn is_known(rig: &Rig) -> Result<bool> {
    let nodes = rig.lab.ask(&["nodes", "list"]).await?;
    Ok(text(&nodes, "nodes.0.name").is_ok())
}

fn is_trial(start: &Start) -> bool {
    matches!(&start.outcome, Outcome::Booted(boot) if boot.partition == 4 && boot.tryboot)
}
