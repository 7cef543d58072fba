//! Facts of images: examined at the push, or for images from before that at their first use.

use std::time::Duration;

use marco_archive::Facts;

use crate::api::Context;
use crate::api::status::ApiError;
use crate::artifacts::{ArtifactError, Digest};
use crate::store::ArtifactRow;

/// Time for which a caller waits for the first examination of an image; it goes on without the caller.
const PATIENCE: Duration = Duration::from_secs(10);

/// Stores the facts of an image.
pub(super) async fn keep(context: &Context, sha256: &str, facts: &Facts) -> Result<(), ApiError> {
    let text = serde_json::to_string(facts).map_err(|error| ApiError::Internal(error.to_string()))?;
    context.store.put_facts(sha256, &text).await?;
    Ok(())
}

/// The facts of an image; `None`: it was not examined. Unreadable facts count as none.
pub(super) async fn known(context: &Context, sha256: &str) -> Result<Option<Facts>, ApiError> {
    let text = context.store.facts(sha256).await?;
    // They may be of another release; the image is then examined again.
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// The facts of an image, which is examined now if it never was. `None`: its bytes are not here.
///
/// # Errors
/// Returns `Aborted` while a large image is still being examined, and errors of the store and the disk.
pub(in crate::api) async fn facts_of(context: &Context, row: &ArtifactRow) -> Result<Option<Facts>, ApiError> {
    if let Some(facts) = known(context, &row.sha256).await? {
        return Ok(Some(facts));
    }
    let (judging, sha256) = (context.clone(), row.sha256.clone());
    // A task, so that the work is not lost when the caller stops waiting.
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

/// Examines the images from before examinations, so that their first use need not wait.
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
