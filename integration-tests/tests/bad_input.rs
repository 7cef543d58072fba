//! Refusals: their codes and messages, and that nothing of the request is stored.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use integration_tests::certs::stranger;
use integration_tests::client::{Credentials, bad_fields, reason};
use integration_tests::fleet::{reboot, update};
use integration_tests::image::{Compression, disk_image, lay_out_root, pack};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds};
use marco_proto::v1::operation::{Action, Target};
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{
    AllNodes, CreateOperationRequest, GetOperationRequest, ListOperationsRequest, NodeList, Operation, Reboot, Update,
    artifact,
};
use tonic::{Code, Status};

async fn create_as(fleet: &Fleet, who: &Credentials, operation: Operation) -> Result<Result<Operation, Status>> {
    let mut client = OperationServiceClient::new(who.channel(fleet.addresses().api)?);
    let request = CreateOperationRequest { operation: Some(operation), request_id: String::new() };
    let answer = tokio::time::timeout(seconds(20), client.create_operation(request)).await?;
    Ok(answer.map(tonic::Response::into_inner))
}

async fn nothing_is_stored(fleet: &Fleet) -> Result<()> {
    let stored = fleet.operations().list_operations(ListOperationsRequest::default()).await?.into_inner();
    assert_eq!(stored.operations, [], "something that was refused was stored");
    Ok(())
}

#[tokio::test]
async fn every_bad_operation_is_refused_with_its_field_and_nothing_is_stored() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let good = reboot(&[&id], Duration::ZERO);
    let past: prost_types::Timestamp = (SystemTime::now() - seconds(3600)).into();
    let negative = Reboot { notice: Some(prost_types::Duration { seconds: -1, nanos: 0 }), message: String::new() };
    let odd =
        Operation { target: Some(Target::Nodes(NodeList { nodes: vec!["nodes/../etc".to_owned()] })), ..good.clone() };
    // Name of the case, operation, allowed codes, a word of the message, and the field that the answer must name.
    let cases: [(&str, Operation, &[Code], &str, &str); 10] = [
        (
            "unknown node",
            reboot(&["nobody"], Duration::ZERO),
            &[Code::NotFound, Code::InvalidArgument, Code::FailedPrecondition],
            "nobody",
            "nodes",
        ),
        (
            "one known, one unknown",
            reboot(&[id.as_str(), "nobody"], Duration::ZERO),
            &[Code::NotFound, Code::InvalidArgument, Code::FailedPrecondition],
            "nobody",
            "nodes",
        ),
        ("empty list of nodes", reboot::<&str>(&[], Duration::ZERO), &[Code::InvalidArgument], "nodes", "nodes"),
        ("no target", Operation { target: None, ..good.clone() }, &[Code::InvalidArgument], "", "target"),
        ("no action", Operation { action: None, ..good.clone() }, &[Code::InvalidArgument], "", "action"),
        (
            "a time in the past",
            Operation { schedule_time: Some(past), ..good.clone() },
            &[Code::InvalidArgument],
            "past",
            "schedule_time",
        ),
        (
            "an end in the past",
            Operation { expire_time: Some(past), ..good.clone() },
            &[Code::InvalidArgument],
            "",
            "expire_time",
        ),
        (
            "an image that is not there",
            update(&[&id], "artifacts/no-such-image", ""),
            &[Code::NotFound, Code::InvalidArgument, Code::FailedPrecondition],
            "no-such-image",
            "image",
        ),
        (
            "a negative notice",
            Operation { action: Some(Action::Reboot(negative)), ..good.clone() },
            &[Code::InvalidArgument],
            "notice",
            "notice",
        ),
        ("a name that is a path", odd, &[Code::InvalidArgument], "", "nodes"),
    ];
    for (what, operation, codes, word, field) in cases {
        let Err(status) = fleet.create(operation).await else { anyhow::bail!("{what} was taken") };
        assert!(codes.contains(&status.code()), "{what}: {status:?}");
        assert!(status.message().contains(word), "{what}: the message does not say {word:?}: {}", status.message());
        assert_ne!(reason(&status), "", "{what}: no reason for programs");
        let fields = bad_fields(&status);
        assert!(
            fields.iter().any(|named| named.contains(field)) || status.message().contains(field),
            "{what}: neither the message nor {fields:?} names {field}: {}",
            status.message()
        );
    }
    // Without an image and without any default boot files there is nothing to install.
    let Err(status) = fleet.create(update(&[&id], "", "")).await else { anyhow::bail!("an update to nothing") };
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    nothing_is_stored(&fleet).await?;
    assert_eq!(fleet.pi(&id).boots()?, 1, "something was done all the same");
    Ok(())
}

#[tokio::test]
async fn several_bad_fields_are_all_named_at_once() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let past: prost_types::Timestamp = (SystemTime::now() - seconds(3600)).into();
    let bad = Operation { action: None, schedule_time: Some(past), ..reboot(&["pi-01"], Duration::ZERO) };
    let status = fleet.create(bad).await.err().context("it was taken")?;
    // An operator should not have to repeat the call for each mistake.
    let fields = bad_fields(&status);
    for wanted in ["action", "schedule_time"] {
        assert!(fields.iter().any(|field| field.contains(wanted)), "{wanted} is not among {fields:?}");
    }
    Ok(())
}

#[tokio::test]
async fn who_may_not_is_told_so_before_the_body_is_looked_at() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let pi = fleet.pi(&id);
    let node = Credentials {
        ca: fleet.admin().ca.clone(),
        identity: Some((pi.read("agent/node.crt")?, pi.read("agent/node.key")?)),
    };
    // The body is wrong too: the role is checked first, so that a caller without rights learns nothing from errors.
    let senseless = Operation::default();
    for (who, credentials) in
        [("viewer", fleet.user("viewer")?), ("publisher", fleet.user("publisher")?), ("node", node)]
    {
        let Err(status) = create_as(&fleet, &credentials, senseless.clone()).await? else {
            anyhow::bail!("a {who} created an operation")
        };
        assert_eq!(status.code(), Code::PermissionDenied, "{who}: {status:?}");
        assert_eq!(reason(&status), "ROLE_NOT_ALLOWED", "{who}");
        assert!(status.message().contains(who), "{who}: the message does not name the role: {}", status.message());
    }
    let Err(status) = create_as(&fleet, &fleet.admin().anonymous(), senseless.clone()).await? else {
        anyhow::bail!("nobody created an operation")
    };
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    assert_eq!(reason(&status), "NO_CREDENTIALS");
    // The TLS handshake refuses a certificate of the right shape from another CA.
    let forged = stranger(&fleet.admin().ca, "admin", "admin")?;
    assert!(create_as(&fleet, &forged, reboot(&[&id], Duration::ZERO)).await?.is_err(), "a forged admin was obeyed");

    nothing_is_stored(&fleet).await?;
    // The control: the same certificates work for calls that their roles allow, so the role was the reason.
    let mut viewer = OperationServiceClient::new(fleet.user("viewer")?.channel(fleet.addresses().api)?);
    viewer.list_operations(ListOperationsRequest::default()).await?;
    let all = Operation { target: Some(Target::All(AllNodes {})), ..reboot(&[&id], Duration::ZERO) };
    create_as(&fleet, &fleet.user("operator")?, all).await??;
    Ok(())
}

#[tokio::test]
async fn an_operation_that_does_not_exist_is_not_found_and_a_name_that_is_none_is_invalid() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    for (name, code) in [
        ("operations/0198a6e0-0000-7000-8000-000000000001", Code::NotFound),
        ("0198a6e0-0000-7000-8000-000000000001", Code::NotFound),
        ("operations/../../etc/passwd", Code::InvalidArgument),
        ("", Code::InvalidArgument),
    ] {
        let status = fleet.operations().get_operation(GetOperationRequest { name: name.to_owned() }).await.err();
        let status = status.with_context(|| format!("{name:?} was found"))?;
        assert_eq!(status.code(), code, "{name:?}: {status:?}");
        assert_ne!(reason(&status), "", "{name:?}: no reason for programs");
    }
    Ok(())
}

#[tokio::test]
async fn only_the_image_of_a_whole_disk_is_written_raw() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let raw = |image: &str| {
        let Operation { action: Some(Action::Update(asked)), target, .. } = update(&[&id], image, "") else {
            unreachable!("an update is one")
        };
        Operation { action: Some(Action::Update(Update { raw: true, ..asked })), target, ..Operation::default() }
    };
    let root = fleet.dir().join("root");
    lay_out_root(&root, "tarball")?;
    let tarball = pack(&root, &fleet.dir().join("tarball.tar.gz"), Compression::Gzip)?;
    let kernel = ("kernel8.img", "a kernel");
    let others = [("config.txt", "arm_64bit=1"), ("cmdline.txt", "root=PARTUUID=1"), ("bcm2711-rpi-4-b.dtb", "a tree")];
    // The controller judges a disk image at the push, before any node erases its card.
    let nothing_boots = fleet.dir().join("nothing-boots.img");
    std::fs::write(&nothing_boots, disk_image(&others)?)?;
    let (kind, purpose) = (artifact::Kind::Image, artifact::Purpose::Unspecified);
    let refused = push(&mut fleet.artifacts(), "nothing-boots", kind, purpose, &nothing_boots).await.err();
    let refused = format!("{:#}", refused.context("a disk without a kernel was taken")?);
    assert!(refused.contains("in its boot partition a kernel"), "{refused}");
    let image = fleet.dir().join("disk.img");
    std::fs::write(&image, disk_image(&[&others[..], &[kernel]].concat())?)?;
    for (name, file) in [("tarball", &tarball), ("disk", &image)] {
        push(&mut fleet.artifacts(), name, kind, purpose, file).await?;
    }
    for (image, words) in [("", "needs an image"), ("tarball", "is a tarball of a root")] {
        let refused = fleet.create(raw(image)).await.err().context("it was taken")?;
        assert_eq!(
            (refused.code(), bad_fields(&refused)),
            (Code::InvalidArgument, vec!["operation.update.raw".into()])
        );
        assert!(refused.message().contains(words), "{refused:?}");
    }
    nothing_is_stored(&fleet).await?;
    let taken = fleet.create(raw("disk")).await?;
    let Some(Action::Update(asked)) = &taken.action else { anyhow::bail!("{taken:?}") };
    assert!(asked.raw);
    // The virtual Pi's card has no partitions, so its installer refuses and leaves it unchanged.
    fleet.ends(&taken.name, seconds(120), marco_proto::v1::operation::State::Failed).await?;
    let execution = fleet.execution(&taken.name, &id).await?;
    let message = execution.error.context("it failed without a reason")?.message;
    assert!(message.contains("card is made of folders"), "{message}");
    Ok(())
}
