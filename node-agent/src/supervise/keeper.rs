//! The process that watches a trial: feeds the watchdog, waits for the acceptance, and resets the machine without one.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::system::RebootCommand;

use super::watchdog::{Left, Watchdog};
use super::{ACCEPTED, ADDRESS, account, isolation};

/// Last argument of a keeper that has left the root.
const APART: &str = "apart";
/// Feeding interval. A Raspberry Pi's watchdog expires after at most 15 s.
const FEED: Duration = Duration::from_secs(4);
/// Time for dirty pages to reach the card before the reset. A card that hangs must not hold it up.
const SYNC: Duration = Duration::from_secs(10);
/// Time for the kernel to stop its devices and restart.
const RESTART: Duration = Duration::from_secs(20);
/// Longest wait for the word of a process that has connected.
const WORD: Duration = Duration::from_secs(2);
/// Times before the limit at which the console is told.
const WARNINGS: [Duration; 3] = [Duration::from_secs(300), Duration::from_secs(60), Duration::from_secs(15)];
/// Inode of the machine's first namespace of processes (`PROC_PID_INIT_INO` of linux/proc_ns.h).
const FIRST_NAMESPACE: &str = "pid:[4026531836]";

/// Writes a line to the console. Best effort, and never waits for it: a serial line may be stopped.
pub(super) fn say(text: &str) {
    let console = ["/dev/console", "/dev/tty0"].iter().find_map(|path| {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::open(*path, flags, Mode::empty()).ok()
    });
    if let Some(console) = console {
        let _ = std::fs::File::from(console).write_all(format!("\r\nmarco-supervise: {text}\r\n").as_bytes());
    }
}

pub(super) fn main() -> ! {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.last().is_none_or(|last| last != APART) {
        arguments.push(APART.into());
        let error = isolation::start_again(&arguments);
        // It goes on from the root, which it then holds busy.
        say(&format!("not apart from the root: {error}"));
    }
    let seconds = |at: usize| arguments.get(at).and_then(|text| text.to_str()?.parse().ok());
    let (limit, used): (u64, u64) = (seconds(0).unwrap_or_default(), seconds(1).unwrap_or_default());
    let clock = Clock::start();
    // A process group of its own: the console's keys must not end it.
    let _ = rustix::process::setsid();
    // The last one to be killed when memory runs out.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    leave_console();

    let (sender, accepted) = mpsc::channel();
    std::thread::spawn(move || listen(&sender));
    let over = account::Over::default();
    let kept = over.clone();
    std::thread::spawn(move || {
        account::keep(&kept, move || Duration::from_secs(used).saturating_add(clock.since_boot()));
    });
    let mut watchdog = Watchdog::new(Path::new("/"));
    let limit = Duration::from_secs(limit.saturating_sub(used));
    say(&format!("this system is on trial: {} s are left for its acceptance", left(limit, clock).as_secs()));
    match watch(limit, clock, &accepted, &mut watchdog) {
        // Not fed any longer: it resets the machine if nothing else does.
        Ended::Late => reset(),
        Ended::Accepted(agent) => {
            // Before the answer: the agent removes what the records leave.
            over.set();
            end(&mut watchdog, agent)
        }
    }
}

/// The end of a trial.
#[derive(Debug)]
enum Ended {
    /// The limit passed without an acceptance.
    Late,
    /// The agent that waits for the answer.
    Accepted(UnixStream),
}

/// Time since the kernel's start.
#[derive(Clone, Copy)]
struct Clock {
    started: Instant,
    before: Duration,
}

impl Clock {
    fn start() -> Self {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
        let seconds: f64 = uptime.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or_default();
        Self { started: Instant::now(), before: Duration::try_from_secs_f64(seconds).unwrap_or_default() }
    }

    fn since_boot(self) -> Duration {
        self.started.elapsed().saturating_add(self.before)
    }
}

/// Lets go of the terminal that process 1 was started with.
fn leave_console() {
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

/// Watches the trial until its end, and feeds the watchdog meanwhile.
fn watch(limit: Duration, clock: Clock, accepted: &Receiver<UnixStream>, watchdog: &mut Watchdog) -> Ended {
    let mut warnings = WARNINGS.iter().filter(|warning| **warning < left(limit, clock)).peekable();
    loop {
        if watchdog.feed() {
            say("the watchdog is fed");
        }
        let left = left(limit, clock);
        if left.is_zero() {
            return Ended::Late;
        }
        if warnings.next_if(|warning| **warning >= left).is_some() {
            say(&format!("not accepted by the controller yet; in {} s the installer comes back", left.as_secs()));
        }
        let next = warnings.peek().map_or(left, |warning| left.saturating_sub(**warning));
        match accepted.recv_timeout(next.min(FEED)) {
            Ok(agent) => return Ended::Accepted(agent),
            Err(RecvTimeoutError::Timeout) => {}
            // The listener is gone. The limit still holds.
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(left.min(FEED)),
        }
    }
}

fn left(limit: Duration, clock: Clock) -> Duration {
    limit.saturating_sub(clock.since_boot())
}

/// Ends the supervision of an accepted system.
fn end(watchdog: &mut Watchdog, mut agent: UnixStream) -> ! {
    let state = watchdog.give_back();
    say("the system is accepted");
    let _ = agent.write_all(ACCEPTED);
    drop(agent);
    if state != Left::Running {
        std::process::exit(0);
    }
    // A watchdog that cannot be stopped is fed for as long as the machine runs.
    loop {
        watchdog.feed();
        std::thread::sleep(FEED);
    }
}

/// Waits for the agent's word that the system is accepted. Other processes and users are not heard.
fn listen(sender: &Sender<UnixStream>) {
    let bound = SocketAddr::from_abstract_name(ADDRESS).and_then(|address| UnixListener::bind_addr(&address));
    let listener = match bound {
        Ok(listener) => listener,
        Err(error) => return say(&format!("no acceptance can be told: {error}")),
    };
    for agent in listener.incoming().flatten() {
        if is_root(&agent) && says_accepted(&agent) && sender.send(agent).is_err() {
            return;
        }
    }
}

fn is_root(agent: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(agent).is_ok_and(|peer| peer.uid.is_root())
}

fn says_accepted(mut agent: &UnixStream) -> bool {
    let mut word = [0; ACCEPTED.len()];
    let heard = agent.set_read_timeout(Some(WORD)).and_then(|()| agent.read_exact(&mut word));
    heard.is_ok() && word == ACCEPTED
}

/// Restarts the machine into the installer, by ever stronger means.
fn reset() -> ! {
    say("not accepted in time: back to the installer");
    // A thread, because a card that hangs blocks it.
    let (sender, synced) = mpsc::channel();
    std::thread::spawn(move || {
        rustix::fs::sync();
        let _ = sender.send(());
    });
    let _ = synced.recv_timeout(SYNC);
    // Plain: the installer is the default. A driver may hang while the kernel stops it.
    std::thread::spawn(|| {
        if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
            say(&format!("cannot restart: {error}"));
        }
    });
    std::thread::sleep(RESTART);
    loop {
        // Stops no device. Never from a container, where it would restart the host.
        if std::fs::read_link("/proc/self/ns/pid").is_ok_and(|namespace| namespace.as_os_str() == FIRST_NAMESPACE) {
            let _ = std::fs::write("/proc/sysrq-trigger", "b");
        }
        std::thread::sleep(RESTART);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::{Clock, Ended, FEED, says_accepted, watch};
    use crate::supervise::watchdog::Watchdog;

    const SHORT: Duration = Duration::from_millis(50);

    fn now() -> Clock {
        Clock { started: Instant::now(), before: Duration::ZERO }
    }

    /// A root with a watchdog.
    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("dev")).unwrap();
        std::fs::write(dir.path().join("dev/watchdog"), "").unwrap();
        dir
    }

    #[test]
    fn trial_without_an_acceptance_ends_at_its_limit_and_is_fed_until_then() {
        let dir = root();
        let (sender, accepted) = mpsc::channel();
        let begun = Instant::now();
        let ended = watch(SHORT, now(), &accepted, &mut Watchdog::new(dir.path()));
        assert!(matches!(ended, Ended::Late), "{ended:?}");
        assert!(begun.elapsed() >= SHORT && begun.elapsed() < FEED);
        assert!(std::fs::read(dir.path().join("dev/watchdog")).unwrap().starts_with(b"\0"));
        // The limit holds without a listener, too, and counts from the kernel's start.
        drop(sender);
        let clock = Clock { before: Duration::from_secs(840), ..now() };
        let ended = watch(Duration::from_secs(840), clock, &accepted, &mut Watchdog::new(dir.path()));
        assert!(matches!(ended, Ended::Late), "{ended:?}");
    }

    #[test]
    fn acceptance_ends_the_trial_before_its_limit() {
        let dir = root();
        let (sender, accepted) = mpsc::channel();
        let (agent, _other) = UnixStream::pair().unwrap();
        sender.send(agent).unwrap();
        let ended = watch(Duration::from_secs(840), now(), &accepted, &mut Watchdog::new(dir.path()));
        assert!(matches!(ended, Ended::Accepted(_)), "{ended:?}");
    }

    #[test]
    fn only_the_word_of_the_acceptance_counts() {
        for (word, counts) in [("accepted\n", true), ("rejected\n", false), ("acc", false), ("", false)] {
            let (mut agent, keeper) = UnixStream::pair().unwrap();
            agent.write_all(word.as_bytes()).unwrap();
            drop(agent);
            assert_eq!(says_accepted(&keeper), counts, "{word:?}");
        }
    }
}
