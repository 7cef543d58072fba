//! Progress displays: bars on a terminal, lines elsewhere.

mod live;

use std::collections::HashMap;
use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};
use marco_proto::v1::execution::State;
use marco_proto::v1::{Execution, ExecutionCounts, WatchOperationResponse};
use tonic::Status;

use crate::clock;
use crate::failure::Failure;
use crate::follow::Known;
use crate::output::{Out, clean, clock_time, enum_word, id};
use live::Live;

/// Templates for a file, with and without a known total.
const FILE: &str = "{msg:9} [{bar:32}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
const FILE_COUNT: &str = "{msg:9} {spinner} {binary_bytes}";

/// Display of an operation that is followed.
#[derive(Debug)]
pub(crate) enum View {
    /// One line per node on stderr, a terminal. The lines change in place.
    Live(Box<Live>),
    /// One line on stdout per change.
    Lines(Lines),
    /// One line of JSON on stdout per message.
    Json,
    /// No display.
    Silent,
}

impl View {
    /// Chooses the display for `--wait`. With JSON output, stdout is reserved for the final document.
    pub(crate) fn for_wait(out: &Out) -> Self {
        match (std::io::stderr().is_terminal(), out.is_json()) {
            (true, _) => Self::Live(Box::default()),
            (false, false) => Self::Lines(Lines::default()),
            (false, true) => Self::Silent,
        }
    }

    /// Chooses the display for `watch`. Bars are used only if no program reads the output.
    pub(crate) fn for_watch(out: &Out) -> Self {
        // A redirected stdout expects the lines: they are this command's output.
        let terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        match (out.is_json(), terminal) {
            (true, _) => Self::Json,
            (false, true) => Self::Live(Box::default()),
            (false, false) => Self::Lines(Lines::default()),
        }
    }

    /// Returns true if the display writes to stdout.
    pub(crate) fn is_for_stdout(&self) -> bool {
        matches!(self, Self::Lines(_) | Self::Json)
    }

    /// Shows a message. `known` must already contain it.
    pub(crate) fn update(
        &mut self,
        message: &WatchOperationResponse,
        known: &Known,
        out: &mut Out,
    ) -> Result<(), Failure> {
        match self {
            Self::Live(live) => {
                live.update(message, known);
                Ok(())
            }
            Self::Lines(lines) => lines.update(message, out),
            Self::Json => out.json_line(message),
            Self::Silent => Ok(()),
        }
    }

    /// Shows the reasons for waiting while no node is at work.
    pub(crate) fn waits(&mut self, text: &str, out: &mut Out) -> Result<(), Failure> {
        match self {
            Self::Live(live) => {
                live.waits(text);
                Ok(())
            }
            Self::Lines(_) => out.line(&format!("{}  {text}", clock_time(clock::now()))),
            Self::Json | Self::Silent => Ok(()),
        }
    }

    /// Shows that the connection broke and is retried.
    pub(crate) fn lost(&mut self, status: &Status) {
        if let Self::Live(live) = self {
            live.lost(status);
        }
    }

    /// Removes everything that changes in place. Lines stay.
    pub(crate) fn finish(&mut self) {
        if let Self::Live(live) = self {
            live.finish();
        }
    }
}

/// Display with one line per change.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    operation: String,
    nodes: HashMap<String, String>,
}

impl Lines {
    fn update(&mut self, message: &WatchOperationResponse, out: &mut Out) -> Result<(), Failure> {
        let time = clock_time(clock::now());
        for execution in &message.executions {
            let text = describe(execution);
            // The controller repeats executions whose byte counts moved. Without counts the text is the same.
            if self.nodes.get(&execution.node) != Some(&text) {
                out.line(&format!("{time}  {}  {text}", clean(&id(&execution.node))))?;
                self.nodes.insert(execution.node.clone(), text);
            }
        }
        if let Some(operation) = &message.operation {
            let text = enum_word(operation.state().as_str_name(), "STATE_");
            if self.operation != text {
                out.line(&format!("{time}  {}  {text}", clean(&operation.name)))?;
                self.operation = text;
            }
        }
        Ok(())
    }
}

/// Describes the state of an execution without numbers, so the text changes only with the state.
pub(crate) fn describe(execution: &Execution) -> String {
    let mut text = enum_word(execution.state().as_str_name(), "STATE_");
    let waits = enum_word(execution.wait_reason().as_str_name(), "WAIT_REASON_");
    if execution.state() == State::Pending && !waits.is_empty() {
        text = format!("{text} ({})", waits.to_lowercase().replace('_', " "));
    }
    if execution.overdue {
        text.push_str(" OVERDUE");
    }
    // The phase of a finished execution is history.
    if !execution.phase.is_empty() && !is_final(execution.state()) {
        text = format!("{text}  {}", clean(&execution.phase));
    }
    if let Some(error) = &execution.error {
        text = format!("{text}  {}: {}", clean(&error.reason), clean(&error.message));
    }
    text
}

/// Returns true for a final state of an execution.
pub(crate) fn is_final(state: State) -> bool {
    matches!(state, State::Succeeded | State::Failed | State::RolledBack | State::Cancelled | State::Expired)
}

/// Formats the number of finished nodes, and the counts of everything that went wrong.
pub(crate) fn done_of(counts: &ExecutionCounts) -> String {
    let done = counts.succeeded + counts.failed + counts.rolled_back + counts.cancelled + counts.expired;
    let mut text = format!("{done}/{}", counts.total);
    let bad = [
        (counts.failed, "failed"),
        (counts.rolled_back, "rolled back"),
        (counts.cancelled, "cancelled"),
        (counts.expired, "expired"),
        (counts.overdue, "overdue"),
    ];
    let bad: Vec<String> =
        bad.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if !bad.is_empty() {
        text = format!("{text} ({})", bad.join(", "));
    }
    text
}

/// Creates a bar for the bytes of one file.
pub(crate) fn byte_bar(what: &str, total: u64) -> ProgressBar {
    // indicatif draws nothing if stderr is not a terminal.
    let bar = ProgressBar::new(total).with_message(what.to_owned());
    bar.set_style(style(FILE).progress_chars("=> "));
    bar
}

/// The current step on one line of a terminal. Hidden elsewhere. The line disappears on drop.
#[derive(Debug)]
pub(crate) struct Steps(ProgressBar);

impl Steps {
    /// Starts without a visible step.
    pub(crate) fn start() -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(std::time::Duration::from_millis(100));
        Self(bar)
    }

    /// Shows a step.
    pub(crate) fn now(&self, what: &str) {
        self.0.set_message(clean(what));
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Turns a bar into a byte count without a total.
pub(crate) fn count_bytes(bar: &ProgressBar, what: &str, done: u64) {
    bar.set_style(style(FILE_COUNT));
    bar.unset_length();
    bar.set_message(what.to_owned());
    bar.set_position(done);
}

fn style(template: &'static str) -> ProgressStyle {
    // The templates are constants of this file, and a test parses each of them.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use indicatif::ProgressStyle;
    use marco_proto::v1::execution::{State, WaitReason};
    use marco_proto::v1::{Execution, ExecutionCounts};

    use super::{FILE, FILE_COUNT, describe, done_of};

    #[test]
    fn every_template_can_be_drawn() {
        for template in [FILE, FILE_COUNT] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn a_state_is_told_with_what_it_waits_for_or_does() {
        let mut execution = Execution { state: State::Pending.into(), ..Default::default() };
        execution.wait_reason = WaitReason::NodeOffline.into();
        assert_eq!(describe(&execution), "PENDING (node offline)");
        let mut execution = Execution { state: State::Running.into(), ..Default::default() };
        execution.phase = "unpacking".to_owned();
        assert_eq!(describe(&execution), "RUNNING  unpacking");
        execution.overdue = true;
        assert_eq!(describe(&execution), "RUNNING OVERDUE  unpacking");
        execution.state = State::Succeeded.into();
        execution.overdue = false;
        assert_eq!(describe(&execution), "SUCCEEDED");
    }

    #[test]
    fn counts_name_only_what_went_wrong() {
        let counts = ExecutionCounts { total: 4, succeeded: 2, failed: 1, active: 1, ..Default::default() };
        assert_eq!(done_of(&counts), "3/4 (1 failed)");
        assert_eq!(done_of(&ExecutionCounts { total: 1, ..Default::default() }), "0/1");
    }
}
