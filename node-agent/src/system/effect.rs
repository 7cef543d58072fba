//! Effects on the machine, as steps that a test can watch.

use super::{System, SystemError};
use crate::step;

/// Announces an effect on the machine, which is about to begin. Its caller gives the command only if this succeeds.
pub(crate) fn effect(system: &dyn System, what: &'static str) -> Result<(), SystemError> {
    step::at(what, &system.state_dir(), &[]).map_err(SystemError::io(what, system.root()))
}
