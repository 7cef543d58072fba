//! Drivers that a kernel has built in.

/// Folder of the kernels' modules in a root, one folder for each kernel release.
pub(crate) const MODULES: &str = "lib/modules";
/// List of the drivers that a kernel has built in, below its folder (kernel documentation, kbuild).
pub(crate) const BUILT_IN: &str = "modules.builtin";
/// Driver of a Pi's watchdog.
const WATCHDOG: &str = "bcm2835_wdt.ko";

/// True if this list has the driver of a Pi's watchdog. A kernel that loads it as a module hangs unwatched until then.
pub(crate) fn has_watchdog(built_in: &str) -> bool {
    built_in.lines().any(|line| line.ends_with(WATCHDOG))
}
