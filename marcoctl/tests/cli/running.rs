//! Runs of `marcoctl`.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

/// Result of a run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Parses stdout as a single JSON document.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Builds the command with its connection flags, without the tester's own settings.
pub(crate) fn command(address: SocketAddr, certs: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marcoctl"));
    for variable in ["MARCO_CONTROLLER", "MARCO_CERTS", "MARCO_IDENTITY", "MARCO_OUTPUT"] {
        command.env_remove(variable);
    }
    command.arg("--controller").arg(address.to_string()).arg("--certs").arg(certs).args(arguments);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs a command that needs no controller.
pub(crate) async fn alone(arguments: &[&str]) -> Run {
    // Port 9 (discard) and a missing folder: a connection attempt would fail visibly.
    marcoctl(SocketAddr::from(([127, 0, 0, 1], 9)), Path::new("/nonexistent"), arguments).await
}

/// Runs a command that needs no controller as an unprivileged user. This process must be root. The program is copied to
/// a folder that the user can reach.
pub(crate) async fn as_nobody(folder: &Path, arguments: &[&str]) -> Run {
    let program = folder.join("marcoctl");
    std::fs::copy(env!("CARGO_BIN_EXE_marcoctl"), &program).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]).arg(program).args(arguments);
    command.stdin(Stdio::null()).kill_on_drop(true).current_dir(folder);
    ended(command, arguments).await
}

/// Runs a command that needs no controller at a pseudo-terminal. For each pair, the first text is awaited, and the
/// second one is typed. `stdout` contains everything shown.
pub(crate) async fn at_terminal(conversation: &[(&str, &str)], arguments: &[&str]) -> Run {
    let mut command = Command::new("python3");
    // Python's standard library has pseudo-terminals.
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/terminal.py"));
    command.arg(serde_json::to_string(conversation).unwrap()).arg(env!("CARGO_BIN_EXE_marcoctl")).args(arguments);
    command.stdin(Stdio::null()).kill_on_drop(true);
    ended(command, arguments).await
}

/// Runs the command to its end.
pub(crate) async fn marcoctl(address: SocketAddr, certs: &Path, arguments: &[&str]) -> Run {
    ended(command(address, certs, arguments), arguments).await
}

async fn ended(mut command: Command, arguments: &[&str]) -> Run {
    // A test must not hang: a question without an answer would wait forever.
    let output = tokio::time::timeout(Duration::from_secs(60), command.output())
        .await
        .unwrap_or_else(|_| panic!("{arguments:?} did not end"))
        .unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
