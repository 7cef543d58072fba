//! The division of a card: four primary partitions in an MBR, in layout resident. Pure.
//!
//! On the card p1 (recovery, as it was found) comes first, then p4 (the system's boot partition), p2 (root), p3 (home).

use marco_archive::disk::Needs;

use crate::settings::Settings;
use crate::system::Refusal;

/// Bytes of a sector, the same on every card.
pub(crate) const SECTOR: u64 = 512;
/// Alignment of partitions in sectors: 4 MiB, the size that cards erase at once.
const ALIGN: u64 = 8192;
/// Sectors of a new recovery partition: 256 MiB.
const RECOVERY: u64 = 256 << 11;
/// Fewest sectors of a root: 64 MiB.
const SMALLEST_ROOT: u64 = 64 << 11;
/// Fewest sectors of a home: 8 MiB.
const SMALLEST_HOME: u64 = 8 << 11;
/// Most sectors of a root by default: 32 GiB. The rest of a large card is for home.
const LARGEST_ROOT: u64 = 32 << 21;
/// Most sectors that an MBR can count, in 32 bits.
const MOST: u64 = 0xffff_ffff;

/// Type of a FAT partition with LBA in an MBR.
pub(crate) const FAT: u8 = 0x0c;
/// Type of a Linux partition.
pub(crate) const LINUX: u8 = 0x83;
/// Types of an extended partition, with logical partitions in it.
pub(crate) const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Every type that stands for a FAT.
const FATS: [u8; 6] = [0x01, 0x04, 0x06, 0x0b, 0x0c, 0x0e];
/// Type of the only entry in the MBR of a card with a GPT.
const PROTECTIVE: u8 = 0xee;

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// Number in the table, from 1.
    pub(crate) number: u32,
    /// Type byte in the MBR; 0 if unknown.
    pub(crate) kind: u8,
    /// First sector.
    pub(crate) start: u64,
    /// Length in sectors.
    pub(crate) sectors: u64,
}

impl Part {
    fn end(&self) -> u64 {
        self.start + self.sectors
    }

    /// True if its type stands for a FAT.
    pub(crate) fn is_fat(&self) -> bool {
        FATS.contains(&self.kind)
    }
}

/// Decision about a card's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Plan {
    /// The card is in layout resident.
    Keep,
    /// Write these partitions, ordered by number. A partition that had the same place before keeps its contents.
    Write(Vec<Part>),
    /// First move the recovery partition to this place.
    Move(Part),
}

/// True if these partitions are a card in layout resident.
pub(crate) fn is_resident(parts: &[Part]) -> bool {
    let get = |number| parts.iter().find(|part| part.number == number);
    let (Some(p1), Some(p2), Some(p3), Some(p4)) = (get(1), get(2), get(3), get(4)) else { return false };
    // By order, not by size: an older `install.toml` may have set other sizes.
    p1.is_fat()
        && p4.is_fat()
        && p2.kind == LINUX
        && p3.kind == LINUX
        && p1.end() <= p4.start
        && p4.end() <= p2.start
        && p2.end() <= p3.start
}

/// Plans the table of a card of this many sectors with these partitions.
///
/// # Errors
/// Returns an error if the card is too small (`DISK_TOO_SMALL`) or has a GPT (`PARTITION_TABLE_GPT`).
pub(crate) fn plan(parts: &[Part], sectors: u64, settings: &Settings) -> Result<Plan, Refusal> {
    if parts.iter().any(|part| part.kind == PROTECTIVE) {
        let message = "the card has a GPT, with which several boards' firmware cannot try a boot partition; write it \
                       anew with an MBR (marcoctl card write)";
        return Err(Refusal { reason: "PARTITION_TABLE_GPT", message: message.into() });
    }
    if is_resident(parts) {
        return Ok(Plan::Keep);
    }
    // A first partition that is a FAT is kept: it holds the installer, or a stock card's firmware.
    let found = parts.iter().find(|part| part.number == 1 && part.is_fat()).copied();
    let recovery = found.unwrap_or(Part { number: 1, kind: FAT, start: ALIGN, sectors: RECOVERY });
    // An interrupted raw installation left the recovery partition at the card's end, and no room behind it.
    let front = Part { start: ALIGN, ..recovery };
    // Moving costs a restart, so only if the partition's present place leaves no room.
    match divide(recovery, sectors, settings) {
        Err(_) if front.end() <= recovery.start && divide(front, sectors, settings).is_ok() => Ok(Plan::Move(front)),
        divided => Ok(Plan::Write(divided?)),
    }
}

/// The partitions of a card with this recovery partition.
fn divide(recovery: Part, sectors: u64, settings: &Settings) -> Result<Vec<Part>, Refusal> {
    let wanted = |bytes: u64| up(bytes.div_ceil(SECTOR));
    let boot = Part { number: 4, kind: FAT, start: up(recovery.end()), sectors: wanted(settings.boot.size) };
    // The last aligned sector. The rest of the card stays unused.
    let end = sectors.min(MOST) / ALIGN * ALIGN;
    let left = end.saturating_sub(boot.end());
    let root_sectors = match (settings.root.size, settings.home.size) {
        (Some(root), _) => wanted(root),
        (None, Some(home)) => left.saturating_sub(wanted(home)) / ALIGN * ALIGN,
        (None, None) => (left / 3 * 2).min(LARGEST_ROOT) / ALIGN * ALIGN,
    };
    let root = Part { number: 2, kind: LINUX, start: boot.end(), sectors: root_sectors };
    let left = end.saturating_sub(root.end());
    let home = Part { number: 3, kind: LINUX, start: root.end(), sectors: settings.home.size.map_or(left, wanted) };
    if root.sectors < SMALLEST_ROOT || home.sectors < SMALLEST_HOME || home.end() > end {
        let smallest = settings.root.size.map_or(SMALLEST_ROOT, wanted) + settings.home.size.map_or(ALIGN, wanted);
        let message = format!(
            "the card is too small: it has {} MiB, and needs at least {} MiB ({} MiB for boot partitions, the rest for \
             root and home as set in marco/install.toml)",
            sectors >> 11,
            (boot.end() + smallest).div_ceil(1 << 11),
            boot.end() >> 11,
        );
        return Err(Refusal { reason: "DISK_TOO_SMALL", message });
    }
    Ok(vec![recovery, root, home, boot])
}

/// Checks that boot partition and root have the room that an image needs.
///
/// # Errors
/// Returns an error if one of them is too small (`NO_ROOM`).
pub(crate) fn fits(parts: &[Part], needs: Needs) -> Result<(), Refusal> {
    for (number, name, needed) in [(4, "boot partition", needs.boot), (2, "root", needs.root)] {
        let Some(part) = parts.iter().find(|part| part.number == number) else { continue };
        let size = part.sectors.saturating_mul(SECTOR);
        if needed > size {
            let message = format!(
                "the image's {name} has {} MiB, and that of this card (p{number}) {} MiB: make the image smaller, or lay the \
                 card out anew with a larger one ({}.size in marco/install.toml)",
                needed.div_ceil(1 << 20),
                size >> 20,
                if number == 2 { "root" } else { "boot" },
            );
            return Err(Refusal { reason: "NO_ROOM", message });
        }
    }
    Ok(())
}

/// New place of a card's recovery partition for an image of this many bytes from the card's beginning. `None`: it can
/// stay.
///
/// # Errors
/// Returns an error if there is no recovery partition, or the card is too small for both (`DISK_TOO_SMALL`).
pub(crate) fn behind(parts: &[Part], sectors: u64, image: u64) -> Result<Option<Part>, Refusal> {
    let image = up(image.div_ceil(SECTOR));
    let Some(recovery) = parts.iter().find(|part| part.number == 1 && part.is_fat()).copied() else {
        let message = "the card has no recovery partition in an MBR".into();
        return Err(Refusal { reason: "NO_RECOVERY_PARTITION", message });
    };
    if recovery.start >= image {
        return Ok(None);
    }
    let start = sectors.min(MOST).saturating_sub(recovery.sectors) / ALIGN * ALIGN;
    // The copy must not overlap its source: a power cut in the middle would destroy both.
    let needed = image.max(recovery.end());
    if start < needed {
        let message = format!(
            "the card is too small: it has {} MiB, and needs {} MiB to take this image as it is ({} MiB, and behind it {} \
             MiB for the installer until the image is complete)",
            sectors >> 11,
            (needed + recovery.sectors).div_ceil(1 << 11),
            image >> 11,
            recovery.sectors >> 11,
        );
        return Err(Refusal { reason: "DISK_TOO_SMALL", message });
    }
    Ok(Some(Part { start, ..recovery }))
}

fn up(sector: u64) -> u64 {
    sector.div_ceil(ALIGN) * ALIGN
}

#[cfg(test)]
mod tests {
    use super::{FAT, LINUX, Needs, Part, Plan, behind, fits, is_resident, plan};
    use crate::settings::Settings;

    const MIB: u64 = 2048;

    fn part(number: u32, kind: u8, start: u64, sectors: u64) -> Part {
        Part { number, kind, start, sectors }
    }

    fn written(parts: &[Part], sectors: u64, settings: &str) -> Vec<Part> {
        match plan(parts, sectors, &toml::from_str(settings).unwrap()).unwrap() {
            Plan::Write(parts) => parts,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_card_with_a_recovery_partition_gets_the_other_three_behind_it() {
        let p1 = part(1, FAT, 8192, 256 * MIB);
        let parts = written(&[p1], 4096 * MIB, "");
        assert_eq!(parts[0], p1, "kept as it was found");
        assert_eq!(parts[3], part(4, FAT, 260 * MIB, 512 * MIB));
        assert_eq!((parts[1].start, parts[1].kind), (772 * MIB, LINUX));
        assert_eq!(parts[2].start, parts[1].start + parts[1].sectors);
        assert_eq!(parts[2].start + parts[2].sectors, 4096 * MIB);
        let (root, home) = (parts[1].sectors, parts[2].sectors);
        assert!(root > home && root < 3 * home, "two thirds: {root} {home}");
        assert!(is_resident(&parts));
        assert_eq!(plan(&parts, 4096 * MIB, &Settings::default()), Ok(Plan::Keep));
    }

    #[test]
    fn a_blank_card_gets_all_four() {
        let parts = written(&[], 2000 * MIB, "");
        assert_eq!(parts[0], part(1, FAT, 8192, 256 * MIB));
        assert!(is_resident(&parts));
    }

    #[test]
    fn a_stock_cards_root_gives_way_and_its_boot_partition_stays() {
        let stock = [part(1, FAT, 16384, 512 * MIB), part(2, LINUX, 16384 + 512 * MIB, 3000 * MIB)];
        let parts = written(&stock, 4096 * MIB, "");
        assert_eq!(parts[0], stock[0]);
        assert!(parts[3].start >= stock[0].end() && is_resident(&parts));
    }

    #[test]
    fn sizes_are_those_of_the_settings() {
        let p1 = part(1, FAT, 8192, 256 * MIB);
        let parts = written(&[p1], 8192 * MIB, "boot.size = \"256MiB\"\nroot.size = \"1GiB\"\nhome.size = \"2GiB\"");
        let sectors: Vec<u64> = parts.iter().map(|part| part.sectors / MIB).collect();
        assert_eq!(sectors, [256, 1024, 2048, 256]);
        let parts = written(&[p1], 8192 * MIB, "home.size = \"1GiB\"");
        assert_eq!(parts[2].sectors, 1024 * MIB);
        assert_eq!(parts[2].end(), 8192 * MIB);
    }

    #[test]
    fn a_large_card_leaves_most_to_home() {
        let parts = written(&[], 512 * 1024 * MIB, "");
        assert_eq!(parts[1].sectors, 32 * 1024 * MIB);
        // More sectors than an MBR can count.
        let parts = written(&[], 1 << 34, "");
        assert!(parts[2].end() <= u64::from(u32::MAX));
    }

    #[test]
    fn a_card_that_is_too_small_is_refused_with_the_size_it_needs() {
        let p1 = part(1, FAT, 8192, 256 * MIB);
        let refused = plan(&[p1], 800 * MIB, &Settings::default()).unwrap_err();
        assert_eq!(refused.reason, "DISK_TOO_SMALL");
        assert!(refused.message.contains("it has 800 MiB, and needs at least 840 MiB"), "{}", refused.message);
        let settings = toml::from_str("root.size = \"4GiB\"").unwrap();
        assert_eq!(plan(&[p1], 4096 * MIB, &settings).unwrap_err().reason, "DISK_TOO_SMALL");
    }

    #[test]
    fn before_an_image_is_written_the_recovery_partition_lies_behind_it() {
        let p1 = part(1, FAT, 8192, 256 * MIB);
        let moved = behind(&[p1], 4097 * MIB, 2000 << 20).unwrap().unwrap();
        assert_eq!(moved, part(1, FAT, 3840 * MIB, 256 * MIB), "at the card's end, aligned");
        assert_eq!(behind(&[moved], 4097 * MIB, 2000 << 20), Ok(None), "it lies there already");
        assert_eq!(behind(&[moved], 4097 * MIB, 3840 << 20), Ok(None));
        let refused = behind(&[p1], 4097 * MIB, (3840 << 20) + 1).unwrap_err();
        assert_eq!(refused.reason, "DISK_TOO_SMALL");
        assert!(refused.message.contains("it has 4097 MiB, and needs 4100 MiB"), "{}", refused.message);
        // The copy must not overwrite its source, however small the image is.
        assert_eq!(behind(&[p1], 400 * MIB, 8 << 20).unwrap_err().reason, "DISK_TOO_SMALL");
        assert_eq!(behind(&[], 4096 * MIB, 8 << 20).unwrap_err().reason, "NO_RECOVERY_PARTITION");
    }

    #[test]
    fn a_recovery_partition_at_the_end_comes_back_to_the_front() {
        let front = part(1, FAT, 8192, 256 * MIB);
        let end = part(1, FAT, 3840 * MIB, 256 * MIB);
        assert_eq!(plan(&[end], 4096 * MIB, &Settings::default()), Ok(Plan::Move(front)));
        // With room behind it, the partition stays.
        let middle = part(1, FAT, 1024 * MIB, 256 * MIB);
        assert_eq!(written(&[middle], 4096 * MIB, "")[0], middle);
    }

    #[test]
    fn image_that_is_larger_than_its_partition_is_refused() {
        let needs = |boot: u64, root: u64| Needs { boot: boot << 20, root: root << 20 };
        let resident = written(&[], 4096 * MIB, "root.size = \"1GiB\"");
        for (needs, what) in
            [(needs(0, 1024), None), (needs(0, 1025), Some("(p2) 1024 MiB")), (needs(513, 1), Some("(p4) 512"))]
        {
            let refused = fits(&resident, needs).map_err(|refusal| (refusal.reason, refusal.message));
            match what {
                None => assert_eq!(refused, Ok(())),
                Some(what) => assert!(refused.is_err_and(|(reason, text)| reason == "NO_ROOM" && text.contains(what))),
            }
        }
        // By default a root has 32 GiB at most, however large the card is.
        let large = written(&[], 512 * 1024 * MIB, "");
        assert!(fits(&large, needs(0, 32 << 10)).is_ok() && fits(&large, needs(0, (32 << 10) + 1)).is_err());
    }

    #[test]
    fn a_gpt_is_refused() {
        let refused = plan(&[part(1, 0xee, 1, 1 << 22)], 4096 * MIB, &Settings::default()).unwrap_err();
        assert_eq!(refused.reason, "PARTITION_TABLE_GPT");
    }
}
