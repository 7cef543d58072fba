//! Supervisor of a new system's trial. It resets the machine if no acceptance comes within the trial's limit, however the
//! new system hangs, and the installer comes back.
//!
//! The installer puts this program into the new root and names it as `init=` on the trial's command line. As process 1 it
//! starts its [`keeper`] and then becomes the image's own init. The keeper lives in memory, apart from the root, and
//! survives what that init does to other processes. No failure here may keep the image's init from starting.

#![allow(clippy::disallowed_methods, reason = "a process of its own without a runtime: it waits and replaces itself")]

use std::io::{self, Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::time::Duration;

mod account;
mod first;
mod isolation;
mod keeper;
mod watchdog;

/// Path of the program in a new root. In the agent's own folder, which is all of the root that the agent may write.
pub const PROGRAM: &str = "var/lib/marco-agent/supervise";
/// Path in a new root of the seconds that earlier boots of the trial have used.
pub const RECORD: &str = "var/lib/marco-agent/trial-seconds";
/// The keeper's name. systemd does not kill a process of root whose name begins with `@`
/// (<https://systemd.io/ROOT_STORAGE_DAEMONS>).
const KEEPER: &str = "@marco-supervise";
/// Parameter with the trial's limit in seconds from the kernel's start. The kernel passes no name with a dot on to init.
const LIMIT: &str = "marco.limit=";
/// Address of the keeper: an abstract socket, since keeper and agent share no folder.
const ADDRESS: &str = "marco-supervise";
/// Word of the agent to the keeper, and the keeper's answer.
const ACCEPTED: &[u8] = b"accepted\n";
/// Longest wait for the keeper's answer. It closes a device, no more.
const ANSWER: Duration = Duration::from_secs(5);

/// Part of the supervisor that this process plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Process 1, until it becomes the image's init.
    First,
    /// The process that watches the trial.
    Keeper,
}

/// Returns the part that this process plays, by the name it was started with. `None`: it is no supervisor.
pub fn role() -> Option<Role> {
    let name = std::env::args_os().next()?;
    if name == KEEPER {
        return Some(Role::Keeper);
    }
    let own = Path::new(PROGRAM).file_name();
    (std::process::id() == 1 && Path::new(&name).file_name() == own).then_some(Role::First)
}

/// Plays a part of the supervisor. Never returns.
pub fn main(role: Role) -> ! {
    match role {
        Role::First => first::main(),
        Role::Keeper => keeper::main(),
    }
}

/// Kernel parameters that start the supervisor with this limit.
pub(crate) fn parameters(limit: Duration) -> [String; 2] {
    [format!("init=/{PROGRAM}"), format!("{LIMIT}{}", limit.as_secs())]
}

/// Tells the keeper that the system is accepted, and waits until it has let go of the watchdog. Returns false if there is
/// no keeper. Blocking.
///
/// # Errors
/// Returns an error if the keeper does not answer: it will reset the machine at the trial's limit.
pub(crate) fn accept() -> io::Result<bool> {
    let mut keeper = match UnixStream::connect_addr(&SocketAddr::from_abstract_name(ADDRESS)?) {
        Ok(keeper) => keeper,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(false),
        Err(error) => return Err(error),
    };
    keeper.set_read_timeout(Some(ANSWER))?;
    keeper.write_all(ACCEPTED)?;
    let mut answer = [0; ACCEPTED.len()];
    keeper.read_exact(&mut answer)?;
    Ok(true)
}
