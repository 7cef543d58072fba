//! Tarballs that the controller has not checked, as a compromised controller would serve them.

use anyhow::{Context as _, Result};
use integration_tests::fleet::update;
use integration_tests::image::{lay_out_root, noise};
use integration_tests::smuggle::{self, NOTHING_KNOWN};
use integration_tests::{Database, Fleet};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{Artifact, NodeMode};

use super::{INSTALL, MIB, card_log, image};

/// [`smuggle::smuggle`] into a fleet with SQLite.
pub(super) async fn smuggle(fleet: &mut Fleet, images: &[(&Artifact, &[u8])], facts: Option<&str>) -> Result<()> {
    smuggle::smuggle(fleet, &Database::Sqlite, images, facts).await
}

/// A tarball with a system and one more entry.
fn tarball(
    fleet: &Fleet,
    name: &str,
    add: impl FnOnce(&mut tar::Builder<&mut Vec<u8>>) -> Result<()>,
) -> Result<Vec<u8>> {
    let root = fleet.dir().join(format!("{name}-tree"));
    lay_out_root(&root, name)?;
    let mut bytes = Vec::new();
    let mut packed = tar::Builder::new(&mut bytes);
    packed.follow_symlinks(false);
    packed.append_dir_all(".", &root)?;
    add(&mut packed)?;
    packed.finish()?;
    drop(packed);
    Ok(bytes)
}

/// Appends an entry with a name that the tar crate refuses to write.
fn append_as(packed: &mut tar::Builder<&mut Vec<u8>>, name: &str, text: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    // The crate's own setter refuses `..`, so the bytes go into the header directly.
    header.as_mut_bytes().get_mut(..name.len()).context("a short name")?.copy_from_slice(name.as_bytes());
    header.set_size(u64::try_from(text.len())?);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(packed.append(&header, text)?)
}

#[tokio::test]
async fn a_truncated_and_a_hostile_tarball_that_the_controller_never_checked_are_refused_by_the_node() -> Result<()> {
    let mut fleet = Fleet::builder().pis(3).start().await?;
    let whole = tarball(&fleet, "whole", |packed| append_as(packed, "usr/lib/marker/last", &noise("x", MIB)))?;
    let climbs = tarball(&fleet, "climbs", |packed| append_as(packed, "../../escaped", b"out"))?;
    let through = tarball(&fleet, "through", |packed| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        packed.append_link(&mut header, "usr/lib/marker/out", fleet.dir())?;
        append_as(packed, "usr/lib/marker/out/escaped", b"out")
    })?;
    let half = whole.len() - MIB / 2;
    let cases =
        [("pi-01", &whole[..half], "cut-off"), ("pi-02", &climbs[..], "climbs"), ("pi-03", &through[..], "through")];
    let mut pushed = Vec::new();
    for (_, _, name) in cases {
        pushed.push(image(&fleet, name).await?);
    }
    let images: Vec<(&Artifact, &[u8])> =
        pushed.iter().zip(cases).map(|(image, (_, bytes, _))| (image, bytes)).collect();
    smuggle(&mut fleet, &images, NOTHING_KNOWN).await?;
    let mut operations = Vec::new();
    for (image, (pi, ..)) in pushed.iter().zip(cases) {
        operations.push((pi, fleet.create(update(&[pi], &image.name, "")).await?));
    }
    for (pi, operation) in &operations {
        fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
        let execution = fleet.execution(&operation.name, pi).await?;
        let error = execution.error.clone().unwrap_or_default();
        assert_eq!((execution.state(), error.reason.as_str()), (State::Failed, "IMAGE_REFUSED"), "{pi}: {error:?}");
        let log = card_log(&fleet.pi(pi))?;
        assert!(log.contains("IMAGE_REFUSED") && log.contains(&operation.name), "{pi}: {log}");
        assert_eq!(fleet.node(pi).await?.mode(), NodeMode::Installer, "{pi}");
        assert!(!fleet.pi(pi).path("escaped").exists() && !fleet.dir().join("pis/escaped").exists(), "{pi}");
    }
    assert!(!fleet.dir().join("escaped").exists());
    // Another image repairs the node.
    let good = image(&fleet, "good").await?;
    fleet.succeeds(update(&["pi-01", "pi-02", "pi-03"], &good.name, ""), INSTALL).await?;
    Ok(())
}
