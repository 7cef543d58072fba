//! The only decision that erases data on a card. A file system is made only with an [`Erasure`], and only this module
//! creates one. Pure.

use super::plan::{EXTENDED, LINUX, Part, Plan};
use super::probe::Contents;
use crate::system::{Erase, Refusal};

/// Permission to make a file system on one partition, whatever it holds.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Erasure(u32);

/// A partition that an installation may have to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The root (p2).
    Root,
    /// Home (p3).
    Home,
}

/// The decisions of an interrupted installation. They still hold: a half-made file system cannot be recognised by its
/// bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Begun {
    /// The root was being made.
    pub(crate) root: bool,
    /// Home was being made.
    pub(crate) home: bool,
}

/// Permissions for the file systems that an installation makes. `None`: the partition is kept.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decided {
    /// The root.
    pub(crate) root: Option<Erasure>,
    /// Home.
    pub(crate) home: Option<Erasure>,
}

impl Place {
    /// Number in the partition table.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Root => 2,
            Self::Home => 3,
        }
    }

    fn erasure(self) -> Erasure {
        Erasure(self.number())
    }

    /// Decides about a partition that no operator asked to erase. `None`: it is kept.
    ///
    /// # Errors
    /// Returns an error if it is neither blank nor a file system that the installer can mount, or if it cannot be read.
    pub(crate) fn unasked(self, contents: &Contents) -> Result<Option<Erasure>, Refusal> {
        let number = self.number();
        let (name, cure) = match self {
            Self::Root => ("root", "install an image, which makes the root anew"),
            Self::Home => ("/home", "save what is on it, and update with --discard-home to have it made anew"),
        };
        let refuse = |reason, message| Err(Refusal { reason, message });
        match (contents, self) {
            (Contents::FileSystem(_), _) => Ok(None),
            // A blank home holds nothing that could be lost. A blank root needs an image.
            (Contents::Nothing, Self::Home) => Ok(Some(self.erasure())),
            (Contents::Nothing, Self::Root) => {
                refuse("ROOT_EMPTY", format!("the root (p2) is empty, and boot files alone make no system: {cure}"))
            }
            (Contents::Unknown(what), _) => refuse(
                "PARTITION_NOT_UNDERSTOOD",
                format!(
                    "{name} (p{number}) is to be kept, and holds {what}, which the installer cannot mount. Nothing was \
                     changed; {cure}"
                ),
            ),
            (Contents::Unreadable(why), _) => refuse(
                "PARTITION_UNREADABLE",
                format!(
                    "{name} (p{number}) is to be kept, and cannot be read: {why}. The card may be failing; nothing was \
                     changed"
                ),
            ),
        }
    }
}

impl Erasure {
    /// Number of the partition.
    pub(crate) fn number(&self) -> u32 {
        self.0
    }

    /// The system's boot partition (p4). Every installation brings all of its files, so nothing there is worth keeping.
    pub(crate) fn of_boot() -> Self {
        Self(4)
    }

    /// The recovery partition of a disk that is blank.
    ///
    /// # Errors
    /// Returns an error if the disk holds data or cannot be read.
    pub(crate) fn of_blank_disk(contents: &Contents) -> Result<Self, Refusal> {
        let why = match contents {
            Contents::Nothing => return Ok(Self(1)),
            Contents::FileSystem(kind) => format!("it holds {kind}"),
            Contents::Unknown(what) => format!("it holds {what}"),
            Contents::Unreadable(why) => format!("it cannot be read: {why}"),
        };
        let message = format!("the disk has no partitions, but is not blank: {why}");
        Err(Refusal { reason: "DISK_NOT_BLANK", message })
    }

    #[cfg(test)]
    pub(crate) fn in_test(number: u32) -> Self {
        Self(number)
    }
}

/// Partitions whose contents decide, since no operator gave permission to erase them.
pub(crate) fn undecided(plan: &Plan, erase: Erase, begun: Begun) -> Vec<Place> {
    // A new table takes these partitions anyway: their contents cannot change the decision.
    if *plan != Plan::Keep {
        return Vec::new();
    }
    let decided = [(Place::Root, erase.root || begun.root), (Place::Home, erase.home || begun.home)];
    decided.into_iter().filter(|(_, decided)| !decided).map(|(place, _)| place).collect()
}

/// Decides what is formatted. `look` returns a partition's contents and is called for the [`undecided`] ones.
///
/// # Errors
/// Returns an error if contents that are to be kept are not understood, or have no place in the new table.
pub(crate) fn decide(
    plan: &Plan,
    parts: &[Part],
    erase: Erase,
    begun: Begun,
    look: impl Fn(Place) -> Contents,
) -> Result<Decided, Refusal> {
    if *plan != Plan::Keep {
        laid_out_anew(parts, erase)?;
        return Ok(Decided { root: Some(Place::Root.erasure()), home: Some(Place::Home.erasure()) });
    }
    let unasked = undecided(plan, erase, begun);
    let of = |place: Place| match place {
        place if unasked.contains(&place) => place.unasked(&look(place)),
        // An interrupted installation was making it for an image. This one brings only boot files.
        Place::Root if !erase.root => place.unasked(&Contents::Nothing),
        place => Ok(Some(place.erasure())),
    };
    Ok(Decided { root: of(Place::Root)?, home: of(Place::Home)? })
}

/// A new table removes every partition but the first. The root may go; any other partition only with permission for
/// home.
fn laid_out_anew(parts: &[Part], erase: Erase) -> Result<(), Refusal> {
    if !erase.root {
        let message = "the card is not in the installer's layout, and laying it out makes the root anew: install an image \
                       instead of boot files alone";
        return Err(Refusal { reason: "LAYOUT_NOT_RESIDENT", message: message.into() });
    }
    match parts.iter().find_map(not_stock) {
        Some(other) if !erase.home => {
            let message = format!(
                "the card is not in the installer's layout, and laying it out would erase {other}: save what is on it, and \
                 update with --discard-home"
            );
            Err(Refusal { reason: "LAYOUT_NOT_UNDERSTOOD", message })
        }
        _ => Ok(()),
    }
}

/// Describes a partition that a stock card does not have. `None`: it is the boot partition or the root of one.
fn not_stock(part: &Part) -> Option<String> {
    let Part { number, kind, .. } = part;
    match (number, kind) {
        (1, _) if part.is_fat() => None,
        (2, &LINUX) => None,
        // The root may be one of the logical partitions. Others in there may hold anything.
        (_, kind) if EXTENDED.contains(kind) => {
            Some(format!("its extended partition {number} with every logical partition in it"))
        }
        (1, _) => Some(format!("its partition 1, which is no FAT (type 0x{kind:02x})")),
        (2, _) => Some(format!("its partition 2, which is no Linux file system (type 0x{kind:02x})")),
        _ => Some(format!("its partition {number}")),
    }
}

/// Checks that the root of the running system is the partition that an installation makes anew as the root.
///
/// # Errors
/// Returns an error if the root is another partition: then nobody gave up p2.
pub(crate) fn root_is_p2(number: u32) -> Result<(), Refusal> {
    if number == Place::Root.number() {
        return Ok(());
    }
    let message = format!(
        "the running system's root is partition {number} of the card, and an installation makes partition 2 anew as the \
         root: nothing says that partition 2 may be erased"
    );
    Err(Refusal { reason: "LAYOUT_NOT_UNDERSTOOD", message })
}

#[cfg(test)]
mod tests {
    use super::super::plan::{FAT, LINUX, Part, Plan};
    use super::super::probe::Contents;
    use super::{Begun, Decided, Erase, Erasure, Place, decide, root_is_p2};

    const IMAGE: Erase = Erase { root: true, home: false };
    const BOOT_ONLY: Erase = Erase { root: false, home: false };
    const ALL: Erase = Erase { root: true, home: true };

    fn on_resident(erase: Erase, begun: Begun, root: &Contents, home: &Contents) -> Result<Decided, &'static str> {
        let look = |place| if place == Place::Root { root.clone() } else { home.clone() };
        decide(&Plan::Keep, &[], erase, begun, look).map_err(|refusal| refusal.reason)
    }

    #[test]
    fn what_is_kept_and_not_understood_is_refused() {
        let (ext4, luks) = (Contents::FileSystem("ext4"), Contents::Unknown("crypto_LUKS".into()));
        let broken = Contents::Unreadable("Input/output error".into());
        let none = Begun::default();
        for (contents, reason) in [(&luks, "PARTITION_NOT_UNDERSTOOD"), (&broken, "PARTITION_UNREADABLE")] {
            assert_eq!(on_resident(IMAGE, none, &ext4, contents), Err(reason));
            assert_eq!(on_resident(BOOT_ONLY, none, &ext4, contents), Err(reason));
            assert_eq!(on_resident(BOOT_ONLY, none, contents, &ext4), Err(reason));
            // The operator asked for it explicitly.
            let all = Decided { root: Some(Erasure(2)), home: Some(Erasure(3)) };
            assert_eq!(on_resident(ALL, none, contents, contents), Ok(all));
        }
        let kept = Decided { root: None, home: None };
        assert_eq!(on_resident(BOOT_ONLY, none, &ext4, &ext4), Ok(kept));
        assert_eq!(on_resident(BOOT_ONLY, none, &Contents::Nothing, &ext4), Err("ROOT_EMPTY"));
    }

    #[test]
    fn only_a_blank_home_is_made_without_being_asked_for() {
        let root = Contents::FileSystem("ext4");
        let decided = on_resident(IMAGE, Begun::default(), &root, &Contents::Nothing).unwrap();
        assert_eq!(decided.home, Some(Erasure(3)));
        // A home that was being made can hold anything, and is still decided.
        let half = Contents::Unknown("data of no known kind".into());
        let begun = Begun { root: false, home: true };
        assert_eq!(on_resident(IMAGE, begun, &root, &half).unwrap().home, Some(Erasure(3)));
        let begun = Begun { root: true, home: false };
        assert_eq!(on_resident(IMAGE, begun, &half, &root).unwrap().root, Some(Erasure(2)));
        assert_eq!(on_resident(BOOT_ONLY, begun, &half, &root), Err("ROOT_EMPTY"));
    }

    #[test]
    fn a_new_table_erases_no_partition_that_nobody_gave_up() {
        let of_kind = |number, kind| Part { number, kind, start: u64::from(number) << 13, sectors: 1 << 13 };
        let part = |number| of_kind(number, if number == 1 { FAT } else { LINUX });
        let plan = Plan::Write(Vec::new());
        let look = |_| panic!("a card that is laid out anew is not looked at");
        let reason = |parts: &[Part], erase| {
            decide(&plan, parts, erase, Begun::default(), look).map_err(|refusal| refusal.reason).err()
        };
        let (stock, more) = ([part(1), part(2)], [part(1), part(2), part(3)]);
        assert_eq!(reason(&stock, IMAGE), None);
        assert_eq!(reason(&stock, BOOT_ONLY), Some("LAYOUT_NOT_RESIDENT"));
        assert_eq!(reason(&more, IMAGE), Some("LAYOUT_NOT_UNDERSTOOD"));
        assert_eq!(reason(&more, ALL), None);
        // Extended (two types of it), LVM, RAID, NTFS, swap.
        for kind in [0x05, 0x0f, 0x8e, 0xfd, 0x07, 0x82] {
            let other = [part(1), of_kind(2, kind)];
            assert_eq!(reason(&other, IMAGE), Some("LAYOUT_NOT_UNDERSTOOD"), "{kind:#x}");
            assert_eq!(reason(&other, ALL), None, "{kind:#x}");
        }
        assert_eq!(reason(&[of_kind(1, LINUX), part(2)], IMAGE), Some("LAYOUT_NOT_UNDERSTOOD"));
        assert_eq!(reason(&[part(1)], IMAGE), None);
    }

    #[test]
    fn root_of_another_number_is_refused() {
        assert_eq!(root_is_p2(2), Ok(()));
        assert_eq!(root_is_p2(5).unwrap_err().reason, "LAYOUT_NOT_UNDERSTOOD");
    }

    #[test]
    fn a_disk_without_partitions_is_not_blank_for_that() {
        assert_eq!(Erasure::of_blank_disk(&Contents::Nothing), Ok(Erasure(1)));
        for contents in [
            Contents::FileSystem("ext4"),
            Contents::Unknown("LVM2_member".into()),
            Contents::Unreadable("Input/output error".into()),
        ] {
            assert_eq!(Erasure::of_blank_disk(&contents).unwrap_err().reason, "DISK_NOT_BLANK");
        }
    }
}
