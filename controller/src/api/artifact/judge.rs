//! What images say about themselves, judged at the push, and of those that were stored before at their first use.

use std::time::Duration;

use marco_archive::Facts;

use crate::api::Context;
use crate::api::status::ApiError;
use crate::artifacts::{ArtifactError, Digest};
use crate::store::ArtifactRow;

/// How long a caller waits for an image that is judged for the first time; judging goes on without it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Keeps the facts of an image.
pub(super) async fn keep(context: &Context, sha256: &str, facts: &Facts) -> Result<(), ApiError> {
    let text = serde_json::to_string(facts).map_err(|error| ApiError::Internal(error.to_string()))?;
    context.store.put_facts(sha256, &text).await?;
    Ok(())
}

/// The facts of an image, when it was judged. Facts that cannot be read are as good as none.
pub(super) async fn known(context: &Context, sha256: &str) -> Result<Option<Facts>, ApiError> {
    let text = context.store.facts(sha256).await?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// The facts of an image, which is judged now if it never was. `None`: its bytes are not here, so nothing is known.
///
/// # Errors
/// `Aborted` while a large image is still being judged; the store's and the disk's.
pub(in crate::api) async fn facts_of(context: &Context, row: &ArtifactRow) -> Result<Option<Facts>, ApiError> {
    if let Some(facts) = known(context, &row.sha256).await? {
        return Ok(Some(facts));
    }
    let (judging, sha256) = (context.clone(), row.sha256.clone());
    let task = context.tasks.spawn(async move { judge(&judging, &sha256).await });
    match tokio::time::timeout(PATIENCE, task).await {
        Ok(Ok(judged)) => judged,
        Ok(Err(error)) => Err(ApiError::Internal(format!("judging an image did not end: {error}"))),
        Err(_) => Err(ApiError::Aborted {
            reason: "IMAGE_NOT_JUDGED_YET",
            message: format!(
                "{} was stored before images were judged, and is being read now; ask again in a minute",
                row.id.name()
            ),
        }),
    }
}

async fn judge(context: &Context, sha256: &str) -> Result<Option<Facts>, ApiError> {
    let digest = Digest::parse(sha256)?;
    let facts = match context.artifacts.judge(digest).await {
        Ok(facts) => facts,
        Err(ArtifactError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Some(refusal) = &facts.refusal {
        tracing::warn!(artifact = sha256, refusal, "a stored image is no system");
    }
    keep(context, sha256, &facts).await?;
    Ok(Some(facts))
}

/// Judges the images that were stored before this was done, so that the first use need not wait.
pub(crate) async fn judge_stored(context: Context) {
    let images = match context.store.unjudged_images().await {
        Ok(images) => images,
        Err(error) => {
            tracing::warn!(error = &*crate::chain(&error), "images could not be judged; each is at its first use");
            return;
        }
    };
    for sha256 in images {
        if context.stop.is_cancelled() {
            return;
        }
        match judge(&context, &sha256).await {
            Ok(Some(_)) => tracing::info!(artifact = sha256, "a stored image was judged"),
            Ok(None) => {}
            Err(error) => tracing::warn!(artifact = sha256, error = %error, "a stored image could not be judged"),
        }
    }
}
