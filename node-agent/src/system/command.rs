//! Programs of the machine, run by absolute path, without a shell, without input, and with a time limit.

use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};

use super::SystemError;

/// Characters of a program's standard error that are kept.
const WORDS: usize = 300;

/// Runs a program to its end. Its standard output is discarded.
pub(crate) async fn run(command: &[&str], time: Duration) -> Result<(), SystemError> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let output = finish(Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()), time).await;
    let failed = |message: String| SystemError::Command { program: (*program).to_owned(), message };
    let output = output.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let words: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(WORDS).collect();
    Err(failed(format!("{}: {words}", output.status)))
}

/// Runs a program whose exit status is an answer. Returns the status (`None` after a signal) and its standard output,
/// which is expected to be short.
pub(crate) async fn output(command: &[&str], time: Duration) -> Result<(Option<i32>, String), SystemError> {
    let Some((program, arguments)) = command.split_first() else { return Ok((None, String::new())) };
    let output = finish(Command::new(program).args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()), time).await;
    let failed = |message: String| SystemError::Command { program: (*program).to_owned(), message };
    let output = output.map_err(failed)?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Runs a command without input to its end. The error tells the reason that it did not end by itself.
async fn finish(command: &mut Command, time: Duration) -> Result<Output, String> {
    // A dropped future (a time-out, a cancelled job) must not leave the program running.
    let child = command.stdin(Stdio::null()).kill_on_drop(true).spawn().map_err(|error| error.to_string())?;
    let ended = tokio::time::timeout(time, child.wait_with_output()).await;
    ended.map_err(|_| format!("no end within {} s", time.as_secs()))?.map_err(|error| error.to_string())
}

/// Starts a program that runs until the returned value is dropped.
pub(crate) fn start(command: &[&str]) -> Result<Child, SystemError> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(SystemError::Unsupported("there is no program to start"));
    };
    let failed =
        |error: std::io::Error| SystemError::Command { program: (*program).to_owned(), message: error.to_string() };
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)
}

/// Runs a program on the console until its user ends it. No time limit.
pub(crate) async fn on_console(command: &[&str]) -> Result<(), SystemError> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let failed =
        |error: std::io::Error| SystemError::Command { program: (*program).to_owned(), message: error.to_string() };
    let mut child = Command::new(program).args(arguments).kill_on_drop(true).spawn().map_err(failed)?;
    child.wait().await.map(|_| ()).map_err(failed)
}
