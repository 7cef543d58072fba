//! `marcoctl bootcode`.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Format;

/// Subcommands of `bootcode`.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, from the command line")]
pub(crate) enum BootcodeCommand {
    /// Build a zip of boot files that starts the installer, from a system's root or its packages
    #[command(after_help = "\
Examples:
  marcoctl bootcode build --root /mnt/raspios --agent target/aarch64-unknown-linux-gnu/release/marco-agent \\
      -o installer-arm64.zip
  marcoctl bootcode build --package debs/ --agent marco-agent -o installer.zip --compress gzip
  marcoctl artifacts push installer-arm64.zip --kind bootcode

Where it finds what it needs: the kernel in boot/vmlinuz-VERSION, its modules in lib/modules/VERSION, the
device trees in usr/lib/linux-image-VERSION; busybox, mke2fs, e2fsck, resize2fs, mkfs.vfat and blkid with their
libraries in the folders where systems have them. As packages these are, of Debian: linux-image-*,
busybox-static, e2fsprogs, dosfstools, util-linux, libext2fs2, libcom-err2, libss2, libblkid1, libuuid1 and libc6.
The same files make the same bytes; times are SOURCE_DATE_EPOCH, else that of the newer one of agent and kernel.")]
    Build(BuildBootcode),
}

/// Flags of `bootcode build`.
#[derive(Debug, Args)]
pub(crate) struct BuildBootcode {
    /// A system's root: an unpacked or mounted Raspberry Pi OS or Debian; repeats, the first that has a file wins
    // Several roots allow an overlay, for example own programs over a mounted system.
    #[arg(long = "root", value_name = "DIR", required_unless_present = "packages")]
    pub(crate) roots: Vec<PathBuf>,
    /// A Debian package, or a folder of them; repeats, and comes before roots
    #[arg(long = "package", value_name = "DEB|DIR")]
    pub(crate) packages: Vec<PathBuf>,
    /// The static agent (`make agent TARGET=...`)
    #[arg(long, value_name = "FILE")]
    pub(crate) agent: PathBuf,
    /// The zip to write
    #[arg(short = 'o', long = "file", value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Use the kernel of this architecture; agent and programs may be for another one that it runs
    #[arg(long)]
    pub(crate) arch: Option<Arch>,
    /// Use the kernel of this version, if there are several
    #[arg(long, value_name = "VERSION")]
    pub(crate) kernel: Option<String>,
    /// Board to support; repeats; by default all boards that the kernel has device trees for
    #[arg(long = "board", value_name = "BOARD")]
    pub(crate) boards: Vec<Board>,
    /// One more kernel module, for example for another file system or network adapter; repeats
    #[arg(long = "module", value_name = "NAME")]
    pub(crate) modules: Vec<String>,
    /// One more program with its libraries, by its path, for example /sbin/mkfs.btrfs; repeats
    #[arg(long = "program", value_name = "PATH")]
    pub(crate) programs: Vec<String>,
    /// Kernel command line, replacing the default one
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Compression of the initramfs; by default zstd if the kernel is known to read it
    #[arg(long, value_name = "HOW")]
    pub(crate) compress: Option<Packing>,
    /// Format of the output
    // `-o` is the file here. The global flag is declared again without its short form.
    #[arg(id = "output", long, value_name = "FORMAT", env = "MARCO_OUTPUT", default_value = "table")]
    #[arg(help_heading = "Connection and output")]
    pub(crate) output: Format,
}

/// An architecture by its Debian name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// ARMv6 with soft-float calls: every Pi, including the first.
    Armel,
    /// ARMv7: Pi 2 and later.
    Armhf,
    /// 64-bit: Pi 3 and later.
    Arm64,
    /// PCs and virtual machines.
    Amd64,
}

impl Arch {
    /// Returns true if a kernel of this architecture runs programs of the other one.
    pub(crate) fn runs(self, program: Self) -> bool {
        match self {
            Self::Armel => program == Self::Armel,
            // Soft and hard float differ only between programs and libraries. The kernel runs both.
            Self::Armhf => matches!(program, Self::Armel | Self::Armhf),
            Self::Arm64 => program != Self::Amd64,
            Self::Amd64 => program == Self::Amd64,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Armel => "armel",
            Self::Armhf => "armhf",
            Self::Arm64 => "arm64",
            Self::Amd64 => "amd64",
        })
    }
}

/// A family of boards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Board {
    /// Pi 1, Zero, Zero W.
    Pi1,
    /// Pi 2.
    Pi2,
    /// Pi 3, Zero 2 W.
    Pi3,
    /// Pi 4, 400, Compute Module 4.
    Pi4,
    /// Pi 5, 500, Compute Module 5.
    Pi5,
    /// A virtual machine with virtio.
    #[value(name = "virt")]
    Virtual,
}

impl fmt::Display for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pi1 => "pi1",
            Self::Pi2 => "pi2",
            Self::Pi3 => "pi3",
            Self::Pi4 => "pi4",
            Self::Pi5 => "pi5",
            Self::Virtual => "virt",
        })
    }
}

/// Compression of an initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Packing {
    /// Smaller and faster. Needs kernel 5.9 or later.
    Zstd,
    /// Supported by every kernel.
    Gzip,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        })
    }
}
