//! `marco/join.toml`: controller addresses and token for a card that was never online.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::durable;

const FILE: &str = "marco/join.toml";
const FILE_MODE: u32 = 0o600;

/// Contents of a join file.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JoinFile {
    /// Controller addresses, host:port.
    pub controllers: Vec<String>,
    /// Addresses of enrolment listeners, host:port, one or a list. Empty: the controllers' hosts, port 1347.
    #[serde(deserialize_with = "one_or_more")]
    pub enroll: Vec<String>,
    /// The join token. Empty after its use.
    pub token: String,
    /// The id to ask for. Empty: derived from the serial number.
    pub name: String,
}

impl std::fmt::Debug for JoinFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the token: debug output may be logged.
        f.debug_struct("JoinFile")
            .field("controllers", &self.controllers)
            .field("enroll", &self.enroll)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A join file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// It could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// The operation that failed, as a verb: `read`, `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// It is not a valid join file. The error does not quote the text, which may hold a token.
    #[error("{path}, line {line}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// Description of the error.
        message: String,
    },
}

impl JoinFile {
    /// The first join file in these boot partitions, with its path. `None`: none of them has one.
    pub fn find(partitions: &[PathBuf]) -> Result<Option<(PathBuf, Self)>, JoinError> {
        for partition in partitions {
            let path = partition.join(FILE);
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    let file = toml::from_str(&text).map_err(|error| {
                        let start = error.span().map_or(0, |span| span.start);
                        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count().saturating_add(1);
                        JoinError::Syntax { path: path.clone(), line, message: error.message().to_owned() }
                    })?;
                    return Ok(Some((path, file)));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(JoinError::Io { doing: "read", path, source }),
            }
        }
        Ok(None)
    }

    /// Removes the token from the file at `path`. The rest stays unchanged.
    pub fn forget_token(path: &Path) -> Result<(), JoinError> {
        let io = |doing| {
            let path = path.to_owned();
            move |source| JoinError::Io { doing, path, source }
        };
        // Edited as text: an owner's comments would be lost if the file were parsed and written again.
        let text = std::fs::read_to_string(path).map_err(io("read"))?;
        let mut kept: String = text.split_inclusive('\n').filter(|line| !names_token(line)).collect();
        // A token that spans lines would leave its tail behind, so then the whole file is emptied.
        if toml::from_str::<Self>(&kept).is_ok_and(|file| file.token.is_empty()) {
            if kept == text {
                return Ok(());
            }
        } else {
            kept = String::new();
        }
        durable::replace(path, kept.as_bytes(), FILE_MODE).map_err(io("write"))
    }
}

fn one_or_more<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMore {
        One(String),
        More(Vec<String>),
    }
    Ok(match OneOrMore::deserialize(deserializer)? {
        OneOrMore::One(text) if text.is_empty() => Vec::new(),
        OneOrMore::One(text) => vec![text],
        OneOrMore::More(list) => list,
    })
}

fn names_token(line: &str) -> bool {
    let Some(rest) = line.trim_start().strip_prefix("token") else { return false };
    rest.trim_start().starts_with('=')
}
