//! The machines that QEMU plays: what they are called, what they boot, and their command lines.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use node_agent::system::virtual_pi::firmware::Model;

/// A machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// A PC with virtio devices.
    Amd64,
    /// QEMU's own 64-bit ARM machine, with virtio devices.
    Arm64,
    /// A Raspberry Pi 3 B: its SD card, its USB, a 64-bit kernel.
    Raspi3b,
    /// A Raspberry Pi Zero: ARMv6.
    Raspi0,
}

/// What the firmware starts, as files of this machine.
#[derive(Debug)]
pub struct Kernel<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initial RAM file system.
    pub initramfs: Option<&'a Path>,
    /// The device tree.
    pub device_tree: Option<&'a Path>,
    /// The command line.
    pub cmdline: &'a str,
}

impl Board {
    /// By the names of `make e2e`: `amd64`, `arm64`, `raspi3b`, `raspi0`.
    ///
    /// # Errors
    /// There is no such machine.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "amd64" => Self::Amd64,
            "arm64" => Self::Arm64,
            "raspi3b" => Self::Raspi3b,
            "raspi0" => Self::Raspi0,
            _ => bail!("no machine is called {name:?}: amd64, arm64, raspi3b and raspi0 are"),
        })
    }

    /// The name by which [`parse`](Self::parse) knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
            Self::Raspi3b => "raspi3b",
            Self::Raspi0 => "raspi0",
        }
    }

    /// Debian's architecture for it.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 | Self::Raspi3b => "arm64",
            Self::Raspi0 => "armel",
        }
    }

    /// What the firmware knows of it. QEMU's own machines bring their device tree, or have none.
    pub fn model(self) -> Model {
        match self {
            Self::Amd64 | Self::Arm64 => Model { family: "", device_tree: None },
            Self::Raspi3b => Model { family: "pi3", device_tree: Some("bcm2710-rpi-3-b.dtb") },
            Self::Raspi0 => Model { family: "pi1", device_tree: Some("bcm2708-rpi-zero.dtb") },
        }
    }

    /// The device trees in a system's boot partition, by the names that the vendor's firmware has for them.
    pub fn device_trees(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 | Self::Arm64 => &[],
            Self::Raspi3b => &["bcm2710-rpi-3-b.dtb"],
            // An image is for all boards of a family, and the test interface only says the family: the agent asks for its
            // first board's.
            Self::Raspi0 => &["bcm2708-rpi-zero.dtb", "bcm2708-rpi-b.dtb"],
        }
    }

    /// The serial console.
    pub fn console(self) -> &'static str {
        match self {
            Self::Amd64 => "ttyS0",
            Self::Arm64 | Self::Raspi0 => "ttyAMA0",
            Self::Raspi3b => "ttyS1",
        }
    }

    /// The kernel modules of its storage and network, and of FAT.
    pub fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &["virtio_pci", "virtio_blk", "virtio_net", "vfat", "nls_cp437", "nls_ascii"],
            Self::Arm64 => &["virtio_mmio", "virtio_blk", "virtio_net", "vfat", "nls_cp437", "nls_ascii"],
            Self::Raspi3b => &[
                "sdhci-iproc",
                "bcm2835",
                "mmc_block",
                // The USB host waits for this one, though no table of the kernel says that it needs it.
                "phy_generic",
                "dwc2",
                "cdc_ether",
                "rndis_host",
                "vfat",
                "nls_cp437",
                "nls_ascii",
                "crc32c_generic",
                "ext4",
            ],
            Self::Raspi0 => &[
                "bcm2835",
                "mmc_block",
                "cdc_ether",
                "rndis_host",
                "vfat",
                "nls_cp437",
                "nls_ascii",
                "crc32c_generic",
                "ext4",
            ],
        }
    }

    /// What the emulation adds to the kernel's command line: QEMU's boards have neither serial number nor revision.
    pub fn words(self) -> &'static str {
        match self {
            Self::Amd64 | Self::Arm64 => "marco.test_serial=00000000e2e00001",
            // QEMU's power manager resets the machine as soon as its watchdog is armed.
            Self::Raspi3b => {
                "marco.test_serial=00000000e2e00001 marco.test_board=pi3 initcall_blacklist=bcm2835_wdt_driver_init"
            }
            // The same; and it is not the one that the driver of its power domains expects: the kernel would stop there.
            Self::Raspi0 => {
                "marco.test_serial=00000000e2e00001 marco.test_board=pi1 \
                 initcall_blacklist=bcm2835_wdt_driver_init,bcm2835_power_driver_init"
            }
        }
    }

    /// How large its card is, and the settings of the installer on it: file systems on a small card are made and checked
    /// faster.
    pub fn card(self) -> (&'static str, &'static str) {
        match self {
            Self::Amd64 | Self::Arm64 => ("2GiB", "[boot]\nsize = \"128MiB\"\n[root]\nsize = \"512MiB\"\n"),
            // QEMU takes powers of two for an SD card. It erases one sector by sector, and nothing else of the machine goes
            // on meanwhile: the network's connections would break.
            Self::Raspi3b | Self::Raspi0 => (
                "1GiB",
                "[boot]\nsize = \"128MiB\"\n\
                 [root]\nsize = \"256MiB\"\nmkfs_options = [\"-E\", \"nodiscard\"]\n\
                 [home]\nmkfs_options = [\"-E\", \"nodiscard\"]\n",
            ),
        }
    }

    /// How many bytes of an image do not compress, so that the stream is seen to run: the emulated USB adapters carry some
    /// 200 KB a second.
    pub fn ballast(self) -> usize {
        match self {
            Self::Amd64 | Self::Arm64 => 12 * 1024 * 1024,
            Self::Raspi3b | Self::Raspi0 => 1024 * 1024,
        }
    }

    /// Whether something resets it when its kernel hangs, or the harness need not: QEMU's own machines have no such trouble.
    pub fn has_watchdog(self) -> bool {
        matches!(self, Self::Amd64 | Self::Arm64)
    }

    /// What QEMU does not play of the real board, and what happens instead: no run shows it.
    pub fn not_shown(self) -> &'static str {
        match self {
            Self::Amd64 | Self::Arm64 => "it is no Raspberry Pi, and has none of its devices",
            Self::Raspi3b | Self::Raspi0 => {
                "the watchdog (QEMU resets the board when it is armed, so that its driver is left out), and with it the \
                 board's own restart and power-off: the kernel halts, and the test does the rest; the board's own network \
                 chip: QEMU has an adapter on USB"
            }
        }
    }

    /// How long to wait on this board for what may take `limit` on a PC: each access to an emulated SD card and USB adapter
    /// costs QEMU far more than one to a virtio device.
    pub fn patience(self, limit: Duration) -> Duration {
        limit
            * match self {
                Self::Amd64 | Self::Arm64 => 1,
                Self::Raspi3b => 3,
                Self::Raspi0 => 3,
            }
    }

    /// What `marcoctl bootcode build --board` calls it.
    pub fn family(self) -> &'static str {
        match self {
            Self::Amd64 | Self::Arm64 => "virt",
            Self::Raspi3b => "pi3",
            Self::Raspi0 => "pi1",
        }
    }

    /// QEMU's program and arguments. A reset ends it, so that the firmware can be played. The card is written through
    /// the page cache of this machine, which outlives QEMU: what the guest's disk has taken is kept when QEMU is killed.
    pub fn qemu(self, start: &Kernel<'_>, card: &Path, tap: &str, console: &Path) -> (&'static str, Vec<String>) {
        let (program, machine, card_device, network) = match self {
            Self::Amd64 => {
                ("qemu-system-x86_64", "-M pc -accel tcg -cpu max -m 512", "virtio-blk-pci", "virtio-net-pci")
            }
            Self::Arm64 => {
                ("qemu-system-aarch64", "-M virt -cpu cortex-a53 -m 512", "virtio-blk-device", "virtio-net-device")
            }
            Self::Raspi3b => ("qemu-system-aarch64", "-M raspi3b -m 1G", "", "usb-net"),
            Self::Raspi0 => ("qemu-system-arm", "-M raspi0", "", "usb-net"),
        };
        let mut arguments: Vec<String> =
            "-no-user-config -nodefaults -display none -no-reboot".split(' ').map(str::to_owned).collect();
        arguments.extend(machine.split(' ').map(str::to_owned));
        let mut add = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
        add("-chardev", format!("file,id=console,path={}", console.display()));
        if self == Self::Raspi3b {
            add("-serial", "null".to_owned());
        }
        add("-serial", "chardev:console".to_owned());
        add("-kernel", start.kernel.display().to_string());
        if let Some(initramfs) = start.initramfs {
            add("-initrd", initramfs.display().to_string());
        }
        if let Some(tree) = start.device_tree {
            add("-dtb", tree.display().to_string());
        }
        add("-append", start.cmdline.to_owned());
        let drive = format!("file={},format=raw,cache=writeback", card.display());
        if card_device.is_empty() {
            add("-drive", format!("{drive},if=sd"));
        } else {
            add("-drive", format!("{drive},if=none,id=card"));
            add("-device", format!("{card_device},drive=card"));
        }
        add("-netdev", format!("tap,id=net,ifname={tap},script=no,downscript=no"));
        add("-device", format!("{network},netdev=net,mac=52:54:00:77:00:77"));
        (program, arguments)
    }
}
