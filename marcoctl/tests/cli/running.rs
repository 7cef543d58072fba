//! One run of `marcoctl`.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Stdout as the one JSON document that it must be.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// `marcoctl` with its connection, and without the tester's own settings.
pub(crate) fn command(address: SocketAddr, certs: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marcoctl"));
    for variable in ["MARCO_CONTROLLER", "MARCO_CERTS", "MARCO_IDENTITY", "MARCO_OUTPUT"] {
        command.env_remove(variable);
    }
    command.arg("--controller").arg(address.to_string()).arg("--certs").arg(certs).args(arguments);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs what needs no controller: there is none.
pub(crate) async fn alone(arguments: &[&str]) -> Run {
    marcoctl(SocketAddr::from(([127, 0, 0, 1], 9)), Path::new("/nonexistent"), arguments).await
}

/// Runs it to its end.
pub(crate) async fn marcoctl(address: SocketAddr, certs: &Path, arguments: &[&str]) -> Run {
    let output = tokio::time::timeout(Duration::from_secs(60), command(address, certs, arguments).output())
        .await
        .unwrap_or_else(|_| panic!("{arguments:?} did not end"))
        .unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
