//! Process 1: starts the keeper, and becomes the init that the image would have had.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags};

use super::{KEEPER, LIMIT, PROGRAM, account};

/// Programs that the kernel tries without `init=` (init/main.c).
const INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];
const CMDLINE: &str = "/proc/cmdline";

/// The supervisor's part of a kernel command line.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    /// The trial's limit in seconds; `None`: this is no trial.
    limit: Option<u64>,
    /// The image's own `init=`.
    init: Option<String>,
}

impl Asked {
    /// Parses a command line. `us`: the path of this program.
    fn parse(cmdline: &str, us: &str) -> Self {
        // The last of several values counts, as for the kernel.
        let last = |key: &'static str| cmdline.split_whitespace().filter_map(move |word| word.strip_prefix(key)).rev();
        let ours = |path: &&str| *path == us || path.strip_prefix('/') == Some(PROGRAM);
        Self {
            limit: last(LIMIT).next().and_then(|seconds| seconds.parse().ok()),
            init: last("init=").find(|path| !ours(path)).map(str::to_owned),
        }
    }
}

pub(super) fn main() -> ! {
    let mut arguments = std::env::args_os();
    let us = arguments.next().unwrap_or_default();
    let arguments: Vec<OsString> = arguments.collect();
    let asked = Asked::parse(&command_line(), &us.to_string_lossy());
    if let Some(limit) = asked.limit {
        start_keeper(&us, limit);
    }
    let inits = match &asked.init {
        // As the kernel: a named init that does not start is no reason to try another one.
        Some(named) => vec![named.as_str()],
        None => INITS.to_vec(),
    };
    for init in inits {
        let error = Command::new(init).args(&arguments).exec();
        super::keeper::say(&format!("cannot start {init}: {error}"));
    }
    // Process 1 ends, the kernel panics, and `panic=` brings the installer back.
    std::process::exit(1)
}

/// Reads the kernel's command line. A kernel without an initramfs has mounted no /proc yet, and the image's init must find
/// it so.
fn command_line() -> String {
    if let Ok(text) = std::fs::read_to_string(CMDLINE) {
        return text;
    }
    let mounted = rustix::mount::mount("proc", "/proc", "proc", MountFlags::NOSUID, None);
    let text = std::fs::read_to_string(CMDLINE).unwrap_or_default();
    if mounted.is_ok() {
        let _ = rustix::mount::unmount("/proc", UnmountFlags::DETACH);
    }
    text
}

#[allow(
    clippy::disallowed_methods,
    reason = "there is no runtime here, and nobody waits for the keeper: it outlives this program"
)]
fn start_keeper(us: &OsString, limit: u64) {
    let used = account::used().as_secs();
    let started = Command::new(us).arg0(KEEPER).arg(limit.to_string()).arg(used.to_string()).spawn();
    if let Err(error) = started {
        super::keeper::say(&format!("this system's trial is not supervised: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::Asked;

    #[test]
    fn image_keeps_the_init_of_its_own_command_line() {
        let us = "/var/lib/marco-agent/supervise";
        for (line, limit, init) in [
            (
                "init=/lib/sysvinit marco.trial=begin init=/var/lib/marco-agent/supervise marco.limit=840",
                Some(840),
                Some("/lib/sysvinit"),
            ),
            (
                "marco.trial=begin init=/var/lib/marco-agent/supervise marco.limit=840 marco.trial=end quiet",
                Some(840),
                None,
            ),
            ("init=/a init=/b quiet", None, Some("/b")),
            ("marco.limit=x rdinit=/c", None, None),
        ] {
            let asked = Asked { limit, init: init.map(str::to_owned) };
            assert_eq!(Asked::parse(line, us), asked, "{line}");
        }
    }
}
