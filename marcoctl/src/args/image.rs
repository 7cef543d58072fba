//! `marcoctl image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Format;

/// Subcommands of `image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Pack a system's root into a tarball that can be pushed as an image
    #[command(after_help = "\
Examples:
  sudo marcoctl image pack /dev/sdX -o kiosk-2030-01.tar.zst
  sudo marcoctl image pack raspios.img -o raspios.tar.zst
  sudo marcoctl image pack /mnt/card -o kiosk-2030-01.tar.zst
  marcoctl image pack build/rootfs -o rootfs.tar.xz --exclude '*.pyc' --exclude /var/cache/apt/archives

Of a device, a partition or an image file the root is mounted for reading, where nobody else sees it; the boot
partition that its fstab names is packed in its place. Nothing is written to it; other partitions are named and left out.
What somebody has mounted is refused, because what was written there may not be on it yet: unmount it, or name the folder
where the system is mounted, with its boot partition below it.

Kept: owners, modes, times, extended attributes, capabilities, hard links, device nodes, holes. What is in other
file systems is left out, but for boot and boot/firmware. Left out as well: what is in /proc, /sys, /dev, /run and
/tmp, and lost+found (--no-default-excludes packs them), and what makes a system one certain machine: the agent's key
and journal, SSH host keys, machine-id, random seed, join files (--keep-identity packs them).
A pattern that begins with / counts from the root; another one is looked for in every folder.
The ending of FILE says how it is compressed: .tar, .tar.gz, .tar.xz or .tar.zst.")]
    Pack(PackImage),
}

/// Flags of `image pack`.
#[derive(Debug, Args)]
pub(crate) struct PackImage {
    /// The root: a folder, a mount point of a card, a device such as /dev/sdX, a partition, or an image file
    pub(crate) source: PathBuf,
    /// The tarball to write
    #[arg(short = 'o', long = "file", value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Leave out paths that match this pattern (*, ?, [a-z], **); repeats
    #[arg(long = "exclude", value_name = "PATTERN")]
    pub(crate) exclude: Vec<String>,
    /// Pack /proc, /sys, /dev, /run, /tmp and lost+found as well
    #[arg(long)]
    pub(crate) no_default_excludes: bool,
    /// Pack keys, machine-id and the like as well: for a backup of one machine, not for an image for many
    #[arg(long)]
    pub(crate) keep_identity: bool,
    /// Also pack file systems that are mounted below the root
    #[arg(long)]
    pub(crate) cross_file_systems: bool,
    /// Compression level; by default 10 for zstd, 6 for gzip and xz
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=19))]
    pub(crate) level: Option<u32>,
    /// Format of the output
    // `-o` is the file here. The global flag is declared again without its short form.
    #[arg(id = "output", long, value_name = "FORMAT", env = "MARCO_OUTPUT", default_value = "table")]
    #[arg(help_heading = "Connection and output")]
    pub(crate) output: Format,
}
