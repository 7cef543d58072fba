//! `make demo`: a controller and three virtual Pis on this machine, updated with a real root file system.
#![allow(clippy::print_stdout, reason = "what it prints is the point of it")]

#[path = "demo/rootfs.rs"]
mod rootfs;

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use integration_tests::fleet::execution_name;
use integration_tests::process::binary;
use integration_tests::tree::compare_with_source;
use integration_tests::{Database, Fleet};
use marco_proto::v1::execution::State;
use marco_proto::v1::{ApproveNodeRequest, DeleteNodeRequest, node};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

const PIS: usize = 3;
/// Tells the demo's nodes from others: a database given by the user may hold more.
const PREFIX: &str = "demo-";

#[tokio::main]
async fn main() -> ExitCode {
    let done = async {
        // Without a handler the signal would end this process before it removes its files.
        let mut terminated = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        // Dropping the demo's future ends its processes and removes its files.
        tokio::select! {
            done = demo() => done,
            _ = terminated.recv() => bail!("terminated"),
            _ = interrupted.recv() => bail!("interrupted"),
        }
    };
    match done.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn database() -> Result<Database> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Ok(Database::Sqlite),
        (Some("--database-url"), Some(url)) => Ok(Database::Url(url)),
        _ => bail!("usage: marco-demo [--database-url URL]"),
    }
}

async fn demo() -> Result<()> {
    let database = database()?;
    let shared = database != Database::Sqlite;
    let on = if shared { "the given database" } else { "SQLite" };
    step(&format!("starting a controller on {on} and {PIS} virtual Pis"));
    let mut fleet = Fleet::builder().database(database).pis(PIS).prefix(PREFIX).start().await?;
    let ids: Vec<String> = fleet.ids().await?.into_iter().filter(|id| id.starts_with(PREFIX)).collect();
    for node in fleet.list_nodes().await?.into_iter().filter(|node| node.state() == node::State::AwaitingApproval) {
        // A demo that was interrupted on this database left this node behind, and its key is lost.
        if ids.iter().any(|id| node.name.ends_with(id)) {
            fleet.nodes().approve_node(ApproveNodeRequest { name: node.name, ..ApproveNodeRequest::default() }).await?;
        }
    }
    marcoctl(&fleet, &["nodes", "list"]).await?;

    step("making a root file system of this machine's own files");
    let (source, image) = {
        let dir = fleet.dir().to_owned();
        tokio::task::spawn_blocking(move || rootfs::make(&dir)).await??
    };
    let size = std::fs::metadata(&image)?.len();
    println!("{}: {} MB", name_of(&image), size / 1_000_000);
    ensure!(size >= 20_000_000, "this machine has too few files for an image of 20 MB");

    step("pushing it");
    marcoctl(&fleet, &["artifacts", "push", &image.display().to_string(), "--kind", "image"]).await?;

    step("updating all");
    let begin = Instant::now();
    let update =
        ["operations", "update", "--all", "--image", "demo-os", "--notice", "0s", "--wait", "--timeout", "10m"];
    marcoctl(&fleet, &update).await?;
    println!("in {:.1} s", begin.elapsed().as_secs_f64());

    step("comparing what the Pis run with the source, file by file");
    let operations = fleet.operations().list_operations(marco_proto::v1::ListOperationsRequest::default()).await?;
    let operations = operations.into_inner().operations;
    let operation = operations.first().context("the update is not listed")?;
    let mut wrong = 0;
    for id in &ids {
        let state = fleet.execution(&operation.name, id).await?.state();
        let verdict = compare(&fleet, &execution_name(operation, id), id, &source);
        let state_name = state.as_str_name().trim_start_matches("STATE_");
        match verdict {
            Ok(same) if state == State::Succeeded => println!("{id}: {same} entries are the same: {state_name}"),
            Ok(same) => {
                wrong += 1;
                println!("{id}: {same} entries are the same, but the update is {state_name}");
            }
            Err(error) => {
                wrong += 1;
                println!("{id}: {error:#}: DIFFERENT");
            }
        }
    }
    for id in ids.iter().filter(|_| shared) {
        // The next demo on this database then starts without them.
        let request = DeleteNodeRequest { name: format!("nodes/{id}"), force: true };
        fleet.nodes().delete_node(request).await?;
    }
    ensure!(wrong == 0, "{wrong} of {PIS} do not run the new image");
    fleet.went_well();
    Ok(())
}

/// Compares the node's root with the source, and checks the execution in its `/etc/marco-release`. Returns the number
/// of equal entries.
fn compare(fleet: &Fleet, execution: &str, id: &str, source: &Path) -> Result<usize> {
    let pi = fleet.pi(id);
    let release = pi.read("root/etc/marco-release")?;
    ensure!(release.contains(execution), "/etc/marco-release names another execution");
    compare_with_source(source, pi.dir())
}

fn step(what: &str) {
    println!("\n== {what}");
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Runs marcoctl on this terminal, so that it draws its progress.
async fn marcoctl(fleet: &Fleet, arguments: &[&str]) -> Result<()> {
    println!("$ marcoctl {}", arguments.iter().map(|word| shown(word)).collect::<Vec<_>>().join(" "));
    let program: PathBuf = binary("marcoctl")?;
    let status = Command::new(program)
        .arg("--controller")
        .arg(format!("localhost:{}", fleet.addresses().api.port()))
        .arg("--certs")
        .arg(fleet.certs())
        .args(arguments)
        // marcoctl must not wait for an answer that nobody gives.
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .context("starting marcoctl")?;
    ensure!(status.success(), "marcoctl ended with {status}");
    Ok(())
}

/// A path without its folder: the demo's temporary folder is of no interest to a viewer.
fn shown(word: &str) -> String {
    if word.starts_with('/') { name_of(Path::new(word)) } else { word.to_owned() }
}
