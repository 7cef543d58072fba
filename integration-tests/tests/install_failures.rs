//! All failures of an installation: the execution and the card both give the reason, the policy is obeyed, and
//! everything that can continue does.

#[path = "install_failures/judged.rs"]
mod judged;
#[path = "install_failures/unchecked.rs"]
mod unchecked;
#[path = "install_failures/ways.rs"]
mod ways;

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{Pi, update};
use integration_tests::image::{Compression, lay_out_root, make_image, noise, pack};
use integration_tests::mount::Mount;
use integration_tests::process::{Recipe, binary};
use integration_tests::proxy::Direction;
use integration_tests::smuggle::NOTHING_KNOWN;
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{Artifact, ListOperationsRequest, NodeMode};

/// Timeout of an installation, or of its failure.
const INSTALL: Duration = seconds(180);
const MIB: usize = 1024 * 1024;

async fn image(fleet: &Fleet, name: &str) -> Result<Artifact> {
    let file = make_image(fleet.dir(), name, Compression::Gzip)?;
    push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await
}

/// Pushes an image whose tree was changed before packing.
async fn other_image(fleet: &Fleet, name: &str, change: impl FnOnce(PathBuf) -> Result<()>) -> Result<Artifact> {
    let root = fleet.dir().join(name);
    lay_out_root(&root, name)?;
    change(root.clone())?;
    let file = pack(&root, &fleet.dir().join(format!("{name}.tar")), Compression::None)?;
    push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await
}

/// Stores an image that nobody judged. The checks pass what is not known, so only the installer finds its faults.
async fn unjudged(fleet: &mut Fleet, name: &str, change: impl FnOnce(PathBuf) -> Result<()>) -> Result<Artifact> {
    let pushed = image(fleet, name).await?;
    let root = fleet.dir().join(format!("{name}-unjudged"));
    lay_out_root(&root, name)?;
    change(root.clone())?;
    let file = pack(&root, &fleet.dir().join(format!("{name}-unjudged.tar")), Compression::Gzip)?;
    unchecked::smuggle(fleet, &[(&pushed, &fs::read(file)?)], NOTHING_KNOWN).await?;
    Ok(pushed)
}

/// Path of an artifact's bytes in the controller's data folder.
fn blob(fleet: &Fleet, artifact: &Artifact) -> Result<PathBuf> {
    let shard = artifact.sha256.get(..2).context("a digest")?;
    Ok(fleet.data().join("artifacts/sha256").join(shard).join(&artifact.sha256))
}

/// Prints that a test could not run: it must not look as if it had passed.
#[allow(clippy::print_stdout, reason = "for whoever reads the tests' output")]
fn not_tested(why: &str) {
    println!("NOT TESTED: {why}");
}

/// The installer's log on the card, for an operator who takes the card out.
fn card_log(pi: &Pi) -> Result<String> {
    pi.read("recovery/marco/install.log")
}

/// A failure with its expected outcome.
struct Case {
    pi: &'static str,
    image: Artifact,
    state: State,
    reason: &'static str,
    /// A word that the error message must contain.
    says: &'static str,
    /// The node's mode afterwards.
    mode: NodeMode,
}

#[tokio::test]
async fn each_failure_has_its_reason_in_the_execution_and_on_the_card() -> Result<()> {
    let mut fleet = Fleet::builder().pis(5).start().await?;
    // The controller checks images at the upload; only a fault that it does not know of reaches the installer.
    let no_kernel =
        unjudged(&mut fleet, "no-kernel", |root| Ok(fs::remove_file(root.join("boot/firmware/kernel8.img"))?)).await?;
    let no_boot = unjudged(&mut fleet, "no-boot", |root| Ok(fs::remove_dir_all(root.join("boot"))?)).await?;
    let missing = image(&fleet, "missing").await?;
    fs::remove_file(blob(&fleet, &missing)?)?;
    let wrong = image(&fleet, "wrong-chunk").await?;
    let path = blob(&fleet, &wrong)?;
    let mut bytes = fs::read(&path)?;
    // One bit, behind the first chunks: the digest of that chunk does not match any more.
    *bytes.get_mut(100_000).context("a byte")? ^= 1;
    let mut permissions = fs::metadata(&path)?.permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "a file of this test's own")]
    permissions.set_readonly(false);
    fs::set_permissions(&path, permissions)?;
    fs::OpenOptions::new().write(true).open(&path)?.write_all(&bytes)?;
    let good = image(&fleet, "good").await?;
    fs::write(fleet.pi("pi-03").path("card-size"), "500\n")?;

    let (back, stays) = ((State::RolledBack, NodeMode::Running), (State::Failed, NodeMode::Installer));
    let case = |pi, image: &Artifact, (state, mode): (State, NodeMode), reason, says| Case {
        pi,
        image: image.clone(),
        state,
        reason,
        says,
        mode,
    };
    let cases = [
        case("pi-01", &missing, back, "DOWNLOAD_REFUSED", "push the file again"),
        case("pi-02", &wrong, back, "DIGEST_MISMATCH", "chunk"),
        case("pi-03", &good, back, "DISK_TOO_SMALL", "500 MiB"),
        case("pi-04", &no_kernel, stays, "NOT_A_SYSTEM", "kernel"),
        case("pi-05", &no_boot, stays, "NOT_A_SYSTEM", "no boot files"),
    ];
    let mut operations = Vec::new();
    for case in &cases {
        operations.push(fleet.create(update(&[case.pi], &case.image.name, "")).await?);
    }
    for (case, operation) in cases.iter().zip(&operations) {
        fleet.ends(&operation.name, INSTALL, OperationState::Failed).await.with_context(|| case.reason)?;
        let execution = fleet.execution(&operation.name, case.pi).await?;
        let error = execution.error.clone().unwrap_or_default();
        assert_eq!((execution.state(), error.reason.as_str()), (case.state, case.reason), "{}: {error:?}", case.pi);
        assert!(error.message.contains(case.says), "{}: {}", case.pi, error.message);
        let log = card_log(&fleet.pi(case.pi))?;
        assert!(log.contains(case.reason) && log.contains(&operation.name), "{}: {log}", case.pi);
        let node = fleet.node(case.pi).await?;
        assert_eq!((node.mode(), node.active_execution.as_str()), (case.mode, ""), "{}", case.pi);
    }
    // Nodes that stay in the installer are connected, and accept another image.
    fleet.succeeds(update(&["pi-04", "pi-05"], &good.name, ""), INSTALL).await?;
    // The error message tells the operator to do this.
    let file = fleet.dir().join("missing.tar.gz");
    let again = push(&mut fleet.artifacts(), "missing", Kind::Image, Purpose::Unspecified, &file).await?;
    fleet.succeeds(update(&["pi-01"], &again.name, ""), INSTALL).await?;
    Ok(())
}

#[tokio::test]
async fn a_card_that_fills_up_half_way_fails_with_the_reason_and_takes_a_smaller_image() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let root = fleet.pi("pi-01").path("root");
    // The Pi's root is a small file system, so that the space ends in the middle of unpacking.
    let Ok(_mount) = Mount::tmpfs(root, "24m").await else {
        not_tested("only root may give a file system a size");
        return Ok(());
    };
    let large =
        other_image(&fleet, "large", |root| Ok(fs::write(root.join("usr/lib/marker/large"), noise("x", 30 * MIB))?))
            .await?;
    let small = image(&fleet, "small").await?;
    let token = fleet.dir().join("token");
    fs::write(&token, fleet.token(1).await?)?;
    fleet.start_new_agents(&["--token-file".into(), token.display().to_string(), "--blank".into()])?;
    wait_until(INSTALL, "the node is there", async || Ok(fleet.node("pi-01").await.ok().filter(|node| node.connected)))
        .await?;
    let operation = fleet.create(update(&["pi-01"], &large.name, "")).await?;
    fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
    let execution = fleet.execution(&operation.name, "pi-01").await?;
    let error = execution.error.clone().unwrap_or_default();
    assert_eq!((execution.state(), error.reason.as_str()), (State::Failed, "NO_ROOM"), "{error:?}");
    let log = card_log(&fleet.pi("pi-01"))?;
    assert!(log.contains("NO_ROOM") && log.contains(&operation.name), "{log}");
    fleet.succeeds(update(&["pi-01"], &small.name, ""), INSTALL).await?;
    fleet.kill_agents().await
}

#[tokio::test]
async fn twenty_cuts_and_a_restart_of_the_controller_do_not_keep_a_node_from_its_image() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let large =
        other_image(&fleet, "large", |root| Ok(fs::write(root.join("usr/lib/marker/large"), noise("x", 20 * MIB))?))
            .await?;
    // Each cut comes a little later than the one before, so that they fall at different places of the stream.
    let cuts: Vec<u64> = (0..20).map(|number| 900_000 + number * 10_007).collect();
    fleet.proxy().cut_after(Direction::Down, cuts);
    let operation = fleet.create(update(&["pi-01"], &large.name, "")).await?;
    wait_until(INSTALL, "half of the cuts have happened", async || {
        Ok((fleet.proxy().cuts_left(Direction::Down) <= 10).then_some(()))
    })
    .await?;
    fleet.kill_controller().await?;
    fleet.start_controller().await?;
    fleet.ends(&operation.name, INSTALL, OperationState::Succeeded).await?;
    assert_eq!(fleet.proxy().cuts_left(Direction::Down), 0, "not all cuts happened");
    Ok(())
}

#[tokio::test]
async fn an_installer_without_a_job_leaves_a_card_with_a_system_alone() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let default = image(&fleet, "default").await?;
    let request = marco_proto::v1::SetDefaultArtifactRequest { name: default.name.clone(), ..Default::default() };
    fleet.artifacts().set_default_artifact(request).await?;
    let pi = fleet.pi("pi-01");
    // As after an operator's mistake: the installer boots by default, and has no job.
    let autoboot = pi.read("recovery/autoboot.txt")?;
    let swapped =
        autoboot.replace("boot_partition=4", "boot_partition=x").replace("boot_partition=1", "boot_partition=4");
    fs::write(pi.path("recovery/autoboot.txt"), swapped.replace("boot_partition=x", "boot_partition=1"))?;
    for name in ["node.key", "node.crt", "ca.crt"] {
        fs::copy(pi.path("agent").join(name), pi.path("recovery/marco").join(name))?;
    }
    fs::write(pi.path("root/precious"), "mine")?;
    pi.cut_power()?;
    wait_until(INSTALL, "the installer is there", async || {
        let node = fleet.node("pi-01").await?;
        Ok((node.connected && node.mode() == NodeMode::Installer).then_some(()))
    })
    .await?;
    // The controller looks for nodes without a system every few seconds; two looks must create no operation.
    let begun = tokio::time::Instant::now();
    wait_until(seconds(30), "the controller has looked twice", async || {
        let operations = fleet.operations().list_operations(ListOperationsRequest::default()).await?.into_inner();
        assert_eq!(operations.operations, []);
        Ok((begun.elapsed() > seconds(11)).then_some(()))
    })
    .await?;
    assert_eq!(pi.read("root/precious")?, "mine");
    Ok(())
}

#[tokio::test]
async fn a_blank_card_in_the_wrong_hands_says_so_on_the_card() -> Result<()> {
    let (mut fleet, other) = (Fleet::builder().pis(0).start().await?, Fleet::builder().pis(0).start().await?);
    // A token of another controller carries the pin of another CA.
    let token = fleet.dir().join("token");
    fs::write(&token, other.token(1).await?)?;
    fleet.start_new_agents(&["--token-file".into(), token.display().to_string(), "--blank".into()])?;
    let pi = fleet.pi("pi-01");
    let log = wait_until(INSTALL, "the card says why", async || {
        Ok(card_log(&pi).ok().filter(|log| log.contains("cannot be enrolled yet")))
    })
    .await?;
    assert!(log.contains("another controller than the one that made the join token"), "{log}");
    assert_eq!(fleet.list_nodes().await?, []);
    Ok(())
}

#[tokio::test]
async fn without_a_controller_the_card_says_so_and_the_node_comes_when_there_is_one() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let default = image(&fleet, "default").await?;
    let request = marco_proto::v1::SetDefaultArtifactRequest { name: default.name.clone(), ..Default::default() };
    fleet.artifacts().set_default_artifact(request).await?;
    let token = fleet.dir().join("token");
    fs::write(&token, fleet.token(1).await?)?;
    fleet.kill_controller().await?;
    fleet.start_new_agents(&["--token-file".into(), token.display().to_string(), "--blank".into()])?;
    let pi = fleet.pi("pi-01");
    let log = wait_until(INSTALL, "the card says why", async || {
        Ok(card_log(&pi).ok().filter(|log| log.contains("cannot be enrolled yet")))
    })
    .await?;
    assert!(log.contains("refused") || log.contains("connect"), "{log}");
    fleet.start_controller().await?;
    wait_until(INSTALL, "the default image runs", async || {
        let node = fleet.node("pi-01").await.ok();
        Ok(node.and_then(|node| node.system).filter(|system| system.image_sha256 == default.sha256))
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_clock_of_1970_or_2040_makes_no_difference() -> Result<()> {
    // A Pi has no battery-backed clock: it may start in 1970, or with any other wrong year.
    for (number, time) in ["@1970-01-02 00:00:00", "@2040-01-02 00:00:00"].into_iter().enumerate() {
        let fleet = Fleet::builder().pis(0).start().await?;
        let default = image(&fleet, "default").await?;
        let request = marco_proto::v1::SetDefaultArtifactRequest { name: default.name.clone(), ..Default::default() };
        fleet.artifacts().set_default_artifact(request).await?;
        let token = fleet.dir().join("token");
        fs::write(&token, fleet.token(1).await?)?;
        let arguments = [
            "simulate".to_owned(),
            "--blank".to_owned(),
            "--dir".to_owned(),
            fleet.dir().join("pis").display().to_string(),
            "--controller".to_owned(),
            fleet.addresses().api.to_string(),
            "--enroll".to_owned(),
            fleet.addresses().enroll.to_string(),
            "--token-file".to_owned(),
            token.display().to_string(),
        ];
        let recipe = Recipe::new(binary("marco-agent")?, arguments, fleet.dir().join(format!("agents-{number}.log")));
        let _agents = recipe
            .env("LD_PRELOAD", integration_tests::fleet::libfaketime()?.display())
            .env("FAKETIME", time)
            .env("FAKETIME_DONT_FAKE_MONOTONIC", 1)
            .start()?;
        wait_until(INSTALL, &format!("the default image runs, {time}"), async || {
            let node = fleet.node("pi-01").await.ok();
            Ok(node.and_then(|node| node.system).filter(|system| system.image_sha256 == default.sha256))
        })
        .await?;
    }
    Ok(())
}
