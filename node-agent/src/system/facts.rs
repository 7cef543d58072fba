//! Plain facts about a board and its system.

use super::rooted::Rooted;

/// Result of [`System::facts`](super::System::facts).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The hardware.
    pub board: Board,
    /// The system that runs on it.
    pub system: SystemFacts,
}

/// The hardware. A fact that is unknown is empty or zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Board {
    /// From the device tree, for example `Raspberry Pi 4 Model B Rev 1.4`.
    pub model: String,
    /// The revision code, hexadecimal.
    pub revision: String,
    /// The serial number, 16 hexadecimal digits.
    pub serial: String,
    /// MAC addresses of the wired and wireless interfaces, sorted.
    pub macs: Vec<String>,
    /// Memory that the kernel sees, in bytes.
    pub memory_bytes: u64,
    /// `pi1` to `pi5`, or empty when unknown.
    pub family: String,
}

impl Board {
    /// The device tree that the firmware loads for this board. `None`: unknown board.
    pub fn device_tree(&self) -> Option<&'static str> {
        marco_archive::firmware::device_tree(&self.family, &self.model)
    }
}

/// The system on a board. A fact that is unknown is empty or zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SystemFacts {
    /// Kernel architecture, as `uname -m` prints it.
    pub kernel_arch: String,
    /// Architecture that this agent was built for.
    pub userspace_arch: String,
    /// Memory page size in bytes.
    pub page_size: u32,
    /// Kernel release, as `uname -r` prints it.
    pub kernel_release: String,
    /// PRETTY_NAME of `/etc/os-release`.
    pub os: String,
    /// Layout of the card.
    pub layout: Layout,
}

/// Layout of a card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// Not known.
    #[default]
    Unknown,
    /// One boot partition, as stock images have it.
    Single,
    /// A recovery partition with installer sets, and the system's own boot partition.
    Resident,
}

/// PRETTY_NAME of a root's os-release, unquoted (os-release(5)). `None`: no file or no such line.
pub(super) fn pretty_name(root: &Rooted) -> Option<String> {
    let read = |path| root.read(path).ok().flatten();
    // os-release(5): `/usr/lib` is the fallback for a missing file in `/etc`.
    let text = read("etc/os-release").or_else(|| read("usr/lib/os-release"))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    // The last assignment counts, as in a shell.
    let value = text.lines().rev().find_map(|line| line.trim().strip_prefix("PRETTY_NAME="))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}
