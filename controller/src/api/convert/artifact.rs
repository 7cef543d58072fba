//! Artifacts.

use marco_archive::Facts;
use marco_proto::v1;

use super::timestamp;
use crate::store::{ArtifactRow, Kind, Purpose};

pub(in crate::api) fn kind(kind: i32) -> Option<Kind> {
    match v1::artifact::Kind::try_from(kind).ok()? {
        v1::artifact::Kind::Unspecified => None,
        v1::artifact::Kind::Image => Some(Kind::Image),
        v1::artifact::Kind::Bootcode => Some(Kind::Bootcode),
    }
}

pub(in crate::api) fn artifact(row: &ArtifactRow) -> v1::Artifact {
    v1::Artifact {
        name: row.id.name(),
        kind: match row.kind {
            Kind::Image => v1::artifact::Kind::Image,
            Kind::Bootcode => v1::artifact::Kind::Bootcode,
        }
        .into(),
        purpose: match row.purpose {
            Purpose::None => v1::artifact::Purpose::Unspecified,
            Purpose::Installer => v1::artifact::Purpose::Installer,
            Purpose::System => v1::artifact::Purpose::System,
        }
        .into(),
        sha256: row.sha256.clone(),
        size_bytes: row.size,
        chunk_size: row.chunk_size,
        unpacked_bytes: row.unpacked_bytes,
        entries: row.entries,
        compression: row.compression.clone(),
        push_time: Some(timestamp(row.push_time)),
        creator: row.creator.clone(),
        default_for: row.default_for.clone(),
        open_to_mirror: row.open_to_mirror,
        facts: None,
    }
}

pub(in crate::api) fn facts(facts: Facts) -> v1::ImageFacts {
    v1::ImageFacts {
        refusal: facts.refusal.unwrap_or_default(),
        boot_files: facts.boot_files.into_iter().collect(),
        texts: facts.texts.into_iter().collect(),
        boot_bytes: facts.needs.boot,
        root_bytes: facts.needs.root,
    }
}
