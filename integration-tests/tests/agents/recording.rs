//! The files of a recording, `testdata/agent-N/SCENE/`, with N the version of the protocol.
//!
//! `1.bin`, `2.bin`, ... hold the messages of the agent's sessions, one after another, each with its length before it
//! (protobuf's delimited form). `1.json`, ... hold the same for people.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use integration_tests::dynamic::pool;
use integration_tests::process::workspace;
use marco_proto::v1::{ConnectRequest, Report, connect_request};
use prost::Message as _;
use prost_reflect::DynamicMessage;

/// Operations of which a recording holds the sessions.
pub(crate) const SCENES: [&str; 3] = ["update", "reboot", "power-off"];

/// Messages of one session, as their bytes went over the wire.
pub(crate) type Session = Vec<Bytes>;

/// Folder of a recording.
pub(crate) fn folder(version: u32) -> PathBuf {
    workspace().join("integration-tests/testdata").join(format!("agent-{version}"))
}

/// The messages as a JSON array, as `marcoctl` prints messages.
fn shown(session: &Session) -> Result<String> {
    let kind = pool()?.get_message_by_name("marco.bootstrap.v1.ConnectRequest").context("no ConnectRequest")?;
    let mut messages = Vec::new();
    for bytes in session {
        messages.push(serde_json::to_value(DynamicMessage::decode(kind.clone(), bytes.clone())?)?);
    }
    Ok(serde_json::to_string_pretty(&messages)? + "\n")
}

/// Writes the sessions of a scene.
pub(crate) fn write(version: u32, scene: &str, sessions: &[Session]) -> Result<()> {
    let folder = folder(version).join(scene);
    fs::create_dir_all(&folder)?;
    for (number, session) in (1..).zip(sessions) {
        let mut stream = Vec::new();
        for message in session {
            prost::encode_length_delimiter(message.len(), &mut stream)?;
            stream.extend_from_slice(message);
        }
        fs::write(folder.join(format!("{number}.bin")), stream)?;
        fs::write(folder.join(format!("{number}.json")), shown(session)?)?;
    }
    Ok(())
}

/// Reads the sessions of a scene.
pub(crate) fn read(version: u32, scene: &str) -> Result<Vec<Session>> {
    let folder = folder(version).join(scene);
    let mut sessions = Vec::new();
    while let Ok(stream) = fs::read(folder.join(format!("{}.bin", sessions.len() + 1))) {
        let (mut rest, mut session) = (Bytes::from(stream), Session::new());
        while !rest.is_empty() {
            let length = prost::decode_length_delimiter(&mut rest)?;
            ensure!(length <= rest.len(), "{}: a message is cut off", folder.display());
            session.push(rest.split_to(length));
        }
        sessions.push(session);
    }
    ensure!(!sessions.is_empty(), "no recording in {}", folder.display());
    Ok(sessions)
}

/// The report in a message; `None`: it is another one.
pub(crate) fn report(message: &[u8]) -> Result<Option<Report>> {
    Ok(match ConnectRequest::decode(message)?.message {
        Some(connect_request::Message::Report(report)) => Some(report),
        _ => None,
    })
}

#[test]
fn text_beside_a_recording_is_what_it_holds() -> Result<()> {
    for scene in SCENES {
        for (number, session) in (1..).zip(read(1, scene)?) {
            let text = fs::read_to_string(folder(1).join(scene).join(format!("{number}.json")))?;
            let (text, held): (Vec<serde_json::Value>, Vec<serde_json::Value>) =
                (serde_json::from_str(&text)?, serde_json::from_str(&shown(&session)?)?);
            assert_eq!(text, held, "{scene}/{number}.json");
        }
    }
    Ok(())
}
