//! Asks the operator before an action that is probably a mistake.
//!
//! A command collects its doubts as sentences and passes them to [`unless_forced`], with the flag `--force` of
//! [`Force`]. Doubts are about actions that are allowed but rarely meant. A wrong argument is an error, not a doubt.

use std::io::{self, IsTerminal as _, Write as _};

use clap::Args;

use crate::failure::Failure;
use crate::output::clean;

/// The flag that answers every question with yes.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct Force {
    /// Do it although it looks like a mistake; without a terminal there is no question to answer
    #[arg(long)]
    pub(crate) force: bool,
}

/// Prints each doubt to stderr and asks for confirmation unless `force` is set. Without doubts nothing is printed.
///
/// # Errors
/// Returns an error with exit code 1 if the answer is not "yes", or if there is no terminal for the question.
pub(crate) fn unless_forced(doubts: &[String], force: Force) -> Result<(), Failure> {
    // Both ends must be terminals: a question in a log file would wait forever for its answer.
    let can_ask = io::stdin().is_terminal() && io::stderr().is_terminal();
    decide(doubts, force.force, || {
        if !can_ask {
            return Ok(None);
        }
        say("Write \"yes\" to go on all the same: ");
        read_line().map(Some)
    })
}

/// Prints the doubts and decides. `ask` returns `None` without a terminal.
fn decide(
    doubts: &[String],
    force: bool,
    ask: impl FnOnce() -> Result<Option<String>, Failure>,
) -> Result<(), Failure> {
    for doubt in doubts {
        say(&format!("warning: {}\n", clean(doubt)));
    }
    // With --force the doubts are still printed, for example to the log of a script.
    if doubts.is_empty() || force {
        return Ok(());
    }
    match ask()? {
        // The whole word: a single letter is typed too easily.
        Some(answer) if answer.trim() == "yes" => Ok(()),
        Some(_) => Err(Failure::Unsuccessful { message: "nothing was done".to_owned(), hint: String::new() }),
        None => Err(Failure::Unsuccessful {
            message: "nothing was done, because of the warnings above".to_owned(),
            hint: "--force does it all the same; on a terminal you would be asked".to_owned(),
        }),
    }
}

/// Reads a line including its end. Empty at the end of input.
pub(crate) fn read_line() -> Result<String, Failure> {
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    Ok(line)
}

/// Writes to stderr and ignores errors.
pub(crate) fn say(text: &str) {
    // A closed stderr is no reason to stop.
    let _ = io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::decide;
    use crate::failure::Failure;

    fn answer(doubts: &[&str], force: bool, answer: Option<&str>) -> (Result<(), Failure>, bool) {
        let doubts: Vec<String> = doubts.iter().map(|doubt| (*doubt).to_owned()).collect();
        let mut asked = false;
        let outcome = decide(&doubts, force, || {
            asked = true;
            Ok(answer.map(str::to_owned))
        });
        (outcome, asked)
    }

    #[test]
    fn without_doubts_nobody_is_asked() {
        let (outcome, asked) = answer(&[], false, None);
        assert!(outcome.is_ok() && !asked);
    }

    #[test]
    fn only_yes_means_yes() {
        assert!(answer(&["odd"], false, Some("yes\n")).0.is_ok());
        for no in ["", "\n", "y\n", "no\n", "yes please\n"] {
            let failure = answer(&["odd"], false, Some(no)).0.unwrap_err();
            assert_eq!(failure.exit_code(), 1, "{no:?}");
        }
    }

    #[test]
    fn without_a_terminal_only_force_goes_on() {
        let failure = answer(&["odd"], false, None).0.unwrap_err();
        assert_eq!(failure.exit_code(), 1);
        assert!(failure.report().contains("--force"), "{}", failure.report());
        let (outcome, asked) = answer(&["odd"], true, None);
        assert!(outcome.is_ok() && !asked);
    }
}
