//! The board's facts, from the device tree or, as a fallback, `/proc/cpuinfo`.

use std::path::Path;

use crate::system::{Board, Booted};

/// Reads the facts. Unknown ones stay empty, since any machine may run this.
pub(in crate::system) fn read(sysroot: &Path) -> Board {
    let tree = sysroot.join("proc/device-tree");
    let cpuinfo = std::fs::read_to_string(sysroot.join("proc/cpuinfo")).unwrap_or_default();
    let field = |key: &str| field(&cpuinfo, key);
    let revision = cell(&tree.join("system/linux,revision"))
        .or_else(|| u32::from_str_radix(&field("Revision")?, 16).ok())
        .filter(|code| *code != 0);
    Board {
        model: string(&tree.join("model")).or_else(|| field("Model")).unwrap_or_default(),
        revision: revision.map(|code| format!("{code:x}")).unwrap_or_default(),
        serial: string(&tree.join("serial-number")).or_else(|| field("Serial")).unwrap_or_default(),
        macs: macs(&sysroot.join("sys/class/net")),
        memory_bytes: memory(sysroot),
        family: revision.map(family).unwrap_or_default().to_owned(),
    }
}

/// The firmware's report of this boot. There is no fallback: no other source tells a trial boot.
pub(in crate::system) fn booted(sysroot: &Path) -> Option<Booted> {
    let number = |name| cell(&sysroot.join("proc/device-tree/chosen/bootloader").join(name));
    Some(Booted { partition: number("partition")?, tryboot: number("tryboot")? != 0 })
}

/// A device tree property of one big-endian cell.
pub(super) fn cell(path: &Path) -> Option<u32> {
    let bytes = std::fs::read(path).ok()?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// A device tree property that is a string, without its final NUL.
fn string(path: &Path) -> Option<String> {
    let bytes = std::fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    Some(text.trim_end_matches('\0').trim().to_owned()).filter(|text| !text.is_empty())
}

fn field(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    })
}

fn memory(sysroot: &Path) -> u64 {
    let text = std::fs::read_to_string(sysroot.join("proc/meminfo")).unwrap_or_default();
    let kibibytes = field(&text, "MemTotal").and_then(|value| value.trim_end_matches("kB").trim().parse::<u64>().ok());
    kibibytes.unwrap_or_default() * 1024
}

/// Only interfaces with a device behind them: no loopback, bridge or tunnel.
fn macs(net: &Path) -> Vec<String> {
    let interfaces = std::fs::read_dir(net).into_iter().flatten().flatten().map(|entry| entry.path());
    let address = |path: &Path| std::fs::read_to_string(path.join("address")).ok();
    let mut macs: Vec<String> = interfaces
        .filter(|path| path.join("device").exists())
        .filter_map(|path| Some(address(&path)?.trim().to_lowercase()))
        // Other kinds of links have longer addresses, and some drivers report only zeros.
        .filter(|mac| mac.len() == 17 && mac != "00:00:00:00:00:00")
        .collect();
    macs.sort();
    macs.dedup();
    macs
}

/// Board family by the revision code: the type in bits 4-11 of a new-style code (bit 23)
/// (<https://www.raspberrypi.com/documentation/computers/raspberry-pi.html>, "new-style revision codes"). Old-style
/// codes all belong to the first family. By type, not by processor, as the firmware's filters: a Pi 2 version 1.2 has
/// the processor of a Pi 3.
fn family(code: u32) -> &'static str {
    if code & (1 << 23) == 0 {
        return "pi1";
    }
    match ((code >> 4) & 0xff, (code >> 12) & 0xf) {
        (0x04, _) => "pi2",
        (_, 0) => "pi1",
        (_, 1) => "pi2",
        (_, 2) => "pi3",
        (_, 3) => "pi4",
        (_, 4) => "pi5",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::family;

    #[test]
    fn families_follow_the_revision_code() {
        for (code, expected) in [
            (0x000e, "pi1"),
            (0x90_00c1, "pi1"),
            (0xa0_1041, "pi2"),
            (0xa2_2042, "pi2"),
            (0xa0_20d3, "pi3"),
            (0x90_2120, "pi3"),
            (0xc0_3114, "pi4"),
            (0xc0_4170, "pi5"),
        ] {
            assert_eq!(family(code), expected, "{code:x}");
        }
    }
}
