//! POSIX ACLs. Converts the text of a pax header (`SCHILY.acl.access`, written by GNU tar and libarchive: acl(5), "ACL
//! text forms") into the kernel's extended attribute (acl(5); linux/posix_acl_xattr.h).

/// Version of the attribute's format.
const VERSION: u32 = 2;
/// Id for entries that name no user or group.
const NOBODY: u32 = u32::MAX;
/// Maximum number of entries. No file system accepts more.
const MAX_ENTRIES: usize = 8192;

/// Tags of the entries, in the order that the kernel requires.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    UserOwner,
    User,
    GroupOwner,
    Group,
    Mask,
    Other,
}

/// Converts an ACL to the attribute's value. `None`: the text names users or groups without numbers, or is malformed.
/// Names belong to the machine that packed the archive and may mean other users here.
pub(super) fn attribute(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let mut entries = Vec::new();
    for line in text.split(['\n', ',']).map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if !line.is_empty() {
            entries.push(entry(line)?);
        }
    }
    if entries.is_empty() || entries.len() > MAX_ENTRIES {
        return None;
    }
    // The kernel refuses an attribute whose entries are out of order.
    entries.sort_unstable();
    let mut value = VERSION.to_le_bytes().to_vec();
    for (tag, id, permissions) in entries {
        let tag: u16 = match tag {
            Tag::UserOwner => 0x01,
            Tag::User => 0x02,
            Tag::GroupOwner => 0x04,
            Tag::Group => 0x08,
            Tag::Mask => 0x10,
            Tag::Other => 0x20,
        };
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    Some(value)
}

/// Parses `user:1000:rwx`, or `user:name:rwx:1000` as written by star and libarchive.
fn entry(line: &str) -> Option<(Tag, u32, u16)> {
    let mut fields = line.split(':');
    let (kind, who, permissions) = (fields.next()?, fields.next()?, fields.next()?);
    let number = |text: &str| text.parse::<u32>().ok().filter(|id| *id != NOBODY);
    let mut id = || fields.next().and_then(number).or_else(|| number(who));
    let (tag, id) = match (kind, who.is_empty()) {
        ("user" | "u", true) => (Tag::UserOwner, NOBODY),
        ("user" | "u", false) => (Tag::User, id()?),
        ("group" | "g", true) => (Tag::GroupOwner, NOBODY),
        ("group" | "g", false) => (Tag::Group, id()?),
        ("mask" | "m", true) => (Tag::Mask, NOBODY),
        ("other" | "o", true) => (Tag::Other, NOBODY),
        _ => return None,
    };
    let mut bits = 0;
    for letter in permissions.chars() {
        bits |= match letter {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    Some((tag, id, bits))
}

#[cfg(test)]
mod tests {
    use super::attribute;

    #[test]
    fn an_acl_becomes_what_the_kernel_keeps() {
        let value = [
            &[2, 0, 0, 0][..],
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 7, 0, 0xe8, 3, 0, 0],
            &[4, 0, 4, 0, 255, 255, 255, 255],
            &[16, 0, 7, 0, 255, 255, 255, 255],
            &[32, 0, 4, 0, 255, 255, 255, 255],
        ]
        .concat();
        let gnu = b"user::rw-\nuser:1000:rwx\t#effective:r--\ngroup::r--\nmask::rwx\nother::r--\n";
        assert_eq!(attribute(gnu), Some(value.clone()));
        assert_eq!(attribute(b"other::r--,mask::rwx,group::r--,user:pi:rwx:1000,user::rw-"), Some(value));
    }

    #[test]
    fn names_of_another_machine_are_not_guessed() {
        for text in [&b"user::rw-\nuser:pi:rwx\n"[..], b"", b"user", b"user::rwz", b"role:1:rwx", b"\xff"] {
            assert_eq!(attribute(text), None);
        }
    }
}
