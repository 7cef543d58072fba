//! The log lines that go with the report of a job that did not succeed.

use std::sync::Arc;

use marco_proto::names::LOG_MAX;
use marco_proto::v1::Report;

use super::Session;
use crate::job::State;
use crate::journal::{Entries, Entry};
use crate::system::STARTED_AGAIN;

/// Reports of a Hello that carry a log, those of the newest jobs: all of them could be too much for one message.
const IN_HELLO: usize = 4;
/// The middle of every execution's name, and of hardly any other text.
const EXECUTION: &[u8] = b"/executions/";

/// Reads everything that the machine has logged. Blocking.
#[derive(Clone)]
pub struct KeptLog(Arc<dyn Fn() -> Vec<u8> + Send + Sync>);

impl KeptLog {
    /// Creates a source that calls this function.
    pub fn new(read: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }
}

impl std::fmt::Debug for KeptLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeptLog")
    }
}

impl Session {
    /// Adds the lines that were logged of a job that did not succeed. They are read for each report, and no copy is
    /// kept: they stay in the log.
    pub(super) async fn add_log(&self, entry: &Entry, report: &mut Report) {
        if !matches!(entry.state, State::Failed | State::RolledBack) {
            return;
        }
        let (log, execution) = (self.log.clone(), entry.execution.clone());
        let read = tokio::task::spawn_blocking(move || last_lines(&(log.0)(), &execution));
        // Best effort: the report itself has the reason.
        (report.log, report.log_cut) = read.await.unwrap_or_default();
    }

    /// Adds logs to the newest reports of a Hello.
    pub(super) async fn add_logs(&self, entries: &Entries, reports: &mut [Report]) {
        let mut added = 0;
        for report in reports.iter_mut().rev() {
            let Some(entry) = entries.get(&report.execution).filter(|_| added < IN_HELLO) else { continue };
            self.add_log(entry, report).await;
            added += usize::from(!report.log.is_empty());
        }
    }
}

/// Returns the newest lines of a log that tell of an execution, as many as a report may carry, and whether older ones
/// were left out. They begin after the last start of the agent, or the last line of another execution, before the first
/// line that names this one. They end before the next line of another execution. Empty if no line names it.
fn last_lines(log: &[u8], execution: &str) -> (String, bool) {
    let lines: Vec<&[u8]> = log.split_inclusive(|byte| *byte == b'\n').collect();
    let has = |line: &[u8], what: &[u8]| line.windows(what.len()).any(|window| window == what);
    let ours = |line: &&[u8]| has(line, execution.as_bytes());
    let others = |line: &&[u8]| has(line, EXECUTION) && !ours(line);
    let (Some(first), Some(last)) = (lines.iter().position(ours), lines.iter().rposition(ours)) else {
        return (String::new(), false);
    };
    // Lines without a name before the first one belong to it, too: the card and the network are found first.
    let before = lines.get(..first).unwrap_or_default();
    let begin =
        before.iter().rposition(|line| others(line) || *line == STARTED_AGAIN.as_bytes()).map_or(0, |at| at + 1);
    let after = lines.get(last..).unwrap_or_default();
    let end = after.iter().position(others).map_or(lines.len(), |at| last + at);

    let mut newest = Vec::new();
    let mut length = 0;
    let told = lines.get(begin..end).unwrap_or_default();
    for line in told.iter().rev() {
        let mut line = String::from_utf8_lossy(line).into_owned();
        if !line.ends_with('\n') {
            line.push('\n');
        }
        // Counted as it is sent: a byte that is no UTF-8 becomes three.
        length += line.len();
        if length > LOG_MAX {
            break;
        }
        newest.push(line);
    }
    let cut = newest.len() < told.len();
    newest.reverse();
    (newest.concat(), cut)
}

#[cfg(test)]
mod tests {
    use super::{LOG_MAX, last_lines};

    const ONE: &str = "operations/1/executions/pi-01";
    const TWO: &str = "operations/2/executions/pi-01";

    fn lines(log: &str, execution: &str) -> String {
        last_lines(log.as_bytes(), execution).0
    }

    #[test]
    fn the_lines_of_an_execution_begin_with_its_boot_and_end_before_the_next_execution() {
        let log = format!(
            "network up\n{ONE} begins\nsomething\n{ONE} fails\n--- started again ---\ncard found\n{TWO} begins\n\
             {TWO} fails\nwaiting\noperations/3/executions/pi-01 begins"
        );
        assert_eq!(
            lines(&log, ONE),
            format!("network up\n{ONE} begins\nsomething\n{ONE} fails\n--- started again ---\ncard found\n")
        );
        assert_eq!(lines(&log, TWO), format!("card found\n{TWO} begins\n{TWO} fails\nwaiting\n"));
        let third = "operations/3/executions/pi-01";
        assert_eq!(lines(&log, third), format!("waiting\n{third} begins\n"));
        assert_eq!(last_lines(log.as_bytes(), "operations/4/executions/pi-01"), (String::new(), false));
    }

    #[test]
    fn an_execution_that_is_tried_in_several_boots_has_all_of_them() {
        let log = format!("{ONE} first\n--- started again ---\n{ONE} second\n\u{fffd}\n");
        assert_eq!(lines(&log, ONE), log);
        assert_eq!(lines("\u{0}", ONE), "");
    }

    #[test]
    fn of_a_long_log_the_newest_whole_lines_go() {
        let log: String = (0..10_000).map(|number| format!("{number} {ONE}\n")).collect();
        let (text, cut) = last_lines(log.as_bytes(), ONE);
        assert!(cut && text.len() <= LOG_MAX && text.len() > LOG_MAX - 100);
        assert!(text.ends_with(&format!("9999 {ONE}\n")) && text.lines().all(|line| line.ends_with(ONE)), "{text}");
        // Replacement characters make the text longer than the log.
        let wild = [ONE.as_bytes(), b"\n", &[0xff; 20_000], b"\nend\n"].concat();
        assert_eq!(last_lines(&wild, ONE), ("end\n".to_owned(), true));
    }
}
