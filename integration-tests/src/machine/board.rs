//! The machines that QEMU emulates: their names, the files they boot, and their command lines.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use node_agent::system::virtual_pi::firmware::Model;

/// An emulated machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// A PC with virtio devices.
    Amd64,
    /// QEMU's own 64-bit ARM machine, with virtio devices.
    Arm64,
    /// A Raspberry Pi 3 B with SD card, USB and a 64-bit kernel.
    Raspi3b,
    /// A Raspberry Pi Zero: ARMv6.
    Raspi0,
}

/// The firmware's choice, as files for QEMU.
#[derive(Debug)]
pub struct Kernel<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initial RAM file system, in one file; `None`: the kernel starts without one.
    pub initramfs: Option<&'a Path>,
    /// The device tree; `None`: QEMU brings its own, or the machine needs none.
    pub device_tree: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The processor never runs, as one whose kernel hangs at once.
    pub held: bool,
}

impl Board {
    /// Parses the names of `make e2e`: `amd64`, `arm64`, `raspi3b`, `raspi0`.
    ///
    /// # Errors
    /// Returns an error for any other name.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "amd64" => Self::Amd64,
            "arm64" => Self::Arm64,
            "raspi3b" => Self::Raspi3b,
            "raspi0" => Self::Raspi0,
            _ => bail!("no machine is called {name:?}: amd64, arm64, raspi3b and raspi0 are"),
        })
    }

    /// The name that [`parse`](Self::parse) accepts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
            Self::Raspi3b => "raspi3b",
            Self::Raspi0 => "raspi0",
        }
    }

    /// Debian's name of its architecture.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 | Self::Raspi3b => "arm64",
            Self::Raspi0 => "armel",
        }
    }

    /// The board as the firmware describes it. QEMU's own machines bring their device tree, or have none.
    pub fn model(self) -> Model {
        match self {
            Self::Amd64 | Self::Arm64 => Model { family: "", device_tree: None },
            Self::Raspi3b => Model { family: "pi3", device_tree: Some("bcm2710-rpi-3-b.dtb") },
            Self::Raspi0 => Model { family: "pi1", device_tree: Some("bcm2708-rpi-zero.dtb") },
        }
    }

    /// The device trees in a system's boot partition, by their names in the vendor's firmware.
    pub fn device_trees(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 | Self::Arm64 => &[],
            Self::Raspi3b => &["bcm2710-rpi-3-b.dtb"],
            // An image is for all boards of a family. The test interface names only the family, so the agent asks for
            // the device tree of the family's first board.
            Self::Raspi0 => &["bcm2708-rpi-zero.dtb", "bcm2708-rpi-b.dtb"],
        }
    }

    /// The kernel's name of the serial console.
    pub fn console(self) -> &'static str {
        match self {
            Self::Amd64 => "ttyS0",
            Self::Arm64 | Self::Raspi0 => "ttyAMA0",
            Self::Raspi3b => "ttyS1",
        }
    }

    /// The kernel modules for its storage, its network and its file systems.
    pub fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &["softdog", "virtio_pci", "virtio_blk", "virtio_net", "vfat", "nls_cp437", "nls_ascii"],
            Self::Arm64 => &["softdog", "virtio_mmio", "virtio_blk", "virtio_net", "vfat", "nls_cp437", "nls_ascii"],
            Self::Raspi3b => &[
                "sdhci-iproc",
                "bcm2835",
                "mmc_block",
                // The USB host driver waits for this one, although `modules.dep` does not name it.
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

    /// Words that the harness adds to the kernel's command line. QEMU's boards have neither serial number nor revision.
    pub fn words(self) -> &'static str {
        match self {
            Self::Amd64 | Self::Arm64 => "marco.test_serial=00000000e2e00001",
            // QEMU's power manager resets the machine as soon as the watchdog is armed.
            Self::Raspi3b => {
                "marco.test_serial=00000000e2e00001 marco.test_board=pi3 initcall_blacklist=bcm2835_wdt_driver_init"
            }
            // As above. Also, QEMU's power manager is not the one that the power-domain driver expects, and the kernel
            // would stop there.
            Self::Raspi0 => {
                "marco.test_serial=00000000e2e00001 marco.test_board=pi1 \
                 initcall_blacklist=bcm2835_wdt_driver_init,bcm2835_power_driver_init"
            }
        }
    }

    /// Size of its card, and the installer's settings on it. File systems on a small card are made and checked faster.
    pub fn card(self) -> (&'static str, &'static str) {
        match self {
            Self::Amd64 | Self::Arm64 => ("2GiB", "[boot]\nsize = \"128MiB\"\n[root]\nsize = \"512MiB\"\n"),
            // QEMU accepts only powers of two as the size of an SD card. It erases a card sector by sector and stops
            // the whole machine meanwhile, so that network connections would break.
            Self::Raspi3b | Self::Raspi0 => (
                "1GiB",
                "[boot]\nsize = \"128MiB\"\n\
                 [root]\nsize = \"256MiB\"\nmkfs_options = [\"-E\", \"nodiscard\"]\n\
                 [home]\nmkfs_options = [\"-E\", \"nodiscard\"]\n",
            ),
        }
    }

    /// Bytes in an image that do not compress, so that the stream takes long enough to be observed. The emulated USB
    /// adapters carry about 200 KB a second.
    pub fn ballast(self) -> usize {
        match self {
            Self::Amd64 | Self::Arm64 => 12 * 1024 * 1024,
            Self::Raspi3b | Self::Raspi0 => 1024 * 1024,
        }
    }

    /// True if the harness need not reset the machine after a hang. QEMU's own machines never hang during shutdown.
    pub fn has_watchdog(self) -> bool {
        matches!(self, Self::Amd64 | Self::Arm64)
    }

    /// Limits of the emulation, for the report: parts of the real board that no run shows.
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

    /// Scales a timeout from a PC to this board. Each access to an emulated SD card or USB adapter costs QEMU far more
    /// than one to a virtio device.
    pub fn patience(self, limit: Duration) -> Duration {
        limit
            * match self {
                Self::Amd64 | Self::Arm64 => 1,
                Self::Raspi3b => 3,
                Self::Raspi0 => 3,
            }
    }

    /// The name for `marcoctl bootcode build --board`.
    pub fn family(self) -> &'static str {
        match self {
            Self::Amd64 | Self::Arm64 => "virt",
            Self::Raspi3b => "pi3",
            Self::Raspi0 => "pi1",
        }
    }

    /// QEMU's program and arguments. A reset ends QEMU, so that the harness can play the firmware. The card is written
    /// through this machine's page cache, which outlives QEMU: every sector that the guest's disk accepted survives a
    /// kill of QEMU.
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
        // The Pi 3's first serial port is the one that its Bluetooth uses; the console is on the second.
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
        if start.held {
            arguments.push("-S".to_owned());
        }
        (program, arguments)
    }
}
