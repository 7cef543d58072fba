//! Phases that a node reports: words for people, and for the controller, which knows a deadline for each.

/// Before an update: nothing is written.
pub const CHECKING: &str = "checking whether it can be updated";
/// The zip with the installer, or the system's boot files; counts bytes.
pub const DOWNLOADING_BOOTCODE: &str = "downloading bootcode";
/// Unzipped into a partition, and read back.
pub const WRITING_BOOT_FILES: &str = "writing boot files";
/// Users have been warned.
pub const NOTICE: &str = "waiting for the notice to pass";
/// The command was given.
pub const RESTARTING: &str = "restarting";
/// The machine is still up, and was given a stronger command.
pub const FORCED_RESTART: &str = "restarting by force";
/// The command was given, with the argument for one trial.
pub const TRIAL_BOOT: &str = "trial boot";
/// The same by a stronger command.
pub const FORCED_TRIAL_BOOT: &str = "trial boot by force";
/// The command was given.
pub const POWERING_OFF: &str = "powering off";
/// The same by a stronger command.
pub const FORCED_POWER_OFF: &str = "powering off by force";
/// The installer waits for the first checked chunk.
pub const CONNECTING: &str = "connecting";
/// The installer makes the card ready.
pub const PARTITIONING: &str = "partitioning";
/// Download, check and unpacking, as one stream; counts the bytes of the download.
pub const UNPACKING: &str = "unpacking image";
/// The installer makes the system the node's own.
pub const PERSONALISING: &str = "personalising";
/// Everything is written to the card.
pub const SYNCING: &str = "syncing";
/// The installer pauses after an error that may pass.
pub const ANOTHER_TRY: &str = "waiting to try the installation again";
/// The new system is up.
pub const VERDICT: &str = "waiting for the controller to accept the new system";

/// All of them.
pub const ALL: &[&str] = &[
    CHECKING,
    DOWNLOADING_BOOTCODE,
    WRITING_BOOT_FILES,
    NOTICE,
    RESTARTING,
    FORCED_RESTART,
    TRIAL_BOOT,
    FORCED_TRIAL_BOOT,
    POWERING_OFF,
    FORCED_POWER_OFF,
    CONNECTING,
    PARTITIONING,
    UNPACKING,
    PERSONALISING,
    SYNCING,
    ANOTHER_TRY,
    VERDICT,
];
