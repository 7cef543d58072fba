//! Whole updates: the Pis get the image unchanged, personal data survives, and another image repairs a bad update.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{Pi, execution_name, reboot, update};
use integration_tests::image::{
    Compression, installer_set, lay_out_root, make_bootcode, make_image, pack, sha256, system_set, zip_of,
};
use integration_tests::tree::compare_with_source;
use integration_tests::upload::{header, push, upload};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{Artifact, NodeMode, RetryOperationRequest, SetDefaultArtifactRequest};

/// Timeout of an update of a few small Pis.
const UPDATE: Duration = seconds(180);

/// Makes an image named after its marker, pushes it, and returns it with its source tree.
async fn push_image(fleet: &Fleet, marker: &str, compression: Compression) -> Result<(Artifact, PathBuf)> {
    let file = make_image(fleet.dir(), marker, compression)?;
    let artifact = push(&mut fleet.artifacts(), marker, Kind::Image, Purpose::Unspecified, &file).await?;
    Ok((artifact, fleet.dir().join(marker)))
}

async fn push_zip(fleet: &Fleet, name: &str, purpose: Purpose, zip: &[u8]) -> Result<Artifact> {
    Ok(upload(&mut fleet.artifacts(), header(name, Kind::Bootcode, purpose, zip), zip).await?)
}

/// Waits until the system boots by default. The agent changes that after its success was stored.
async fn system_is_default(pi: &Pi) -> Result<()> {
    wait_until(seconds(20), "autoboot.txt names p4 as the default", async || {
        Ok(default_of(pi)?.contains("boot_partition=4").then_some(()))
    })
    .await
}

/// The part of `autoboot.txt` for an ordinary boot, not for a trial.
fn default_of(pi: &Pi) -> Result<String> {
    let autoboot = pi.read("recovery/autoboot.txt")?;
    Ok(autoboot.split("[tryboot]").next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn three_pis_run_the_image_file_by_file_and_keep_what_is_theirs() -> Result<()> {
    let fleet = Fleet::builder().pis(3).start().await?;
    let ids = fleet.ids().await?;
    let (image, source) = push_image(&fleet, "first", Compression::Gzip).await?;
    for id in &ids {
        fs::write(fleet.pi(id).path("home/letter"), format!("from {id}"))?;
        fs::write(fleet.pi(id).path("root/left-over"), "of the old system")?;
    }
    let operation = fleet.succeeds(update(&ids, &image.name, ""), UPDATE).await?;

    let mut machine_ids = Vec::new();
    for id in &ids {
        let pi = fleet.pi(id);
        assert!(compare_with_source(&source, pi.dir())? > 20);
        assert_eq!(pi.read("home/letter")?, format!("from {id}"));
        let release = pi.read("root/etc/marco-release")?;
        let name = execution_name(&operation, id);
        assert!(release.contains(&name) && release.contains(&image.sha256), "{release}");
        let config = pi.read("recovery/installer-config.txt")?;
        assert!(config.lines().any(|line| line == "export OS_IMG=first"), "{config}");
        assert_eq!(pi.read("root/etc/hostname")?.trim(), *id);
        machine_ids.extend(pi.read("root/etc/machine-id"));
        // One reboot into the installer, one into the new system, and no more.
        assert_eq!(pi.reboots(&name)?, 2);
        assert_eq!(pi.boots()?, 3);
        system_is_default(&pi).await?;
        let node = fleet.node(id).await?;
        assert_eq!(node.mode(), NodeMode::Running);
        let system = node.system.context("no system")?;
        assert_eq!((system.os.as_str(), system.image_sha256.as_str()), ("Test OS first", image.sha256.as_str()));
    }
    // Images carry no machine-id; two nodes with the same one would share their DHCP leases.
    machine_ids.sort();
    machine_ids.dedup();
    assert!(machine_ids.len() == ids.len() || machine_ids.is_empty(), "nodes share a machine-id: {machine_ids:?}");
    Ok(())
}

#[tokio::test]
async fn every_compression_and_a_second_update_leave_nothing_of_the_system_before() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    // Onto the same card one after the other, so that each update must remove the system before it.
    for (marker, compression) in
        [("plain", Compression::None), ("gzipped", Compression::Gzip), ("zstandard", Compression::Zstd)]
    {
        let (image, source) = push_image(&fleet, marker, compression).await?;
        fleet.succeeds(update(&ids, &image.name, ""), UPDATE).await?;
        compare_with_source(&source, fleet.pi(&ids[0]).dir()).with_context(|| marker.to_owned())?;
    }
    // The installed system boots, also at the next ordinary reboot.
    fleet.succeeds(reboot(&ids, Duration::ZERO), seconds(60)).await?;
    assert_eq!(fleet.node(&ids[0]).await?.system.context("no system")?.os, "Test OS zstandard");
    Ok(())
}

#[tokio::test]
async fn the_bootcode_is_the_one_named_else_the_default_else_the_fallback() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let pi = fleet.pi(&ids[0]);
    let (image, _) = push_image(&fleet, "system", Compression::Gzip).await?;
    let in_use = |marker: &str| -> Result<bool> {
        let kernel = format!("installer kernel {marker}");
        Ok(["b0", "b1"]
            .iter()
            .any(|set| pi.read(&format!("recovery/{set}/kernel8.img")).is_ok_and(|text| text == kernel)))
    };
    // The controller has no bootcode, so the node uses the fallback zip on its card.
    let operation = fleet.succeeds(update(&ids, &image.name, ""), UPDATE).await?;
    assert_eq!(operation_bootcode(&operation), "");

    let default = push_zip(&fleet, "the-default", Purpose::Installer, &make_bootcode("of the default")?).await?;
    let request = SetDefaultArtifactRequest { name: default.name.clone(), board: String::new() };
    let set = fleet.artifacts().set_default_artifact(request).await?.into_inner();
    assert_eq!(set.default_for, ["*"]);
    let operation = fleet.succeeds(update(&ids, &image.name, ""), UPDATE).await?;
    assert_eq!(operation_bootcode(&operation), default.sha256);
    assert!(in_use("of the default")?, "the default was not put onto the card");

    let named = push_zip(&fleet, "the-named", Purpose::Installer, &make_bootcode("that was named")?).await?;
    let operation = fleet.succeeds(update(&ids, &image.name, &named.name), UPDATE).await?;
    assert_eq!(operation_bootcode(&operation), named.sha256);
    assert!(in_use("that was named")?, "the named one was not put onto the card");
    Ok(())
}

/// Digest of the bootcode, frozen at the operation's creation.
fn operation_bootcode(operation: &marco_proto::v1::Operation) -> &str {
    match &operation.action {
        Some(marco_proto::v1::operation::Action::Update(update)) => &update.bootcode_sha256,
        _ => "not an update",
    }
}

#[tokio::test]
async fn without_an_image_only_the_boot_files_change() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let pi = fleet.pi(&ids[0]);
    let (image, source) = push_image(&fleet, "stays", Compression::Gzip).await?;
    fleet.succeeds(update(&ids, &image.name, ""), UPDATE).await?;
    fs::write(pi.path("root/written-since"), "by its user")?;

    let files = system_set("newer");
    let boot = push_zip(&fleet, "newer-boot", Purpose::System, &zip_of(&files)?).await?;
    let operation = fleet.succeeds(update(&ids, "", &boot.name), UPDATE).await?;
    for (name, bytes) in &files {
        // The installer adapts `cmdline.txt` to the card.
        if name != "cmdline.txt" {
            assert_eq!(fs::read(pi.path("boot").join(name))?, *bytes, "{name}");
        }
    }
    assert_eq!(pi.read("root/written-since")?, "by its user");
    assert_eq!(pi.read("root/usr/lib/marker/name")?, "stays");
    assert!(source.join("usr/lib/marker/name").exists());
    assert_eq!(pi.reboots(&execution_name(&operation, &ids[0]))?, 2);
    system_is_default(&pi).await
}

#[tokio::test]
async fn an_image_that_does_not_come_up_brings_the_installer_back_and_another_image_repairs_the_node() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let pi = fleet.pi(&ids[0]);
    let (good, source) = push_image(&fleet, "good", Compression::Gzip).await?;
    fleet.succeeds(update(&ids, &good.name, ""), UPDATE).await?;

    let bad = fleet.dir().join("bad");
    lay_out_root(&bad, "bad")?;
    // The file exists, but is not executable: the fault shows only when the kernel starts it.
    fs::set_permissions(bad.join("usr/sbin/init"), fs::Permissions::from_mode(0o644))?;
    let tarball = pack(&bad, &fleet.dir().join("bad.tar.gz"), Compression::Gzip)?;
    let bad = push(&mut fleet.artifacts(), "bad", Kind::Image, Purpose::Unspecified, &tarball).await?;
    let operation = fleet.create(update(&ids, &bad.name, "")).await?;
    fleet.ends(&operation.name, seconds(300), OperationState::Failed).await?;
    let execution = fleet.execution(&operation.name, &ids[0]).await?;
    assert_eq!(execution.state(), State::Failed, "{execution:?}");
    let error = execution.error.context("no error")?;
    assert!(error.reason == "IMAGE_DID_NOT_COME_UP" && !error.message.is_empty(), "{error:?}");
    // Three more trials would end as these did.
    let request = RetryOperationRequest { name: operation.name.clone(), request_id: String::new() };
    let refused = fleet.operations().retry_operation(request).await.err().context("it is tried again")?;
    let trouble = fleet.node(&ids[0]).await?.trouble;
    for said in [refused.message(), &trouble] {
        assert!(said.contains("IMAGE_DID_NOT_COME_UP") && said.contains("update pi-01 --image good"), "{said}");
    }
    // One reboot into the installer, and three trials.
    assert_eq!(pi.reboots(&execution_name(&operation, &ids[0]))?, 4, "{:?}", pi.log()?);
    wait_until(seconds(60), "the node waits in its installer", async || {
        let node = fleet.node(&ids[0]).await?;
        Ok((node.connected && node.mode() == NodeMode::Installer).then_some(()))
    })
    .await?;

    // The installer accepts only updates with an image, and other operations wait; also after its agent was killed.
    let waits = fleet.create(reboot(&ids, Duration::ZERO)).await?;
    fleet
        .execution_becomes(&waits.name, &ids[0], seconds(20), "held back by the installer", |execution| {
            execution.wait_reason() == marco_proto::v1::execution::WaitReason::NodeInstalling
        })
        .await?;
    fleet.cancel(&waits.name).await?;
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    fleet.succeeds(update(&ids, &good.name, ""), UPDATE).await?;
    compare_with_source(&source, pi.dir())?;
    system_is_default(&pi).await
}

#[tokio::test]
async fn systems_that_hang_on_trial_give_way_without_hands() -> Result<()> {
    let fleet = Fleet::builder().pis(2).start().await?;
    let ids = fleet.ids().await?;
    for (id, at) in ids.iter().zip(["init", "kernel"]) {
        let root = fleet.dir().join(format!("hangs-at-{at}"));
        lay_out_root(&root, "hangs")?;
        fs::create_dir_all(root.join("etc/marco-virtual"))?;
        fs::write(root.join("etc/marco-virtual/hangs"), at)?;
        // Raspberry Pi OS has the driver of the watchdog in its kernel.
        fs::create_dir_all(root.join("lib/modules/6.12-v8"))?;
        let built_in = root.join("lib/modules/6.12-v8/modules.builtin");
        fs::write(built_in, "kernel/drivers/watchdog/bcm2835_wdt.ko\n")?;
        let tarball = pack(&root, &root.with_extension("tar.gz"), Compression::Gzip)?;
        let image = push(&mut fleet.artifacts(), at, Kind::Image, Purpose::Unspecified, &tarball).await?;
        let operation = fleet.create(update(std::slice::from_ref(id), &image.name, "")).await?;
        fleet.ends(&operation.name, seconds(300), OperationState::Failed).await?;
        let error = fleet.execution(&operation.name, id).await?.error.context("no error")?;
        assert_eq!(error.reason, "IMAGE_DID_NOT_COME_UP", "{error:?}");
        // One restart into the installer, and three trials. No test has pressed the power button.
        assert_eq!(fleet.pi(id).reboots(&execution_name(&operation, id))?, 4, "{:?}", fleet.pi(id).log()?);
    }
    Ok(())
}

#[tokio::test]
async fn a_power_cut_at_any_time_of_an_update_leaves_no_mix() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let pi = fleet.pi(&ids[0]);
    let (image, source) = push_image(&fleet, "cut", Compression::Gzip).await?;
    let operation = fleet.create(update(&ids, &image.name, "")).await?;
    // Only after the installer has become the default. A power cut before that correctly brings the old system back.
    wait_until(seconds(60), "the installer is at work", async || {
        let at_work = fleet.node(&ids[0]).await?.mode() == NodeMode::Installer;
        Ok((at_work && default_of(&pi)?.contains("boot_partition=1")).then_some(()))
    })
    .await?;
    pi.cut_power()?;
    fleet.ends(&operation.name, UPDATE, OperationState::Succeeded).await?;
    compare_with_source(&source, pi.dir())?;
    // A power cut without any operation: the same system boots again.
    system_is_default(&pi).await?;
    let boots = pi.boots()?;
    pi.cut_power()?;
    wait_until(seconds(30), "it is back", async || {
        Ok((pi.boots()? > boots && fleet.node(&ids[0]).await?.connected).then_some(()))
    })
    .await?;
    assert_eq!(fleet.node(&ids[0]).await?.mode(), NodeMode::Running);
    compare_with_source(&source, pi.dir())?;
    Ok(())
}

#[tokio::test]
async fn an_image_without_boot_files_for_this_board_is_refused_before_anything_is_armed() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let root = fleet.dir().join("other-board");
    lay_out_root(&root, "other-board")?;
    // A device tree of another board: the image is a sound system, just not for this Pi.
    fs::rename(root.join("boot/firmware/bcm2711-rpi-4-b.dtb"), root.join("boot/firmware/bcm2710-rpi-3-b.dtb"))?;
    let tarball = pack(&root, &fleet.dir().join("other-board.tar.gz"), Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "other-board", Kind::Image, Purpose::Unspecified, &tarball).await?;
    // The board of the second node is not known, so the operation might be worth it and is created.
    fleet.enrol_by_hand("unknown", false).await?;
    let operation = fleet.create(update(&[ids[0].as_str(), "unknown"], &image.name, "")).await?;
    let failed = fleet.execution_is(&operation.name, &ids[0], UPDATE, State::Failed).await?;
    let error = failed.error.context("no error")?;
    assert_eq!(error.reason, "NOT_A_SYSTEM", "{error:?}");
    assert!(error.message.contains("bcm2711-rpi-4-b.dtb"), "it does not say what is missing: {error:?}");
    // The running system itself refused it: nothing rebooted, and nothing was erased.
    assert_eq!(fleet.pi(&ids[0]).reboots(&execution_name(&operation, &ids[0]))?, 0);
    assert_eq!(fleet.node(&ids[0]).await?.mode(), NodeMode::Running);

    // A retry goes to the node that it may help, and to no other.
    fleet.cancel(&operation.name).await?;
    fleet.ends(&operation.name, UPDATE, OperationState::Failed).await?;
    let request = RetryOperationRequest { name: operation.name.clone(), request_id: String::new() };
    let again = fleet.operations().retry_operation(request).await?.into_inner();
    let nodes: Vec<String> = fleet.executions(&again.name).await?.into_iter().map(|row| row.node).collect();
    assert_eq!(nodes, ["nodes/unknown"]);
    fleet.cancel(&again.name).await?;
    Ok(())
}

#[tokio::test]
async fn a_set_that_could_not_start_the_installer_is_refused_at_push() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    for missing in [
        "kernel8.img",
        "cmdline.txt",
        "bcm2711-rpi-4-b.dtb",
        "overlays/README",
        "overlays/overlay_map.dtb",
        "config.txt",
        "initramfs8",
    ] {
        let files: Vec<_> = installer_set("incomplete").into_iter().filter(|(name, _)| name != missing).collect();
        let answer = push_zip(&fleet, "incomplete", Purpose::Installer, &zip_of(&files)?).await;
        let error = answer.err().with_context(|| format!("a set without {missing} was taken"))?;
        let status = error.downcast::<tonic::Status>()?;
        assert!(status.code() == tonic::Code::InvalidArgument, "{status:?}");
    }
    let whole = make_bootcode("whole")?;
    assert_eq!(push_zip(&fleet, "whole", Purpose::Installer, &whole).await?.sha256, sha256(&whole));
    Ok(())
}
