//! The node's log of a failed installation is read at the controller, without access to the node.

use std::fs;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{execution_name, reboot, update};
use integration_tests::image::{Compression, lay_out_root, pack};
use integration_tests::postgres::Postgres;
use integration_tests::process::{Output, binary, run};
use integration_tests::smuggle::{NOTHING_KNOWN, smuggle};
use integration_tests::upload::push;
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{Artifact, ExplainExecutionRequest, GetExecutionLogRequest};
use serde_json::Value;

/// Timeout of an installation, or of its failure.
const INSTALL: std::time::Duration = seconds(180);

/// An image without a kernel that nobody judged: the installer notices only after it has erased the card.
async fn not_a_system(fleet: &mut Fleet, database: &Database) -> Result<Artifact> {
    let root = fleet.dir().join("bad");
    lay_out_root(&root, "bad")?;
    let file = pack(&root, &fleet.dir().join("bad.tar"), Compression::None)?;
    let pushed = push(&mut fleet.artifacts(), "bad", Kind::Image, Purpose::Unspecified, &file).await?;
    fs::remove_file(root.join("boot/firmware/kernel8.img"))?;
    let file = pack(&root, &fleet.dir().join("bad-unjudged.tar"), Compression::None)?;
    smuggle(fleet, database, &[(&pushed, &fs::read(file)?)], NOTHING_KNOWN).await?;
    Ok(pushed)
}

async fn marcoctl(fleet: &Fleet, arguments: &[&str]) -> Result<Output> {
    let (api, certs) = (format!("localhost:{}", fleet.addresses().api.port()), fleet.certs().display().to_string());
    let all = [&["--controller", &api, "--certs", &certs], arguments].concat();
    run(&binary("marcoctl")?, &all, seconds(60)).await
}

async fn explained(fleet: &Fleet, name: &str) -> Result<String> {
    let request = ExplainExecutionRequest { name: name.to_owned() };
    Ok(fleet.operations().explain_execution(request).await?.into_inner().suggestions.join("\n"))
}

async fn the_installers_lines_are_read_at_the_controller(database: Database) -> Result<()> {
    let mut fleet = Fleet::builder().database(database.clone()).pis(2).start().await?;
    let bad = not_a_system(&mut fleet, &database).await?;
    // This card is too small, so its installer refuses before it erases anything.
    fs::write(fleet.pi("pi-02").path("card-size"), "500\n")?;
    for (pi, state, reason, phases) in [
        ("pi-01", State::Failed, "NOT_A_SYSTEM", ["connecting", "partitioning", "unpacking image"].as_slice()),
        ("pi-02", State::RolledBack, "DISK_TOO_SMALL", &["connecting"]),
    ] {
        let operation = fleet.create(update(&[pi], &bad.name, "")).await?;
        fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
        assert_eq!(fleet.execution(&operation.name, pi).await?.state(), state);
        let name = execution_name(&operation, pi);
        let printed = marcoctl(&fleet, &["operations", "log", &operation.name, pi]).await?.success()?;
        for phase in phases {
            assert!(printed.contains(&format!("{name}: {phase}\n")), "no {phase} in\n{printed}");
        }
        assert!(printed.contains(&format!("{name}: {reason}: ")), "no {reason} in\n{printed}");
        let on_the_card = fleet.pi(pi).read("recovery/marco/install.log")?;
        // The controller's copy and the card's must be the same text.
        assert!(on_the_card.contains(printed.trim_end()), "{on_the_card}\nis not\n{printed}");

        let json = marcoctl(&fleet, &["-o", "json", "operations", "log", &name]).await?.success()?;
        let json: Value = serde_json::from_str(&json)?;
        let text = |key: &str| json.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        assert_eq!((text("name"), text("log")), (name.clone(), printed.clone()));
        assert!(text("time").ends_with('Z') && json.get("cut") == Some(&Value::Bool(false)), "{json}");
        assert!(explained(&fleet, &name).await?.contains(&format!("marcoctl operations log {}", operation.name)));
    }

    // Each failure has its own log, and a later one does not change an earlier one's.
    let first =
        fleet.operations().list_operations(marco_proto::v1::ListOperationsRequest::default()).await?.into_inner();
    let first = first.operations.last().context("there is an operation")?.clone();
    let request = GetExecutionLogRequest { name: execution_name(&first, "pi-01") };
    let before = fleet.operations().get_execution_log(request.clone()).await?.into_inner();
    let again = fleet.create(update(&["pi-01"], &bad.name, "")).await?;
    fleet.ends(&again.name, INSTALL, OperationState::Failed).await?;
    let printed = marcoctl(&fleet, &["operations", "log", &again.name, "pi-01"]).await?.success()?;
    assert!(printed.contains(&again.name) && !printed.contains(&first.name), "{printed}");
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    // A restarted agent repeats its last reports, which must not replace the log.
    wait_until(seconds(60), "the agents say again what they have", async || {
        Ok(fleet.list_nodes().await?.iter().all(|node| node.connected).then_some(()))
    })
    .await?;
    assert_eq!(fleet.operations().get_execution_log(request).await?.into_inner(), before);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn the_log_of_a_failed_installation_is_read_at_the_controller() -> Result<()> {
    the_installers_lines_are_read_at_the_controller(Database::Sqlite).await
}

#[tokio::test]
async fn on_postgres_too() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    the_installers_lines_are_read_at_the_controller(Database::Url(url)).await
}

#[tokio::test]
async fn where_there_is_no_log_that_is_said() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let operation = fleet.succeeds(reboot(&["pi-01"], std::time::Duration::ZERO), seconds(60)).await?;
    let asked = marcoctl(&fleet, &["operations", "log", &operation.name, "pi-01"]).await?;
    assert_eq!(asked.status.code(), Some(1), "{asked:?}");
    assert!(asked.stderr.contains("there is no log of") && asked.stderr.contains("SUCCEEDED"), "{asked:?}");
    let asked = marcoctl(&fleet, &["operations", "log", &operation.name, "pi-99"]).await?;
    assert!(asked.status.code() == Some(1) && asked.stderr.contains("there is no operations/"), "{asked:?}");
    let asked = marcoctl(&fleet, &["operations", "log", &operation.name]).await?;
    assert!(asked.status.code() == Some(2) && asked.stderr.contains("OPERATION NODE"), "{asked:?}");
    assert!(!explained(&fleet, &execution_name(&operation, "pi-01")).await?.contains("operations log"));
    fleet.went_well();
    Ok(())
}
