//! Acknowledgements of one session. A report that is stored already is acknowledged again unless this session has done
//! so: the answer to its commit may have been lost, and then no acknowledgement was sent.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use marco_proto::names::ExecutionId;

/// Executions that are remembered. A node reports on few; with more, an acknowledgement may be sent twice.
const MOST: usize = 64;

/// The last acknowledged attempt and sequence of each execution.
#[derive(Debug, Default)]
pub struct Acked(Mutex<HashMap<ExecutionId, (u32, u64)>>);

impl Acked {
    /// Remembers an acknowledgement. It replaces an earlier one of the same execution.
    pub fn add(&self, execution: &ExecutionId, attempt: u32, sequence: u64) {
        let mut acked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if acked.len() >= MOST && !acked.contains_key(execution) {
            // All of them: a second acknowledgement does no harm, so an order of eviction is not worth keeping.
            acked.clear();
        }
        acked.insert(execution.clone(), (attempt, sequence));
    }

    /// True if this or a later sequence of the attempt was acknowledged.
    pub fn has(&self, execution: &ExecutionId, attempt: u32, sequence: u64) -> bool {
        let acked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        acked.get(execution).is_some_and(|(of, up_to)| *of == attempt && *up_to >= sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::{Acked, MOST};
    use marco_proto::names::ExecutionId;

    fn execution(number: usize) -> ExecutionId {
        ExecutionId::parse(&format!("operations/0198a6e0-0000-7000-8000-{number:012}/executions/pi-01")).unwrap()
    }

    #[test]
    fn acknowledgement_counts_for_its_attempt_and_earlier_sequences() {
        let acked = Acked::default();
        assert!(!acked.has(&execution(1), 1, 2));
        acked.add(&execution(1), 1, 2);
        assert!(acked.has(&execution(1), 1, 1) && acked.has(&execution(1), 1, 2));
        assert!(!acked.has(&execution(1), 1, 3) && !acked.has(&execution(1), 2, 2) && !acked.has(&execution(2), 1, 2));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let acked = Acked::default();
        for number in 0..10 * MOST {
            acked.add(&execution(number), 1, 1);
            assert!(acked.has(&execution(number), 1, 1));
        }
        assert!(acked.0.lock().unwrap().len() <= MOST);
    }
}
