//! `marcoctl artifacts`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Paging;
use crate::ask::Force;

/// Subcommands of `artifacts`.
#[derive(Debug, Subcommand)]
pub(crate) enum ArtifactsCommand {
    /// Store a file: hash it, send the bytes that the controller does not have, and have it checked
    #[command(after_help = "\
Examples:
  marcoctl artifacts push raspios-lite.tar.xz --kind image
  marcoctl artifacts push installer.zip --kind bootcode --purpose installer
  marcoctl artifacts push build/rootfs.tar.zst --kind image --name kiosk-2030-01

A push under a name that exists points the name at the new bytes. A cut connection is taken up again
where it broke; so is a push that is simply started again.")]
    Push(Push),
    /// List artifacts
    List(ListArtifacts),
    /// Show everything that is known about an artifact
    Get {
        /// Name or id
        artifact: String,
    },
    /// Remove a name, and the bytes if no other name uses them
    Delete {
        /// Names or ids
        #[arg(required = true)]
        artifacts: Vec<String>,
        #[command(flatten)]
        force: Force,
    },
    /// Let every approved node fetch an artifact by its name, regardless of its work
    Open {
        /// Name or id
        artifact: String,
        /// On the file mirror, used by installers of the 2015 system
        #[arg(long, required = true)]
        mirror: bool,
    },
    /// Give an artifact only to nodes whose work or board needs it, as before it was opened
    Close {
        /// Name or id
        artifact: String,
        /// On the file mirror
        #[arg(long, required = true)]
        mirror: bool,
    },
    /// Make an artifact the default of its kind and purpose
    Default {
        /// Name or id
        artifact: String,
        /// For this board family only (pi1 to pi5); else for every board without a default of its own
        #[arg(long, value_name = "FAMILY", default_value = "", hide_default_value = true)]
        board: String,
    },
}

/// Arguments of `artifacts push`.
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// A tarball or a whole-disk image (plain, gzip, xz or zstd) of an operating system, or a zip of boot files
    pub(crate) file: PathBuf,
    /// Kind of the file
    #[arg(long)]
    pub(crate) kind: Kind,
    /// Name of the artifact; by default the file's name without .tar, .tar.*, .tgz, .zip or .img*
    #[arg(long, value_name = "ID")]
    pub(crate) name: Option<String>,
    /// Purpose of a bootcode; by default the installer
    #[arg(long)]
    pub(crate) purpose: Option<Purpose>,
    /// Attempts in a row that may fail without progress; the pauses between them grow to 10 s
    // With 15 attempts the pauses add up to a minute and a half, enough for a restart of the controller.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), default_value_t = 15)]
    pub(crate) tries: u32,
}

/// Flags of `artifacts list`.
#[derive(Debug, Args)]
pub(crate) struct ListArtifacts {
    /// Only artifacts of this kind
    #[arg(long)]
    pub(crate) kind: Option<Kind>,
    #[command(flatten)]
    pub(crate) paging: Paging,
}

/// Kind of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// An operating system as a tarball or a whole-disk image.
    Image,
    /// Boot files as a zip.
    Bootcode,
}

/// Purpose of a bootcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// The pre-boot installer.
    Installer,
    /// The installed system.
    System,
}
