//! Kernel modules that the boards need for network and storage.

use anyhow::{Result, bail};

use super::kernel::Kernel;
use super::modules::Modules;
use crate::args::{Arch, Board};

/// A need of a board. `any_of`: modules that fulfil it in different kernels; all that exist are included.
struct Need {
    what: &'static str,
    any_of: &'static [&'static str],
    /// True if the board cannot be installed without it.
    must: bool,
}

const fn must(what: &'static str, any_of: &'static [&'static str]) -> Need {
    Need { what, any_of, must: true }
}

const fn may(what: &'static str, any_of: &'static [&'static str]) -> Need {
    Need { what, any_of, must: false }
}

/// Needs of every machine.
const COMMON: [Need; 5] = [
    // The DHCP client reads raw packets: the interface has no address yet.
    must("DHCP", &["af_packet"]),
    must("the file system ext4", &["ext4"]),
    must("the file system FAT", &["vfat"]),
    must("FAT's code page 437", &["nls_cp437"]),
    // The kernel's configuration decides which one a mount requests (CONFIG_FAT_DEFAULT_IOCHARSET).
    must("FAT's character sets", &["nls_ascii", "nls_iso8859_1", "nls_utf8"]),
];

/// Needs of QEMU's `virt` machines and PCs with virtio.
const VIRTUAL: [Need; 5] = [
    must("the bus virtio", &["virtio_pci", "virtio_mmio"]),
    must("disks of virtual machines", &["virtio_blk"]),
    must("the network of virtual machines", &["virtio_net"]),
    may("randomness of virtual machines", &["virtio_rng"]),
    may("the watchdog of virtual machines", &["i6300esb"]),
];

/// Needs of all Pis.
const PI: [Need; 4] = [
    must("SD cards", &["mmc_block"]),
    may("the watchdog", &["bcm2835_wdt"]),
    may("randomness", &["bcm2835_rng", "iproc_rng200"]),
    // Built into the vendor's kernels, modules in Debian's. Without them the card slot or USB has no power.
    may(
        "clocks, pins and resets",
        &[
            "clk_raspberrypi",
            "gpio_raspberrypi_exp",
            "reset_raspberrypi",
            "raspberrypi_power",
            "bcm2835_power",
            "fixed",
            "gpio_regulator",
            "regulator_fixed",
            "pwrseq_simple",
            "bcm2835_dma",
            "phy_generic",
            "raspberrypi_hwmon",
        ],
    ),
];

/// Needs of USB adapters, and of QEMU's `usb-net`.
const USB: [Need; 2] = [
    may("network adapters on USB", &["cdc_ether", "rndis_host", "cdc_ncm", "asix", "ax88179_178a", "r8152"]),
    may("disks on USB", &["usb_storage", "uas", "sd_mod"]),
];

/// Needs of the USB host and the card slot of Pi 1 to 3.
const DWC2: [Need; 2] = [
    must("USB", &["dwc_otg", "dwc2"]),
    must("the card's slot", &["bcm2835_sdhost", "bcm2835_mmc", "bcm2835", "sdhci_iproc"]),
];

const PI_1: [Need; 1] = [must("the network of Pi 1 and 2", &["smsc95xx"])];
const PI_3: [Need; 3] = [
    must("the network of Pi 3", &["smsc95xx"]),
    must("the network of Pi 3 B+", &["lan78xx"]),
    may("the network of Pi 3 B+", &["microchip"]),
];
const PI_4: [Need; 4] = [
    must("the card's slot of Pi 4", &["sdhci_iproc"]),
    must("the network of Pi 4", &["genet"]),
    may("the network of Pi 4", &["mdio_bcm_unimac", "broadcom", "bcm54140"]),
    may("USB of Pi 4", &["pcie_brcmstb", "xhci_pci", "xhci_pci_renesas"]),
];
const PI_5: [Need; 4] = [
    must("the card's slot of Pi 5", &["sdhci_brcmstb"]),
    must("the network of Pi 5", &["macb"]),
    must("the I/O chip of Pi 5", &["rp1", "rp1_pci"]),
    may("PCIe and NVMe of Pi 5", &["pcie_brcmstb", "nvme", "xhci_plat_hcd", "pinctrl_rp1", "clk_rp1", "broadcom"]),
];

impl Board {
    fn needs(self) -> Vec<&'static [Need]> {
        let mut needs: Vec<&'static [Need]> = vec![&COMMON];
        needs.extend::<Vec<&'static [Need]>>(match self {
            Self::Virtual => vec![&VIRTUAL],
            Self::Pi1 | Self::Pi2 => vec![&PI, &DWC2, &PI_1, &USB],
            Self::Pi3 => vec![&PI, &DWC2, &PI_3, &USB],
            Self::Pi4 => vec![&PI, &PI_4, &USB],
            Self::Pi5 => vec![&PI, &PI_5, &USB],
        });
        needs
    }

    /// Returns the beginnings of the names of its device trees. Empty for a virtual machine.
    fn trees(self) -> &'static [&'static str] {
        match self {
            Self::Virtual => &[],
            Self::Pi1 => &["bcm2708-"],
            // Revision 1.2 of the Pi 2 has the processor of a Pi 3.
            Self::Pi2 => &["bcm2709-", "bcm2710-rpi-2"],
            Self::Pi3 => &["bcm2710-"],
            Self::Pi4 => &["bcm2711-"],
            Self::Pi5 => &["bcm2712"],
        }
    }

    /// Returns true if the board runs kernels of this architecture.
    fn runs(self, arch: Arch) -> bool {
        match self {
            Self::Virtual => true,
            Self::Pi1 => arch == Arch::Armel,
            Self::Pi2 | Self::Pi3 | Self::Pi4 => matches!(arch, Arch::Armhf | Arch::Arm64),
            Self::Pi5 => arch == Arch::Arm64,
        }
    }
}

/// Chooses the boards: the named ones, else those for which the kernel has a device tree. Virtual machines are added if
/// the kernel supports their disks.
pub(super) fn choose(named: &[Board], kernel: &Kernel, modules: &Modules) -> Result<Vec<Board>> {
    let has_tree =
        |board: Board| kernel.device_trees.keys().any(|name| board.trees().iter().any(|start| name.starts_with(start)));
    let mut boards = named.to_vec();
    if boards.is_empty() {
        let all = [Board::Pi1, Board::Pi2, Board::Pi3, Board::Pi4, Board::Pi5];
        boards.extend(all.into_iter().filter(|board| board.runs(kernel.arch) && has_tree(*board)));
        if boards.is_empty() || modules.has("virtio_blk") {
            boards.push(Board::Virtual);
        }
    }
    boards.sort();
    boards.dedup();
    for board in &boards {
        // An explicit board that cannot work is an error here, not a board that stays dark later.
        if !board.runs(kernel.arch) {
            bail!("{board} does not run kernels for {}: {}", kernel.arch, kernel.version);
        }
        if *board != Board::Virtual && !has_tree(*board) {
            bail!("the kernel {} has no device tree for {board}", kernel.version);
        }
    }
    Ok(boards)
}

/// Returns true if a device tree of this name is for one of these boards.
pub(super) fn is_tree_of(boards: &[Board], name: &str) -> bool {
    // Mainline kernels use their own names for the same processors.
    let vendor = [("bcm2835-", "bcm2708-"), ("bcm2836-", "bcm2709-"), ("bcm2837-", "bcm2710-")];
    let mut names = vec![name.to_owned()];
    names.extend(vendor.iter().filter_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?))));
    let of = |board: &Board| board.trees().iter().any(|start| names.iter().any(|name| name.starts_with(start)));
    boards.iter().any(of)
}

/// Returns the modules to load for these boards, unordered. A missing required module is an error that names it.
pub(super) fn modules(boards: &[Board], modules: &Modules, version: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for board in boards {
        for need in board.needs().into_iter().flatten() {
            let there: Vec<&str> = need.any_of.iter().copied().filter(|name| modules.has(name)).collect();
            if there.is_empty() && need.must {
                bail!(
                    "the kernel {version} has no module {}, and not built in either: {board} needs it for {}; take another \
                     kernel, or say with --board which boards the set is for",
                    need.any_of.join(" or "),
                    need.what
                );
            }
            names.extend(there.into_iter().map(str::to_owned));
        }
    }
    Ok(names)
}
