//! The first process of the installer's initramfs: mounts the kernel's file systems, loads the modules of
//! the boards' networks and cards, and keeps `marco-agent install` running. It never ends: that would be a panic.
//!
//! The installer itself is a process of its own, so one that crashes is started again. Children of programs that went
//! away are reaped here, without getting in its way.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::mount::MountFlags;
use rustix::process::WaitOptions;

/// Modules to load, one path below `/` a line, dependencies first.
const MODULES: &str = "/etc/marco/modules";
/// Description by `marcoctl bootcode build`; only the installer's initramfs has it.
pub const BUILD: &str = "/etc/marco/build";
const AGENT: &str = "/usr/bin/marco-agent";
const CONSOLE: &str = "/dev/console";
/// Mounts: type and mount point.
const MOUNTS: [(&str, &str); 4] = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run")];
/// Longest pause before an installer that ended is started again.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Run time after which the pause begins at a second again.
const LONG: Duration = Duration::from_secs(120);

/// Returns true in the first process of an installer's initramfs.
pub fn is_init() -> bool {
    std::process::id() == 1 && Path::new(BUILD).exists()
}

/// Returns true in the system of an installer's initramfs, which lives in memory. A system on a card, or on any other
/// machine, must never be taken for it.
pub fn in_initramfs() -> bool {
    /// `RAMFS_MAGIC` and `TMPFS_MAGIC` of linux/magic.h.
    const IN_MEMORY: [u64; 2] = [0x8584_58f6, 0x0102_1994];
    // The file alone proves nothing: a card could hold it, and the installer erases cards.
    let kind = rustix::fs::statfs("/").ok().and_then(|found| u64::try_from(found.f_type).ok());
    Path::new(BUILD).exists() && kind.is_some_and(|kind| IN_MEMORY.contains(&kind))
}

/// Runs as the first process. Never returns.
pub fn main() -> ! {
    for (kind, at) in MOUNTS {
        let mounted = std::fs::create_dir_all(at)
            .and_then(|()| Ok(rustix::mount::mount(kind, at, kind, MountFlags::NOSUID, Some(c""))?));
        // The kernel may have mounted /dev already.
        if let Err(error) = mounted
            && error.raw_os_error() != Some(rustix::io::Errno::BUSY.raw_os_error())
        {
            say(&format!("cannot mount {at}: {error}"));
        }
    }
    take_console();
    say(&format!("Marco installer {}", env!("CARGO_PKG_VERSION")));
    load_modules();
    supervise()
}

/// Opens the console: an initramfs without /dev/console starts its first process with nothing open.
fn take_console() {
    let Ok(console) = OpenOptions::new().read(true).write(true).open(CONSOLE) else { return };
    let _ = rustix::stdio::dup2_stdin(&console);
    let _ = rustix::stdio::dup2_stdout(&console);
    let _ = rustix::stdio::dup2_stderr(&console);
}

fn load_modules() {
    let list = std::fs::read_to_string(MODULES).unwrap_or_default();
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let path = Path::new("/").join(line.trim_start_matches('/'));
        let loaded = File::open(&path).and_then(|file| Ok(rustix::system::finit_module(&file, c"", 0)?));
        if let Err(error) = loaded
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            // Goes on: the list is for all boards, and this one may do without the module.
            say(&format!("module {} not loaded: {error}", path.display()));
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "there is no runtime here: it starts one program and waits for it, which is all that it does"
)]
fn supervise() -> ! {
    let mut pause = Duration::from_secs(1);
    loop {
        let begun = std::time::Instant::now();
        match Command::new(AGENT).arg("install").env("PATH", "/sbin:/bin:/usr/sbin:/usr/bin").spawn() {
            Ok(child) => {
                let ended = reap_until(child.id());
                say(&format!("the installer ended ({ended}), starting it again in {} s", pause.as_secs()));
            }
            Err(error) => say(&format!("cannot start {AGENT}: {error}")),
        }
        if begun.elapsed() > LONG {
            pause = Duration::from_secs(1);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Reaps every child that ends, until this one does. Returns how that one ended.
fn reap_until(child: u32) -> String {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if u32::try_from(pid.as_raw_nonzero().get()) == Ok(child) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("status {code}"),
                    (None, Some(signal)) => format!("signal {signal}"),
                    (None, None) => "for no known reason".into(),
                };
            }
            // Others are orphans of programs that went away: the kernel makes them children of this process.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return error.to_string(),
        }
    }
}

/// Writes to the console: the log begins only with the installer.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "init: {text}");
}
