//! An update under faults. A first run records every step of it: the agent's durable writes, its effects on the machine and
//! its words to the controller, as the code announces them (`node_agent::step`). Then each fault happens at each step, alone
//! and in random pairs, and each run must keep the promises in `checks.rs`.
//!
//! Settings: `FAULTS` pairs (200), from `FAULT_SEED` on; only with `FAULT_SEED` that one pair; `FAULT_PLAN` a plan's text
//! plays that one; `FAULT_ONLY=A|B` plans whose text contains all of these words; `FAULT_ANY=A|B` plans whose text begins with one of
//! these; `FAULT_LOG` a filter for the log of controller and agent; `FAULT_SHOW=1` prints each run.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "for readers of the tests' output")]

mod checks;
mod hook;
mod middle;
mod pi;
mod plan;
mod run;
mod template;
mod time;
mod wire;
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use hook::Point;
use plan::Plan;
use template::Template;

/// Pairs, unless the settings say otherwise.
const PAIRS: u64 = 200;
/// Worlds at one time for each processor: a world also waits for its threads to fall asleep.
const WORLDS: usize = 2;
/// File with the steps in the template.
const POINTS: &str = "points.json";
/// Faults that `make test` plays at each step. The others take minutes each: `make faults`.
const IN_EACH_RUN: &str = "Kill|CutLost|CutTorn|FailsOnce";
/// Beginnings of the lines that a worker prints.
const FAILED: &str = "FAILED ";
const DONE: &str = "DONE ";

/// A plan with a name by which it is played again.
struct Named {
    name: String,
    plan: Plan,
}

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// Records the steps of an update without faults.
fn record(template: &Template) -> Result<()> {
    let baseline = run::play(template, Vec::new()).context("without a fault")?;
    // Sorted: tasks of the agent may do their steps in another order the next time.
    let points: BTreeSet<(Point, bool)> = baseline.points.into_iter().collect();
    let points: Vec<(String, u32, bool)> =
        points.into_iter().map(|(point, writes)| (point.name, point.number, writes)).collect();
    eprintln!("{} steps in {:?}", points.len(), baseline.passed);
    Ok(fs::write(template.dir().join(POINTS), serde_json::to_vec(&points)?)?)
}

/// The plans that the settings ask for.
fn plans(template: &Template) -> Result<Vec<Named>> {
    if let Some(text) = setting::<String>("FAULT_PLAN") {
        let plan = plan::read(&text).with_context(|| format!("FAULT_PLAN: no such plan: {text}"))?;
        return Ok(vec![Named { name: text, plan }]);
    }
    let points: Vec<(String, u32, bool)> = serde_json::from_slice(&fs::read(template.dir().join(POINTS))?)?;
    let points: Vec<(Point, bool)> =
        points.into_iter().map(|(name, number, writes)| (Point { name, number }, writes)).collect();
    let (seed, count) = (setting::<u64>("FAULT_SEED"), setting::<u64>("FAULTS"));
    let mut plans = Vec::new();
    if seed.is_none() {
        plans.extend(plan::singles(&points).into_iter().map(|plan| Named { name: plan::described(&plan), plan }));
    }
    let pairs = count.unwrap_or(PAIRS);
    let seeds = match (seed, count) {
        (Some(seed), None) => seed..seed + 1,
        _ => seed.unwrap_or_default()..seed.unwrap_or_default() + pairs,
    };
    plans.extend(seeds.map(|seed| {
        let plan = plan::pair(&points, seed);
        Named { name: format!("FAULT_SEED={seed}: {}", plan::described(&plan)), plan }
    }));
    if let Some(only) = setting::<String>("FAULT_ONLY") {
        plans.retain(|named| only.split('|').all(|part| named.name.contains(part)));
    }
    if let Some(any) = setting::<String>("FAULT_ANY") {
        plans.retain(|named| any.split('|').any(|part| named.name.starts_with(part)));
    }
    Ok(plans)
}

/// Plays a share of the plans. A process of its own for each share: time moves when all threads of a process sleep.
#[test]
#[ignore = "started by the other tests"]
fn worker() -> Result<()> {
    if let Some(filter) = setting::<String>("FAULT_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let dir: PathBuf = setting("FAULT_DIR").context("the template's folder")?;
    let (share, of) = (setting::<usize>("FAULT_SHARE"), setting::<usize>("FAULT_SHARES").unwrap_or(1));
    let Some(share) = share else {
        return record(&Template::make(&dir).context("the template")?);
    };
    let template = Template::made(&dir)?;
    for named in plans(&template)?.into_iter().skip(share).step_by(of) {
        let (began, faults) = (Instant::now(), named.plan.len());
        let told = run::play(&template, named.plan);
        if setting::<u8>("FAULT_SHOW").is_some() {
            let passed = told.as_ref().map(|outcome| outcome.passed).ok();
            eprintln!("{:?} {passed:?} {}", began.elapsed(), named.name);
        }
        match told {
            Ok(outcome) => println!("\n{DONE}{}", usize::from(outcome.happened < faults)),
            Err(error) => {
                let again = named.name.rsplit(": ").next().unwrap_or_default();
                let error = format!("{error:#}").replace('\n', " ");
                println!("\n{FAILED}{}: {error}\n{FAILED}again: make faults FAULT_PLAN='{again}'", named.name);
            }
        }
    }
    Ok(())
}

/// Starts this program again as a worker, and returns what it printed.
async fn work(dir: &Path, share: Option<(usize, usize)>, settings: &[(&'static str, String)]) -> Result<Vec<String>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.envs(settings.iter().cloned());
    command.args(["worker", "--exact", "--ignored", "--nocapture"]).env("FAULT_DIR", dir).kill_on_drop(true);
    if let Some((share, of)) = share {
        command.env("FAULT_SHARE", share.to_string()).env("FAULT_SHARES", of.to_string());
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
    let mut told = Vec::new();
    while let Some(line) = lines.next_line().await? {
        if line.starts_with(FAILED) {
            eprintln!("{line}");
        }
        told.push(line);
    }
    let status = child.wait().await?;
    ensure!(status.success(), "a worker ended with {status}:\n{}", told.join("\n"));
    Ok(told)
}

#[tokio::test]
async fn update_keeps_its_promises_under_kills_cuts_and_errors() -> Result<()> {
    play_all(&[("FAULT_ANY", IN_EACH_RUN.to_owned()), ("FAULTS", "0".to_owned())]).await
}

#[tokio::test]
#[ignore = "takes hours: `make faults`"]
async fn update_keeps_its_promises_under_faults() -> Result<()> {
    play_all(&[]).await
}

/// Plays the plans that the settings ask for, and these settings.
async fn play_all(settings: &[(&'static str, String)]) -> Result<()> {
    let (begun, dir) = (Instant::now(), world::folder()?);
    work(dir.path(), None, &[]).await?;
    let shares = setting("FAULT_WORLDS")
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, NonZero::get) * WORLDS);
    let mut workers = JoinSet::new();
    for share in 0..shares {
        let (dir, settings) = (dir.path().to_owned(), settings.to_vec());
        workers.spawn(async move { work(&dir, Some((share, shares)), &settings).await });
    }
    let (mut done, mut missed, mut failed) = (0, 0, Vec::new());
    while let Some(told) = workers.join_next().await {
        for line in told?? {
            if let Some(without) = line.strip_prefix(DONE) {
                done += 1;
                missed += usize::from(without == "1");
            }
            failed.extend(line.strip_prefix(FAILED).map(str::to_owned));
        }
    }
    let (again, failed): (Vec<String>, Vec<String>) = failed.into_iter().partition(|line| line.starts_with("again: "));
    let runs = done + failed.len();
    eprintln!("{runs} runs, {missed} whose faults did not all come, {} failed, {:?}", failed.len(), begun.elapsed());
    ensure!(failed.is_empty(), "{} of {runs} runs:\n{}\n{}", failed.len(), failed.join("\n"), again.join("\n"));
    ensure!(runs > 0, "no plan is like that");
    Ok(())
}
