//! The installer's failures: each policy of `install.toml` after a failed installation, and a network without any other
//! host.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use integration_tests::machine::lab::text;
use integration_tests::machine::rig::{Options, Rig, START};
use integration_tests::machine::system::Kind;
use integration_tests::machine::{End, Power};
use integration_tests::wait::seconds;
use serde_json::Value;

/// Default id of an emulated board, from its serial number.
pub(crate) const NODE: &str = "pi-e2e00001";

pub(crate) async fn fail(options: Options, dir: &Path) -> Result<()> {
    let begun = Instant::now();
    let step = |what: &str| println!("\n== {:4} s  {what}", begun.elapsed().as_secs());

    step("a controller, an image of another board, and a network on which nobody is");
    let rig = Rig::start(options, dir).await?;
    rig.push_image(Kind::NoSystem, "no-system").await?;
    rig.lab.ask(&["artifacts", "default", "no-system"]).await?;
    // The cable is out before the machine starts, so that no packet ever passes.
    rig.lab.plug(false).await?;
    let mut power = rig.machine.power_on();
    says(&rig, &mut power, "node cannot be enrolled yet").await?;
    println!("the installer says why it waits");
    rig.lab.plug(true).await?;
    step("the network is there; the image is refused, and by default the node waits for its controller");
    is_refused(&rig, &mut power).await?;
    rig.connected(&mut power, NODE, "NODE_MODE_INSTALLER").await?;
    ensure!(rig.machine.starts().len() == 1, "it restarted");
    println!("it waits, connected");

    step("policy reboot");
    let mut power = again(&rig, power, "installer-1", "reboot").await?;
    is_refused(&rig, &mut power).await?;
    let starts = rig.machine.starts().len();
    rig.until(&mut power, START, "the machine restarts", async || {
        let history = rig.machine.starts();
        Ok((history.len() > starts && history.get(starts - 1).is_some_and(|start| start.end == Some(End::Reset)))
            .then_some(()))
    })
    .await?;
    rig.connected(&mut power, NODE, "NODE_MODE_INSTALLER").await?;
    println!("it restarted, and is connected again");

    step("policy power-off");
    let mut power = again(&rig, power, "installer-1", "power-off").await?;
    is_refused(&rig, &mut power).await?;
    rig.off(power).await?;
    println!("it is off");

    step("policy shell, with an initramfs that has one");
    // This policy needs a shell in the initramfs, and the usual set has none.
    rig.build_bootcode("installer-sh", &["--program", "/bin/sh"]).await?;
    renew(&rig, "installer-sh", "shell").await?;
    let mut power = rig.machine.power_on();
    is_refused(&rig, &mut power).await?;
    says(&rig, &mut power, "built-in shell").await?;
    power.cut().await?;
    println!("a shell is on the console");

    println!("\n5 ways to fail in {} s: each as install.toml says", begun.elapsed().as_secs());
    Ok(())
}

/// Cuts the power, and switches on with a new card whose installer has this policy.
async fn again(rig: &Rig, power: Power, set: &str, policy: &str) -> Result<Power> {
    power.cut().await?;
    renew(rig, set, policy).await?;
    Ok(rig.machine.power_on())
}

/// Writes a new card, and deletes the node, so that the controller takes it for a new one.
async fn renew(rig: &Rig, set: &str, policy: &str) -> Result<()> {
    rig.lab.call(&["nodes", "delete", NODE], START).await?.success().context("marcoctl nodes delete")?;
    let settings = format!("[failure]\npolicy = \"{policy}\"\nafter = \"3s\"\n");
    rig.write_card(&rig.folder(&format!("{set}.zip")), &settings).await
}

/// Waits for the controller's next operation, and checks that it failed because the image is no system.
async fn is_refused(rig: &Rig, power: &mut Power) -> Result<()> {
    let known = operations(rig).await?;
    let operation = rig
        .until(power, START, "the controller makes an operation for the node", async || {
            Ok(operations(rig).await?.into_iter().find(|name| !known.contains(name)))
        })
        .await?;
    let execution = rig.ended(power, &operation, seconds(300)).await?;
    let (state, reason) = (text(&execution, "state")?, text(&execution, "error.reason")?);
    ensure!(state == "STATE_FAILED" && reason == "NOT_A_SYSTEM", "it ended {state}: {execution}");
    println!("{operation} ended {state}: {}", text(&execution, "error.message")?);
    Ok(())
}

/// The names of all operations.
async fn operations(rig: &Rig) -> Result<Vec<String>> {
    let listed = rig.lab.ask(&["operations", "list"]).await?;
    let listed = listed.get("operations").and_then(Value::as_array).cloned().unwrap_or_default();
    listed.iter().map(|operation| Ok(text(operation, "name")?.to_owned())).collect()
}

/// Waits until the machine's console contains this text.
async fn says(rig: &Rig, power: &mut Power, what: &str) -> Result<()> {
    rig.until(power, START, &format!("the console says {what:?}"), async || {
        let starts = rig.machine.starts();
        let console = starts.last().map(|start| std::fs::read(&start.console)).transpose()?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&console).contains(what).then_some(()))
    })
    .await
}
