//! Doubts about the deletion of artifacts.

use marco_proto::v1::operation::Action;
use marco_proto::v1::{
    Artifact, GetArtifactRequest, ListNodesRequest, ListSchedulesRequest, Node, Operation, Schedule,
};
use tonic::Code;

use super::super::all_pages;
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::id;

/// Page size for calls that need all nodes or schedules.
const PAGE_SIZE: i32 = 500;
/// Maximum number of nodes or schedules named in a sentence. The rest is counted.
const SHOWN: usize = 6;

/// Returns sentences about the loss: defaults, the images that nodes run, and the images that schedules install. An
/// artifact that does not exist has no doubts: its deletion reports the error.
pub(super) async fn about_deleting(names: &[String], connection: &Connection) -> Result<Vec<String>, Failure> {
    let mut artifacts = Vec::new();
    for name in names {
        match connection.artifacts().get_artifact(call(GetArtifactRequest { name: name.clone() })).await {
            Ok(artifact) => artifacts.push(artifact.into_inner()),
            // The deletion reports a wrong name itself, with its own line.
            Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => {}
            Err(status) => return Err(status.into()),
        }
    }
    if artifacts.is_empty() {
        return Ok(Vec::new());
    }
    // All nodes and schedules are fetched once for all names: the API has no query by artifact.
    let nodes = all_pages(async |page_token| {
        let request = ListNodesRequest { page_size: PAGE_SIZE, page_token, filter: None };
        let page = connection.nodes().list_nodes(call(request)).await?.into_inner();
        Ok((page.nodes, page.next_page_token))
    })
    .await?;
    let schedules = all_pages(async |page_token| {
        let request = ListSchedulesRequest { page_size: PAGE_SIZE, page_token };
        let page = connection.schedules().list_schedules(call(request)).await?.into_inner();
        Ok((page.schedules, page.next_page_token))
    })
    .await?;
    Ok(artifacts.iter().flat_map(|artifact| about(artifact, &nodes, &schedules)).collect())
}

fn about(artifact: &Artifact, nodes: &[Node], schedules: &[Schedule]) -> Vec<String> {
    let name = &artifact.name;
    let mut doubts = Vec::new();
    if !artifact.default_for.is_empty() {
        let boards: Vec<&str> =
            artifact.default_for.iter().map(|board| if board == "*" { "every board" } else { board }).collect();
        doubts.push(format!("{name} is the default for {}; there would be none", boards.join(", ")));
    }
    // Nodes report digests, not names: a name may point to other bytes since.
    let runs = |node: &&Node| {
        let system = node.system.as_ref();
        system.is_some_and(|system| [&system.image_sha256, &system.boot_sha256].contains(&&artifact.sha256))
    };
    let running: Vec<&str> = nodes.iter().filter(runs).map(|node| node.name.as_str()).collect();
    if !running.is_empty() {
        doubts.push(format!("{name} is what {} runs; it could not be installed again by that name", several(&running)));
    }
    let installs = |schedule: &&Schedule| schedule.operation.as_ref().is_some_and(|operation| names(operation, name));
    let installing: Vec<&str> = schedules.iter().filter(installs).map(|schedule| schedule.name.as_str()).collect();
    if !installing.is_empty() {
        doubts.push(format!("{name} is what {} installs; its fires would fail", several(&installing)));
    }
    doubts
}

fn names(operation: &Operation, artifact: &str) -> bool {
    let Some(Action::Update(update)) = &operation.action else { return false };
    [&update.image, &update.bootcode].into_iter().any(|named| !named.is_empty() && id(named) == id(artifact))
}

fn several(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| id(name)).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(" "),
        more => format!("{} and {more} more", shown.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use marco_proto::v1::operation::Action;
    use marco_proto::v1::{Artifact, Node, Operation, Schedule, System, Update};

    use super::about;

    fn image() -> Artifact {
        Artifact { name: "artifacts/kiosk".to_owned(), sha256: "ab".to_owned(), ..Default::default() }
    }

    #[test]
    fn unused_artifact_has_no_doubts() {
        let blank = Node { system: Some(System::default()), ..Default::default() };
        assert!(about(&image(), &[blank, Node::default()], &[Schedule::default()]).is_empty());
    }

    #[test]
    fn default_running_and_scheduled_images_are_doubted() {
        let artifact = Artifact { default_for: vec!["*".to_owned(), "pi4".to_owned()], ..image() };
        let system = Some(System { image_sha256: "ab".to_owned(), ..Default::default() });
        let nodes: Vec<Node> = (0..8)
            .map(|number| Node { name: format!("nodes/n{number}"), system: system.clone(), ..Default::default() })
            .collect();
        let update = Action::Update(Update { image: "kiosk".to_owned(), ..Default::default() });
        let operation = Some(Operation { action: Some(update), ..Default::default() });
        let schedule = Schedule { name: "schedules/nightly".to_owned(), operation, ..Default::default() };
        assert_eq!(
            about(&artifact, &nodes, &[schedule]),
            [
                "artifacts/kiosk is the default for every board, pi4; there would be none",
                "artifacts/kiosk is what n0 n1 n2 n3 n4 n5 and 2 more runs; it could not be installed again by that name",
                "artifacts/kiosk is what nightly installs; its fires would fail",
            ]
        );
    }
}
