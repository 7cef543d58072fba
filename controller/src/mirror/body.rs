//! The bytes of an answer, read as the connection takes them.

use std::io;
use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::{Stream, try_unfold};
use marco_proto::names::MESSAGE_SIZE;
use tokio::time::Instant;

use super::{Asked, Mirror, Unserved};
use crate::artifacts::BlobReader;
use crate::identity::Denied;
use crate::identity::peer_log::of_peer;
use crate::store::ArtifactRow;

/// The client that reads a file.
pub(super) struct Reader {
    pub(super) mirror: Mirror,
    pub(super) asked: Asked,
    pub(super) row: ArtifactRow,
}

impl Reader {
    /// True if the client may still read. While the database is away, an admitted client goes on.
    async fn may_go_on(&self) -> bool {
        let refused = match self.mirror.access.admit_file(Some(&self.asked.peer)).await {
            Ok(caller) => self.mirror.check(&caller, &self.row).await.err(),
            Err((denied, _)) => Some(denied.into()),
        };
        matches!(refused, None | Some(Unserved::Denied(Denied::Unavailable) | Unserved::Database(_)))
    }
}

struct State {
    file: BlobReader,
    left: Range<u64>,
    reader: Reader,
    checked: Instant,
}

/// A part of a file. The stream ends with an error, and with it the connection, when the client may no longer read.
pub(super) fn bytes(
    file: BlobReader,
    range: Range<u64>,
    reader: Reader,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let state = State { file, left: range, reader, checked: Instant::now() };
    try_unfold(state, |mut state| async move {
        if state.left.is_empty() {
            return Ok(None);
        }
        // A download of an image takes minutes to hours: a revoked certificate or a finished execution must end it.
        if state.checked.elapsed() >= state.reader.mirror.patience.recheck {
            state.checked = Instant::now();
            if !state.reader.may_go_on().await {
                let caller = state.reader.asked.caller.name.as_str();
                of_peer!(warn, caller, caller, "a download is cut: its reader may not have it any more");
                return Err(io::ErrorKind::PermissionDenied.into());
            }
        }
        let length = usize::try_from(state.left.end - state.left.start).unwrap_or(MESSAGE_SIZE).min(MESSAGE_SIZE);
        let data = state.file.read_chunk(state.left.start, length).await.map_err(|error| {
            let caller = state.reader.asked.caller.name.as_str();
            of_peer!(error, caller, error = &*crate::chain(&error), "the artifact store failed");
            io::Error::other(error)
        })?;
        // A range beyond the end of the file would otherwise make a stream without an end.
        if data.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.left.start += u64::try_from(data.len()).unwrap_or(u64::MAX);
        Ok(Some((data, state)))
    })
}
