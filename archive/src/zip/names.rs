//! Rules for names: storable on FAT, and unique there.

use std::collections::HashMap;

use crate::Reason;

/// Maximum length of a path in bytes.
const MAX_PATH: usize = 1024;
/// Maximum length of a path's part in UTF-16 units: VFAT's limit.
const MAX_PART: usize = 255;

/// Maximum number of parts of a path. Our sets use two.
const MAX_DEPTH: usize = 16;

/// Names seen so far, by the form in which FAT compares them.
#[derive(Debug, Default)]
pub(super) struct Names(HashMap<String, Seen>);

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    spelling: String,
    folder: bool,
    /// False for a parent that was only implied by its children.
    listed: bool,
}

impl Names {
    /// Adds a name, or returns the rule that it breaks.
    pub(super) fn add(&mut self, name: &str, folder: bool) -> Result<(), Reason> {
        check(name)?;
        let parents = name.match_indices('/').filter_map(|(at, _)| name.get(..at));
        for parent in parents {
            self.put(parent, true, false)?;
        }
        self.put(name, folder, true)
    }

    fn put(&mut self, name: &str, folder: bool, listed: bool) -> Result<(), Reason> {
        // Both conversions: some letters have several lower-case forms and must compare equal.
        let folded = name.to_uppercase().to_lowercase();
        // A parent with another spelling is refused too: on FAT the two folders are one.
        let seen = self.0.entry(folded).or_insert_with(|| Seen { spelling: name.to_owned(), folder, listed: false });
        if seen.spelling != name || (listed && seen.listed) {
            return Err(Reason::Duplicate);
        }
        if seen.folder != folder {
            return Err(Reason::FileAndFolder);
        }
        seen.listed |= listed;
        Ok(())
    }
}

fn check(name: &str) -> Result<(), Reason> {
    if name.is_empty() {
        return Err(Reason::EmptyName);
    }
    if name.len() > MAX_PATH {
        return Err(Reason::LongName(MAX_PATH));
    }
    if name.contains('\\') {
        return Err(Reason::Backslash);
    }
    if name.chars().any(char::is_control) {
        return Err(Reason::ControlCharacter);
    }
    // A drive letter makes a path absolute for readers on Windows.
    if name.starts_with('/') || name.as_bytes().get(1) == Some(&b':') {
        return Err(Reason::AbsolutePath);
    }
    name.split('/').try_for_each(check_part)?;
    if name.split('/').count() > MAX_DEPTH {
        return Err(Reason::Depth(MAX_DEPTH));
    }
    Ok(())
}

fn check_part(part: &str) -> Result<(), Reason> {
    match part {
        ".." => return Err(Reason::ParentPath),
        "" | "." => return Err(Reason::OddPath),
        _ => {}
    }
    if part.encode_utf16().count() > MAX_PART {
        return Err(Reason::LongName(MAX_PART));
    }
    if part.contains(['<', '>', ':', '"', '|', '?', '*']) {
        return Err(Reason::FatName("it has one of < > : \" | ? *"));
    }
    // VFAT drops dots and spaces at the end, so two names would become one.
    if part.ends_with(['.', ' ']) || part.starts_with(' ') {
        return Err(Reason::FatName("it begins with a space, or ends with a dot or a space"));
    }
    let stem = part.split('.').next().unwrap_or(part).trim_end();
    if is_device(stem) {
        return Err(Reason::FatName("it is a reserved device name"));
    }
    // VFAT gives long names short aliases like `LONGNA~1`. A file of that name would open and replace the other file.
    if let Some((head, tail)) = stem.rsplit_once('~')
        && stem.len() <= 8
        && !head.is_empty()
        && tail.bytes().next().is_some_and(|first| first.is_ascii_digit())
    {
        return Err(Reason::FatName("it looks like the short alias of another name"));
    }
    Ok(())
}

fn is_device(stem: &str) -> bool {
    let stem = stem.to_ascii_uppercase();
    let numbered = |prefix| {
        stem.strip_prefix(prefix).is_some_and(|rest: &str| rest.len() == 1 && rest.bytes().all(|b| b.is_ascii_digit()))
    };
    matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL") || numbered("COM") || numbered("LPT")
}
