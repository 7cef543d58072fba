//! Images that are no system: refused at the push, at the creation of an operation, by the dry run, and by the running
//! system; and the explanation after a failure that only the installer could notice.

use std::fs;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{execution_name, update};
use integration_tests::image::{Compression, lay_out_root, pack};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{
    CheckOperationRequest, CreateScheduleRequest, ExplainExecutionRequest, ListOperationsRequest, NodeMode,
    RetryOperationRequest, Schedule,
};
use tonic::{Code, Status};

use super::unchecked::smuggle;
use super::{INSTALL, image, unjudged};

/// A tarball of a root without these files.
fn without(fleet: &Fleet, name: &str, files: &[&str]) -> Result<Vec<u8>> {
    let root = fleet.dir().join(name);
    lay_out_root(&root, name)?;
    for file in files {
        fs::remove_file(root.join(file))?;
    }
    Ok(fs::read(pack(&root, &fleet.dir().join(format!("{name}.tar")), Compression::Gzip)?)?)
}

#[tokio::test]
async fn image_that_is_no_system_is_refused_at_the_push_with_all_it_lacks() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let lacking = ["usr/sbin/init", "boot/firmware/kernel8.img", "boot/firmware/cmdline.txt"];
    without(&fleet, "bad", &lacking)?;
    let file = fleet.dir().join("bad.tar");
    let refused = push(&mut fleet.artifacts(), "bad", Kind::Image, Purpose::Unspecified, &file).await;
    let status = refused.err().context("it was taken")?.downcast::<Status>()?;
    assert_eq!(status.code(), Code::InvalidArgument);
    for word in ["init", "kernel", "cmdline.txt", "docs/images.md"] {
        assert!(status.message().contains(word), "{word}: {status:?}");
    }
    let root = fleet.dir().join("bad");
    let nested = fleet.dir().join("nested");
    fs::create_dir(&nested)?;
    // The usual mistake in packing: the root is one folder too deep.
    fs::rename(root, nested.join("rootfs"))?;
    fs::write(nested.join("rootfs/usr/sbin/init"), "#!/bin/sh\n")?;
    let file = pack(&nested, &fleet.dir().join("nested.tar"), Compression::None)?;
    let refused = push(&mut fleet.artifacts(), "nested", Kind::Image, Purpose::Unspecified, &file).await;
    let refused = refused.err().context("it was taken")?.to_string();
    assert!(refused.contains("everything is below rootfs/: pack with -C rootfs ."), "{refused}");
    Ok(())
}

#[tokio::test]
async fn image_stored_in_former_times_is_judged_at_its_first_use() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let old = image(&fleet, "old").await?;
    let bytes = without(&fleet, "old-bad", &["boot/firmware/kernel8.img"])?;
    smuggle(&mut fleet, &[(&old, &bytes)], None).await?;
    fs::write(fleet.pi("pi-01").path("root/precious"), "mine")?;
    let refused = fleet.create(update(&["pi-01"], &old.name, "")).await.err().context("it was taken")?;
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("kernel"), "{refused:?}");
    let request = CheckOperationRequest { operation: Some(update(&["pi-01"], &old.name, "")) };
    let refused = fleet.operations().check_operation(request).await.err().context("the dry run lets it pass")?;
    assert!(refused.message().contains("kernel"), "{refused:?}");
    assert!(fleet.pi("pi-01").path("root/precious").exists());
    Ok(())
}

#[tokio::test]
async fn image_stored_in_former_times_is_judged_at_the_start_without_any_use() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let old = image(&fleet, "old").await?;
    let bytes = without(&fleet, "old-bad", &["boot/firmware/kernel8.img"])?;
    smuggle(&mut fleet, &[(&old, &bytes)], None).await?;
    let said = wait_until(seconds(60), "it is judged", async || {
        let log = fleet.controller_log(0)?;
        Ok(log.lines().find(|line| line.contains("a stored image is no system")).map(str::to_owned))
    })
    .await?;
    assert!(said.contains("a kernel"), "{said}");
    Ok(())
}

#[tokio::test]
async fn dry_run_names_the_nodes_that_an_image_is_not_for() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let other = image(&fleet, "other").await?;
    let bytes = without(&fleet, "no-tree", &[])?;
    // Only the boot files matter to this check.
    let facts = r#"{"boot_files":["kernel8.img","cmdline.txt","config.txt","bcm2710-rpi-3-b.dtb"],
                    "texts":{"config.txt":"arm_64bit=1"}}"#;
    smuggle(&mut fleet, &[(&other, &bytes)], Some(facts)).await?;
    let request = CheckOperationRequest { operation: Some(update(&["pi-01"], &other.name, "")) };
    let checks = fleet.operations().check_operation(request).await?.into_inner().checks;
    let check = checks.first().context("a check")?;
    assert_eq!(check.reason, "NOT_A_SYSTEM", "{check:?}");
    assert!(check.message.contains("bcm2711-rpi-4-b.dtb"), "{check:?}");
    // No target can start it, so there is nothing to create. A schedule is stored, and says that it would be skipped.
    let refused = fleet.create(update(&["pi-01"], &other.name, "")).await.err().context("it was created")?;
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("bcm2711-rpi-4-b.dtb"), "{refused:?}");
    assert_eq!(fleet.operations().list_operations(ListOperationsRequest::default()).await?.into_inner().operations, []);
    let schedule = Schedule {
        cron: "0 0 1 1 *".to_owned(),
        time_zone: "UTC".to_owned(),
        operation: Some(update(&["pi-01"], &other.name, "")),
        ..Schedule::default()
    };
    let create = CreateScheduleRequest {
        schedule: Some(schedule),
        schedule_id: "yearly".to_owned(),
        ..CreateScheduleRequest::default()
    };
    let mut schedules = ScheduleServiceClient::new(fleet.admin_channel());
    let doubts = schedules.create_schedule(create).await?.into_inner().doubts.join("\n");
    assert!(doubts.contains("would be skipped now") && doubts.contains("bcm2711-rpi-4-b.dtb"), "{doubts}");
    Ok(())
}

#[tokio::test]
async fn after_a_failure_that_another_try_cannot_heal_the_image_to_put_back_is_named() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let good = image(&fleet, "good").await?;
    fleet.succeeds(update(&["pi-01"], &good.name, ""), INSTALL).await?;
    assert_eq!(fleet.node("pi-01").await?.trouble, "");
    let bad = unjudged(&mut fleet, "bad", |root| Ok(fs::remove_file(root.join("boot/firmware/kernel8.img"))?)).await?;
    let operation = fleet.create(update(&["pi-01"], &bad.name, "")).await?;
    fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
    assert_eq!(fleet.execution(&operation.name, "pi-01").await?.state(), State::Failed);
    assert_eq!(fleet.node("pi-01").await?.mode(), NodeMode::Installer);

    // A retry would fail in the same way, so it is refused, and the message names the image to put back.
    let request = RetryOperationRequest { name: operation.name.clone(), request_id: String::new() };
    let refused = fleet.operations().retry_operation(request).await.err().context("it is tried again")?;
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let explain = ExplainExecutionRequest { name: execution_name(&operation, "pi-01") };
    let explained = fleet.operations().explain_execution(explain).await?.into_inner();
    let suggestions = explained.suggestions.join("\n");
    assert!(!suggestions.contains("operations retry"), "{suggestions}");
    let trouble = fleet.node("pi-01").await?.trouble;
    for said in [refused.message(), &suggestions, &trouble] {
        assert!(said.contains("marcoctl operations update pi-01 --image good"), "{said}");
    }
    assert!(trouble.contains("NOT_A_SYSTEM") && trouble.contains("bad"), "{trouble}");

    fleet.succeeds(update(&["pi-01"], &good.name, ""), INSTALL).await?;
    assert_eq!(fleet.node("pi-01").await?.trouble, "");
    Ok(())
}
