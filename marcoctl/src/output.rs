//! Output on stdout: tables for people, the API's messages as JSON for programs.

mod text;

use std::io::{self, Write as _};

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use marco_proto::v1;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde::Serialize;
use serde_json::Value;

use crate::args::Format;
use crate::failure::Failure;

pub(crate) use text::{
    ago, bytes, clean, clock_time, enum_word, fields, id, in_local_time, labels, listing, local, span, table,
    timestamp, timestamp_of,
};

/// A message of the API that can be printed as JSON.
pub(crate) trait Printable: prost::Message {
    /// Name of the message in package `marco.bootstrap.v1`.
    const NAME: &'static str;
}

macro_rules! printable {
    ($($name:ident)*) => {
        $(impl Printable for v1::$name {
            const NAME: &'static str = stringify!($name);
        })*
    };
}

printable! {
    ApiToken Artifact Certificate CheckOperationResponse DeleteArtifactResponse DeleteNodeResponse DeleteScheduleResponse Execution ExecutionLog ExplainExecutionResponse JoinToken
    ListApiTokensResponse ListArtifactsResponse ListAuditEventsResponse ListCertificatesResponse ListEventsResponse ListExecutionsResponse ListFiresResponse ListJoinTokensResponse ListNodesResponse
    ListOperationsResponse ListSchedulesResponse ListUsersResponse Node Operation PreviewScheduleResponse Schedule User WatchNodesResponse WatchOperationResponse
}

/// Stdout, in the requested format.
#[derive(Debug)]
pub(crate) struct Out {
    format: Format,
    now: DateTime<Utc>,
    /// True after the reader closed the pipe, for example `head`. This is not an error, and the command goes on.
    closed: bool,
}

impl Out {
    /// Creates an output in this format. Ages are relative to `now`.
    pub(crate) fn new(format: Format, now: DateTime<Utc>) -> Self {
        Self { format, now, closed: false }
    }

    /// Returns true for JSON output.
    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Returns true if the reader closed the pipe.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Writes the single document of a command: the message as JSON, or the text made by `table` for this time.
    pub(crate) fn document<M: Printable>(
        &mut self,
        message: &M,
        table: impl FnOnce(&M, DateTime<Utc>) -> String,
    ) -> Result<(), Failure> {
        if self.is_json() {
            let value = json(message)?;
            let text = serde_json::to_string_pretty(&value).context("JSON cannot be written")?;
            self.line(&text)
        } else {
            let text = table(message, self.now);
            self.line(text.trim_end_matches('\n'))
        }
    }

    /// Writes a value that is not a message of the API: as JSON, or as the text made by `table`.
    pub(crate) fn value<T: Serialize>(&mut self, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        let text = if self.is_json() {
            serde_json::to_string_pretty(value).context("JSON cannot be written")?
        } else {
            table(value)
        };
        self.line(text.trim_end_matches('\n'))
    }

    /// Writes several messages as an array in one field, like a list response.
    pub(crate) fn documents<M: Printable>(&mut self, field: &str, messages: &[M]) -> Result<(), Failure> {
        let values = messages.iter().map(json).collect::<Result<Vec<_>, _>>()?;
        let text = serde_json::to_string_pretty(&Value::Object(
            [(field.to_owned(), Value::Array(values))].into_iter().collect(),
        ))
        .context("JSON cannot be written")?;
        self.line(&text)
    }

    /// Writes a message as one line of JSON, for streams.
    pub(crate) fn json_line<M: Printable>(&mut self, message: &M) -> Result<(), Failure> {
        // A single line per message, so that a program can split the stream at line feeds.
        let text = json(message)?.to_string();
        self.line(&text)
    }

    /// Writes and flushes a line.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        if self.closed {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        // Flushed per line: the reader may be a program that follows a watch.
        match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            done => done.context("cannot write to stdout").map_err(Failure::from),
        }
    }
}

/// Converts a message to protobuf's JSON mapping, with default values and enum names. The page token of a list is
/// dropped, because the output contains all pages.
fn json<M: Printable>(message: &M) -> Result<Value, Failure> {
    let value = mapped(message).with_context(|| format!("{} cannot be written as JSON", M::NAME))?;
    Ok(value)
}

fn mapped<M: Printable>(message: &M) -> anyhow::Result<Value> {
    let pool = pool()?;
    let descriptor =
        pool.get_message_by_name(&format!("marco.bootstrap.v1.{}", M::NAME)).context("the API has no such message")?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())?;
    // Defaults are written: a script should not have to distinguish a missing field from a zero.
    let options = SerializeOptions::new().skip_default_fields(false);
    let mut value = dynamic.serialize_with_options(serde_json::value::Serializer, &options)?;
    if let Value::Object(fields) = &mut value {
        fields.remove("nextPageToken");
    }
    Ok(value)
}

/// Returns the API's descriptors, decoded only once: a watch writes thousands of lines.
fn pool() -> anyhow::Result<&'static DescriptorPool> {
    // `get_or_try_init` is not stable, so a race may decode twice. Both results are equal.
    static POOL: std::sync::OnceLock<DescriptorPool> = std::sync::OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = DescriptorPool::decode(marco_proto::DESCRIPTOR_SET)?;
    Ok(POOL.get_or_init(|| pool))
}

#[cfg(test)]
mod tests {
    use marco_proto::v1;
    use serde_json::json;

    use super::mapped;

    #[test]
    fn an_empty_list_is_an_empty_array_and_nothing_else() {
        assert_eq!(mapped(&v1::ListNodesResponse::default()).unwrap(), json!({ "nodes": [] }));
        assert_eq!(mapped(&v1::ListJoinTokensResponse::default()).unwrap(), json!({ "joinTokens": [] }));
    }

    #[test]
    fn defaults_are_written_and_enums_have_names() {
        let execution = v1::Execution { state: v1::execution::State::RolledBack.into(), ..Default::default() };
        let value = mapped(&execution).unwrap();
        assert_eq!(value["state"], "STATE_ROLLED_BACK");
        assert_eq!(value["waitReason"], "WAIT_REASON_UNSPECIFIED");
        assert_eq!(value["overdue"], false);
        assert_eq!(value["bytesDone"], "0");
    }

    #[test]
    fn a_new_token_has_its_secret_in_the_field_token() {
        let token = v1::JoinToken { token: "secret".to_owned(), ..Default::default() };
        assert_eq!(mapped(&token).unwrap()["token"], "secret");
    }
}
