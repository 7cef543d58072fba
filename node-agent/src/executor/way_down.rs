//! How the machine goes down, and what is said of it.

use crate::job::phase;

/// How the machine goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WayDown {
    Reboot,
    TryBoot,
    PowerOff,
}

impl WayDown {
    /// What is said of the command with this number, from 1.
    pub(super) fn phase(self, command: u32) -> &'static str {
        match (self, command) {
            (Self::Reboot, 1) => phase::RESTARTING,
            (Self::Reboot, _) => phase::FORCED_RESTART,
            (Self::TryBoot, 1) => phase::TRIAL_BOOT,
            (Self::TryBoot, _) => phase::FORCED_TRIAL_BOOT,
            (Self::PowerOff, 1) => phase::POWERING_OFF,
            (Self::PowerOff, _) => phase::FORCED_POWER_OFF,
        }
    }
}
