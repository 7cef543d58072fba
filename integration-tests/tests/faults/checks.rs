//! The promises, checked when a run has come to its end.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use marco_proto::v1::execution::State;

use crate::pi::PiState;
use crate::run::{Run, word};
use crate::template::KEPT;

/// Steps of one name that a run may have in any case, and for each minute of its virtual time: pauses between tries
/// grow to a minute.
const OF_ONE_NAME: u32 = 150;
const A_MINUTE: u32 = 4;
/// Steps while nothing is to be done: the node looks at its health, and remembers the time.
const AT_REST: usize = 8;
/// Messages to users in a run.
const WALL: usize = 40;
/// Boots in a run: five tries, three trial boots, two power cuts and the driver's own, twice.
const BOOTS: usize = 24;

/// Checks what node and controller are and say.
pub(crate) async fn end(run: &mut Run) -> Result<()> {
    let dir = run.world.pi_dir();
    let pi = PiState::read(&dir)?;
    // It boots the old system, the installer with its identity, or the new one.
    ensure!(pi.is_up, "the machine does not run: {pi:?}");
    if pi.installs || pi.installer_boots {
        for name in ["node.key", "node.crt", "ca.crt"] {
            let path = dir.join("recovery/marco").join(name);
            ensure!(fs::metadata(&path).is_ok_and(|file| file.len() > 0), "the installer has no {name}: {pi:?}");
        }
    }
    ensure!(!pi.installs || pi.installer_boots, "the installer stays although the old system is whole: {pi:?}");
    ensure!(run.node().await?.connected, "the node is not reachable: {pi:?}");
    ensure!(fs::read_to_string(dir.join(KEPT)).is_ok_and(|text| text == "the user's\n"), "the user's data is gone");

    // Their last words agree.
    let executions = run.executions().await?;
    for execution in &executions {
        let state = execution.state();
        let job = pi.job(&execution.name);
        let said = || format!("the controller says {} and the node {job:?}: {pi:?}", word(state));
        ensure!(is_over(state), "no end: {}", said());
        // A root whose trials failed still has the release, but the installer boots.
        let runs = !pi.installs && !pi.installer_boots && pi.release == execution.name;
        match state {
            State::Succeeded => {
                ensure!(!pi.installs && !pi.installer_boots, "a success that the installer follows: {}", said());
                // A later update may have replaced it.
                let last = executions.last().is_some_and(|last| last.name == execution.name);
                ensure!(!last || pi.release == execution.name, "a success of another system: {}", said());
            }
            State::RolledBack | State::Cancelled | State::Expired => ensure!(!runs, "the new system runs: {}", said()),
            // A failure is also what a controller says of an execution that an operator gave up too late.
            State::Failed => ensure!(!runs || run.was_called_off(), "the new system runs: {}", said()),
            _ => bail!("no end: {}", said()),
        }
        // A journal that cannot be written lags behind the node's words. It is compared as soon as it can be.
        let Some(job) = job.filter(|_| !run.recorder.keeps_no_journal()) else { continue };
        let same = match state {
            State::Succeeded => job.state == "succeeded",
            State::Failed => job.state == "failed",
            State::RolledBack => job.state == "rolled-back",
            State::Cancelled => job.state == "cancelled",
            _ => true,
        };
        ensure!(same || run.was_called_off(), "{}", said());
    }
    if pi.release.is_empty() && !pi.installs && !pi.installer_boots {
        ensure!(pi.old_root, "the old system was touched: {pi:?}");
    }
    bounds(run, &pi)
}

fn is_over(state: State) -> bool {
    integration_tests::fleet::is_final(state)
}

/// Checks that a system that was to wait for a controller's word did not go down without it.
pub(crate) fn waited(before: usize, pi: &PiState, faults: usize) -> Result<()> {
    // Each fault of the plan may have cut the power.
    ensure!(pi.boots <= before + faults, "what nobody confirmed was gone on with: {before} boots before, {pi:?}");
    Ok(())
}

/// Nothing repeats without bound.
pub(crate) fn bounds(run: &Run, pi: &PiState) -> Result<()> {
    let minutes = u32::try_from(run.world.time.passed().as_secs() / 60).unwrap_or(u32::MAX);
    let allowed = OF_ONE_NAME.saturating_add(A_MINUTE.saturating_mul(minutes));
    for (name, count) in run.recorder.counts() {
        ensure!(count <= allowed, "{name} was done {count} times in {minutes} minutes");
    }
    ensure!(pi.boots <= BOOTS, "the machine booted {} times", pi.boots);
    let wall = fs::read_to_string(run.world.pi_dir().join("wall.log")).unwrap_or_default().lines().count();
    ensure!(wall <= WALL, "users were told {wall} times");
    Ok(())
}

/// Checks that nothing went on after the end.
pub(crate) fn rest(run: &Run, before: usize, seen: &BTreeMap<String, u32>) -> Result<()> {
    let steps = run.recorder.count() - before;
    if steps > AT_REST {
        let after = run.recorder.counts();
        let more: Vec<String> = after
            .iter()
            .filter_map(|(name, count)| {
                let more = count - seen.get(name).copied().unwrap_or_default();
                (more > 0).then(|| format!("{name}: {more}"))
            })
            .collect();
        bail!("{steps} steps after the end: {more:?}");
    }
    let pi = PiState::read(&run.world.pi_dir()).context("at rest")?;
    ensure!(pi.is_settled(), "the end was none: {pi:?}");
    Ok(())
}
