//! Programs of the machine: by their absolute paths, with no shell, no input, and a time-out.

use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};

use super::SystemError;

/// Characters of a program's last words that are kept.
const WORDS: usize = 300;

/// Runs a program to its end. What it prints on its standard output is thrown away.
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

/// Runs a program whose exit status is an answer, to its end: that status, `None` after a signal, and what it printed on
/// its standard output, of which little is expected.
pub(crate) async fn output(command: &[&str], time: Duration) -> Result<(Option<i32>, String), SystemError> {
    let Some((program, arguments)) = command.split_first() else { return Ok((None, String::new())) };
    let output = finish(Command::new(program).args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()), time).await;
    let failed = |message: String| SystemError::Command { program: (*program).to_owned(), message };
    let output = output.map_err(failed)?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Runs a command without input to its end; the error says why it has none.
async fn finish(command: &mut Command, time: Duration) -> Result<Output, String> {
    let child = command.stdin(Stdio::null()).kill_on_drop(true).spawn().map_err(|error| error.to_string())?;
    let ended = tokio::time::timeout(time, child.wait_with_output()).await;
    ended.map_err(|_| format!("no end within {} s", time.as_secs()))?.map_err(|error| error.to_string())
}

/// Starts a program that goes on until it is dropped.
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

/// Runs a program on the console until whoever sits there ends it.
pub(crate) async fn on_console(command: &[&str]) -> Result<(), SystemError> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let failed =
        |error: std::io::Error| SystemError::Command { program: (*program).to_owned(), message: error.to_string() };
    let mut child = Command::new(program).args(arguments).kill_on_drop(true).spawn().map_err(failed)?;
    child.wait().await.map(|_| ()).map_err(failed)
}
