//! pax extended headers: records of the form `LENGTH KEY=VALUE`, one per line.

use super::acl;
use crate::Reason;

/// The values of an extended header that apply to the next member. `None`: the header's own value applies.
#[derive(Debug, Default)]
pub(super) struct Extended {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    /// Seconds since the Unix epoch, and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    /// Extended attributes as pairs of name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Number of ACLs that cannot be restored.
    pub lost: u64,
    pub sparse: Option<Sparse>,
}

/// Keys of GNU's sparse formats 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// The map of format 0.1: `offset,length,offset,length...`.
    pub map: Option<Vec<u8>>,
}

const XATTR: &[u8] = b"SCHILY.xattr.";
const SPARSE: &[u8] = b"GNU.sparse.";
const ACL: &[u8] = b"SCHILY.acl.";

impl Extended {
    /// Parses the records of one member's header.
    pub(super) fn parse(data: &[u8]) -> Result<Self, Reason> {
        let mut extended = Self::default();
        for record in Records(data) {
            let (key, value) = record?;
            extended.take(key, value)?;
        }
        Ok(extended)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Reason> {
        match key {
            b"path" => once(&mut self.path, name(value)?),
            b"linkpath" => once(&mut self.link, name(value)?),
            b"size" => once(&mut self.size, decimal(value)?),
            b"uid" => once(&mut self.uid, decimal(value)?),
            b"gid" => once(&mut self.gid, decimal(value)?),
            b"mtime" => once(&mut self.mtime, time(value)?),
            b"SCHILY.acl.access" => self.take_acl(b"system.posix_acl_access", value),
            b"SCHILY.acl.default" => self.take_acl(b"system.posix_acl_default", value),
            // Other writers' keys for sparse files. Ignoring them would change the meaning of the data.
            b"SCHILY.realsize" | b"SUN.holesdata" => Err(Reason::Sparse),
            _ => {
                if let Some(attribute) = key.strip_prefix(XATTR) {
                    if attribute.is_empty() || attribute.len() > 255 || attribute.contains(&0) {
                        return Err(Reason::Damaged("an extended attribute has no valid name".to_owned()));
                    }
                    self.xattrs.push((attribute.to_vec(), value.to_vec()));
                } else if let Some(key) = key.strip_prefix(SPARSE) {
                    return self.sparse.get_or_insert_default().take(key, value);
                }
                // All other keys (atime, comment, owner names, private keys) do not change the unpacked files.
                Ok(())
            }
        }
    }
}

impl Extended {
    fn take_acl(&mut self, name: &[u8], text: &[u8]) -> Result<(), Reason> {
        // Some writers store the ACL twice: as text and as the attribute itself. The attribute is exact.
        if !self.xattrs.iter().any(|(known, _)| known == name) {
            match acl::attribute(text) {
                Some(value) => self.xattrs.push((name.to_vec(), value)),
                None => self.lost += 1,
            }
        }
        Ok(())
    }
}

impl Sparse {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Reason> {
        match key {
            b"major" => once(&mut self.major, decimal(value)?),
            b"minor" => once(&mut self.minor, decimal(value)?),
            b"name" => once(&mut self.name, name(value)?),
            b"realsize" | b"size" => once(&mut self.real_size, decimal(value)?),
            b"map" => once(&mut self.map, value.to_vec()),
            b"numblocks" => Ok(()),
            // Format 0.0 repeats `offset` and `numbytes`. No current writer produces it.
            _ => Err(Reason::Sparse),
        }
    }
}

/// Checks a global header, which applies to all members that follow. Comments are accepted. Keys that would change
/// names, sizes or attributes are refused.
pub(super) fn check_global(data: &[u8]) -> Result<(), Reason> {
    for record in Records(data) {
        let (key, _) = record?;
        let changes = matches!(key, b"path" | b"linkpath" | b"size" | b"SCHILY.realsize" | b"SUN.holesdata");
        if changes || key.starts_with(SPARSE) || key.starts_with(XATTR) || key.starts_with(ACL) {
            return Err(Reason::Damaged("a global header changes names, sizes or attributes".to_owned()));
        }
    }
    Ok(())
}

struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), Reason>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = self.split();
        if record.is_none() {
            self.0 = &[];
        }
        Some(record.ok_or_else(|| Reason::Damaged("an extended header is malformed".to_owned())))
    }
}

impl<'a> Records<'a> {
    fn split(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        // A length has few digits. Searching further would only let a malformed record scan the whole header.
        let blank = self.0.iter().take(20).position(|&byte| byte == b' ')?;
        let length = usize::try_from(decimal(self.0.get(..blank)?).ok()?).ok()?;
        let record = self.0.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        self.0 = self.0.get(length..)?;
        Some((record.get(..equals)?, record.get(equals + 1..)?))
    }
}

/// Sets a value once. Readers disagree on a repeated key: some use the first value, others the last.
fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), Reason> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Reason::Damaged("an extended header has a key twice".to_owned())),
    }
}

fn name(value: &[u8]) -> Result<Vec<u8>, Reason> {
    if value.is_empty() { Err(Reason::EmptyName) } else { Ok(value.to_vec()) }
}

pub(super) fn decimal(value: &[u8]) -> Result<u64, Reason> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let number = digits.then(|| std::str::from_utf8(value).ok()?.parse().ok()).flatten();
    number.ok_or_else(|| Reason::Damaged("an extended header has a value that is no number".to_owned()))
}

fn time(value: &[u8]) -> Result<(i64, u32), Reason> {
    let wrong = || Reason::Damaged("an extended header has a time that is none".to_owned());
    let text = std::str::from_utf8(value).map_err(|_| wrong())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| wrong())?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().map_err(|_| wrong())?;
    if whole.starts_with('-') && nanos > 0 {
        // -1.25 s is 0.75 s after -2 s.
        return Ok((seconds.checked_sub(1).ok_or_else(wrong)?, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}
