//! `marcoctl artifacts`.

mod doubts;
mod push;

use chrono::{DateTime, Utc};
use marco_proto::v1::artifact;
use marco_proto::v1::{
    Artifact, ArtifactFilter, DeleteArtifactRequest, GetArtifactRequest, ListArtifactsRequest, ListArtifactsResponse,
    OpenArtifactRequest, SetDefaultArtifactRequest,
};

use super::all_pages;
use super::several::{self, Names};
use crate::args::{ArtifactsCommand, Kind};
use crate::ask;
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{Out, ago, bytes, clean, enum_word, fields, id, listing, local};

/// Checks the arguments before connecting. A push hashes for minutes, so a late refusal would be costly.
pub(super) fn checked(command: ArtifactsCommand) -> Result<ArtifactsCommand, Failure> {
    if let ArtifactsCommand::Push(flags) = &command {
        push::check(flags)?;
    }
    Ok(command)
}

pub(super) async fn run(command: ArtifactsCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    match command {
        ArtifactsCommand::Push(flags) => {
            let artifact = push::push(&flags, connection).await?;
            out.document(&artifact, detail)
        }
        ArtifactsCommand::List(flags) => {
            let filter = flags.kind.map(|kind| ArtifactFilter { kind: kind_of(kind).into() });
            let artifacts = all_pages(async |page_token| {
                let request = ListArtifactsRequest { page_size: flags.paging.page_size, page_token, filter };
                let page = connection.artifacts().list_artifacts(call(request)).await?.into_inner();
                Ok((page.artifacts, page.next_page_token))
            })
            .await?;
            out.document(&ListArtifactsResponse { artifacts, ..Default::default() }, |list, now| {
                let rows = list.artifacts.iter().map(|artifact| {
                    vec![
                        id(&artifact.name),
                        kind(artifact),
                        bytes(artifact.size_bytes),
                        artifact.sha256.chars().take(12).collect(),
                        artifact.compression.clone(),
                        ago(artifact.push_time.as_ref(), now),
                        artifact.creator.clone(),
                        artifact.default_for.join(","),
                    ]
                });
                listing(
                    "no artifacts",
                    &["ARTIFACT", "KIND", "SIZE", "SHA256", "COMPRESSION", "PUSHED", "BY", "DEFAULT FOR"],
                    rows,
                )
            })
        }
        ArtifactsCommand::Get { artifact } => {
            let request = GetArtifactRequest { name: artifact };
            out.document(&connection.artifacts().get_artifact(call(request)).await?.into_inner(), detail)
        }
        ArtifactsCommand::Delete { artifacts, force } => {
            // Without the question the doubts are not needed, and finding them reads all nodes and schedules.
            if !force.force {
                ask::unless_forced(&doubts::about_deleting(&artifacts, connection).await?, force)?;
            }
            let one = artifacts.first().map(|name| clean(name)).unwrap_or_default();
            let detail = move |_: &_, _| format!("{one} is deleted");
            let show = several::Show { field: None, done: "deleted", detail };
            several::each(&Names::Given(artifacts), show, out, async |name| {
                Ok(connection.artifacts().delete_artifact(call(DeleteArtifactRequest { name })).await?.into_inner())
            })
            .await
        }
        ArtifactsCommand::Open { artifact, mirror } => open(connection, out, artifact, mirror).await,
        ArtifactsCommand::Close { artifact, mirror } => open(connection, out, artifact, !mirror).await,
        ArtifactsCommand::Default { artifact, board } => {
            let request = SetDefaultArtifactRequest { name: artifact, board };
            out.document(&connection.artifacts().set_default_artifact(call(request)).await?.into_inner(), detail)
        }
    }
}

async fn open(connection: &Connection, out: &mut Out, artifact: String, open: bool) -> Result<(), Failure> {
    let request = OpenArtifactRequest { name: artifact, open_to_mirror: open };
    out.document(&connection.artifacts().open_artifact(call(request)).await?.into_inner(), detail)
}

fn kind_of(kind: Kind) -> artifact::Kind {
    match kind {
        Kind::Image => artifact::Kind::Image,
        Kind::Bootcode => artifact::Kind::Bootcode,
    }
}

fn kind(artifact: &Artifact) -> String {
    let kind = enum_word(artifact.kind().as_str_name(), "KIND_");
    match enum_word(artifact.purpose().as_str_name(), "PURPOSE_") {
        purpose if purpose.is_empty() => kind,
        purpose => format!("{kind} ({purpose})"),
    }
    .to_lowercase()
}

fn detail(artifact: &Artifact, _now: DateTime<Utc>) -> String {
    fields(&[
        ("artifact", artifact.name.clone()),
        ("kind", kind(artifact)),
        ("sha256", artifact.sha256.clone()),
        ("size", bytes(artifact.size_bytes)),
        ("unpacked", bytes(artifact.unpacked_bytes)),
        ("entries", artifact.entries.to_string()),
        ("compression", artifact.compression.clone()),
        ("pushed", local(artifact.push_time.as_ref())),
        ("by", artifact.creator.clone()),
        ("default for", artifact.default_for.join(", ")),
        ("open to", if artifact.open_to_mirror { "the file mirror" } else { "" }.to_owned()),
    ])
}
