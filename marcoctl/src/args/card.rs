//! `marcoctl card`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::Board;
use super::values::{Pair, duration, pair, size};

/// Subcommands of `card`.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, from the command line")]
pub(crate) enum CardCommand {
    /// Write cards (or image files) that start the installer and join: put in, power on, done
    #[command(after_help = "\
Examples:
  marcoctl card write /dev/sdX                       the controller's default bootcode, one token, 7 days
  marcoctl card write /dev/sdX --count 10            ten cards, one after the other, one token for all
  marcoctl card write card.img --size 4GiB --bootcode installer.zip --firmware /mnt/boot/firmware

A card gets one partition (RECOVERY, FAT32, 256 MiB); the installer makes the others. A device is refused when
anything on it is in use, and everything on it is lost. A file is made sparse; with --count it gets -1, -2 and so on.")]
    Write(WriteCard),
}

/// Flags of `card write`.
#[derive(Debug, Args)]
pub(crate) struct WriteCard {
    /// A whole device such as /dev/sdX or /dev/mmcblk0, or an image file to create
    pub(crate) target: PathBuf,
    /// Number of cards; you are asked before each next one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), default_value_t = 1)]
    pub(crate) count: u32,
    /// Zip with the installer's boot files, from `bootcode build`; by default the controller's default bootcode
    #[arg(long, value_name = "ZIP")]
    pub(crate) bootcode: Option<PathBuf>,
    /// Board family whose default bootcode is used; else the default for any board
    #[arg(long, value_name = "FAMILY", conflicts_with = "bootcode")]
    pub(crate) board: Option<Board>,
    /// Folder with the Pi's firmware (bootcode.bin, start*.elf, fixup*.dat), if the zip has none
    #[arg(long, value_name = "DIR")]
    pub(crate) firmware: Option<PathBuf>,
    /// Size of an image file
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "4GiB")]
    pub(crate) size: u64,
    /// File with the join token; by default a new token is created for all cards
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Lifetime of the new token
    // Longer than for `tokens create`: a card may wait for days before it is put into a Pi.
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "7d", conflicts_with = "token_file")]
    pub(crate) ttl: Duration,
    /// Pis that join with the new token wait until an admin approves them
    #[arg(long, conflicts_with = "token_file")]
    pub(crate) require_approval: bool,
    /// Label that these Pis get; repeats
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair, conflicts_with = "token_file")]
    pub(crate) labels: Vec<Pair>,
    /// Address at which Pis reach the controller; repeats; by default that of --controller, or none (discovery) if that
    /// is this machine itself
    #[arg(long = "join", value_name = "HOST:PORT")]
    pub(crate) join: Vec<String>,
    /// Address of the enrolment listener; repeats; by default the controllers' hosts, port 1347
    #[arg(long = "enroll", value_name = "HOST:PORT")]
    pub(crate) enroll: Vec<String>,
    /// Id that the node asks for; with --count NAME-1, NAME-2 and so on; by default made from its serial number
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// Settings of the installer, stored on the card as marco/install.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) install_config: Option<PathBuf>,
    /// A userconf.txt (user and hashed password), passed through to the installed system
    #[arg(long, value_name = "FILE")]
    pub(crate) userconf: Option<PathBuf>,
    /// Switch on the SSH server, by an empty file `ssh` as Raspberry Pi OS reads it
    #[arg(long)]
    pub(crate) ssh: bool,
    /// Folder with files for the first boot of every installed system: user-data, network-config, meta-data,
    /// userconf.txt, ssh, ssh.txt, custom.toml; files in subfolders KEY=VALUE are for nodes with that label
    #[arg(long, value_name = "DIR")]
    pub(crate) first_boot: Option<PathBuf>,
    /// Do not ask; the contents of the device or of an existing file are lost
    #[arg(long)]
    pub(crate) yes: bool,
}
