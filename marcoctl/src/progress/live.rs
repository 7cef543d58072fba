//! Display that changes in place, with one line per node.

use std::collections::BTreeMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget};
use marco_proto::v1::WatchOperationResponse;
use marco_proto::v1::execution::State;
use tonic::Status;

use super::{describe, done_of, is_final, style};
use crate::follow::Known;
use crate::output::{clean, enum_word, id};

/// Maximum number of lines. With more nodes, only those at work get a line, and the header counts the rest.
const ROWS: usize = 16;
/// Template of the line above the nodes.
const HEADER: &str = "{spinner} {msg} {elapsed}";
/// Templates of a node's line, without and with a byte count.
const ROW: &str = "  {prefix}  {msg}";
const ROW_BYTES: &str = "  {prefix}  {msg} [{bar:24}] {binary_bytes}/{binary_total_bytes}";
/// Interval at which bars move by themselves, so that a long step does not look like a hang.
const TICK: Duration = Duration::from_millis(200);

/// Display with one line per node.
#[derive(Debug)]
pub(crate) struct Live {
    multi: MultiProgress,
    header: ProgressBar,
    rows: BTreeMap<String, ProgressBar>,
}

impl Default for Live {
    fn default() -> Self {
        Self::on(ProgressDrawTarget::stderr())
    }
}

impl Live {
    fn on(target: ProgressDrawTarget) -> Self {
        let multi = MultiProgress::with_draw_target(target);
        let header = multi.add(ProgressBar::no_length().with_style(style(HEADER)));
        header.enable_steady_tick(TICK);
        Self { multi, header, rows: BTreeMap::new() }
    }

    /// Shows the reasons for waiting while no node is at work.
    pub(super) fn waits(&self, text: &str) {
        self.header.set_message(format!("waits: {text}"));
    }

    /// Shows that the connection broke and is retried.
    pub(super) fn lost(&self, status: &Status) {
        self.header.set_message(format!("connection lost, trying again ({})", clean(status.message())));
    }

    /// Removes all lines.
    pub(super) fn finish(&self) {
        // A dropped bar would draw itself once more.
        for row in self.rows.values() {
            row.finish_and_clear();
        }
        self.header.finish_and_clear();
    }

    /// Shows a message. `known` must already contain it.
    pub(super) fn update(&mut self, message: &WatchOperationResponse, known: &Known) {
        let operation = &known.operation;
        let counts = operation.counts.unwrap_or_default();
        let state = enum_word(operation.state().as_str_name(), "STATE_");
        self.header.set_message(format!("{} {state} {}", clean(&operation.name), done_of(&counts)));

        let few = known.executions.len() <= ROWS;
        let width = known.executions.keys().map(|node| id(node).len()).max().unwrap_or(0);
        for execution in &message.executions {
            // Pending nodes have nothing to show, and hundreds of them would fill the screen.
            let is_shown = few || (!is_final(execution.state()) && execution.state() != State::Pending);
            if !is_shown {
                if let Some(row) = self.rows.remove(&execution.node) {
                    self.multi.remove(&row);
                }
            // Nodes beyond the limit get a line once one is free and they report again.
            } else if self.rows.contains_key(&execution.node) || self.rows.len() < ROWS {
                let row = self.row(&execution.node);
                row.set_prefix(format!("{:width$}", clean(&id(&execution.node))));
                row.set_message(describe(execution));
                if execution.bytes_total > 0 && execution.state() == State::Running {
                    row.set_style(style(ROW_BYTES).progress_chars("=> "));
                    row.set_length(execution.bytes_total);
                    row.set_position(execution.bytes_done);
                } else {
                    row.set_style(style(ROW));
                    row.tick();
                }
            }
        }
    }

    /// Returns the line of a node, created in order of names.
    fn row(&mut self, node: &str) -> ProgressBar {
        if let Some(row) = self.rows.get(node) {
            return row.clone();
        }
        let before = self.rows.range(..node.to_owned()).next_back().map_or(&self.header, |(_, row)| row);
        let row = self.multi.insert_after(before, ProgressBar::no_length().with_style(style(ROW)));
        self.rows.insert(node.to_owned(), row.clone());
        row
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use indicatif::{ProgressDrawTarget, ProgressStyle, TermLike};
    use marco_proto::v1::execution::State;
    use marco_proto::v1::{Execution, WatchOperationResponse};

    use super::{HEADER, Live, ROW, ROW_BYTES, ROWS};
    use crate::follow::Known;

    /// A terminal that keeps everything written to it.
    #[derive(Debug, Clone, Default)]
    struct Paper(Arc<Mutex<String>>);

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            100
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, line: &str) -> io::Result<()> {
            self.write_str(line)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn show(live: &mut Live, executions: Vec<Execution>) {
        let message = WatchOperationResponse { executions, ..Default::default() };
        let mut known = Known::default();
        known.take(&message);
        live.update(&message, &known);
    }

    fn at_work(node: usize) -> Execution {
        Execution {
            node: format!("nodes/pi-{node:03}"),
            state: State::Running.into(),
            phase: "unpacking".to_owned(),
            bytes_done: 512 * 1024,
            bytes_total: 1024 * 1024,
            ..Default::default()
        }
    }

    #[test]
    fn a_node_at_work_has_a_line_with_its_phase_and_a_bar() {
        let paper = Paper::default();
        let mut live = Live::on(ProgressDrawTarget::term_like(Box::new(paper.clone())));
        show(&mut live, vec![at_work(7)]);
        live.multi.clear().unwrap();
        let written = paper.0.lock().unwrap();
        assert!(written.contains("pi-007  RUNNING  unpacking [============"), "{written}");
        assert!(written.contains("512.00 KiB/1.00 MiB"), "{written}");
    }

    #[test]
    fn of_many_nodes_only_those_at_work_have_lines_and_not_more_than_fit() {
        let mut live = Live::on(ProgressDrawTarget::hidden());
        let mut all: Vec<Execution> = (0..300).map(at_work).collect();
        for execution in all.iter_mut().skip(5) {
            execution.state = State::Pending.into();
        }
        show(&mut live, all.clone());
        assert_eq!(live.rows.len(), 5);
        show(&mut live, (0..300).map(at_work).collect());
        assert_eq!(live.rows.len(), ROWS);
        for execution in &mut all {
            execution.state = State::Succeeded.into();
        }
        show(&mut live, all);
        assert_eq!(live.rows.len(), 0);
    }

    #[test]
    fn every_template_can_be_drawn() {
        for template in [HEADER, ROW, ROW_BYTES] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
