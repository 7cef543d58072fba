//! A header block of 512 bytes, as specified by POSIX (`pax`, "ustar Interchange Format") and GNU tar's manual.

use crate::Reason;

/// Size of a block in bytes.
pub(super) const BLOCK: usize = 512;
/// Longest path or link target in bytes: Linux' PATH_MAX without its NUL.
pub(super) const MAX_PATH: usize = 4095;

pub(super) type Block = [u8; BLOCK];

/// The header fields that all formats share.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub typeflag: u8,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Size in bytes as written in this header. An extended header may give another one, and the two are compared.
    pub size: u64,
    pub mtime: i64,
    pub device: (u32, u32),
}

impl Header {
    /// Parses a block that is not all zeros.
    pub(super) fn parse(block: &Block) -> Result<Self, Reason> {
        let field = |from: usize, len: usize| block.get(from..from + len).unwrap_or_default();
        let stored = number(field(148, 8))?;
        let sum: u64 = block
            .iter()
            .enumerate()
            // POSIX: the checksum is computed with its own field taken as blanks.
            .map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { u64::from(byte) })
            .sum();
        if stored != sum {
            return Err(Reason::Damaged("a header's checksum does not match".to_owned()));
        }
        let magic = field(257, 6);
        let posix = magic == b"ustar\0";
        let mut path = text(field(0, 100)).to_vec();
        if posix {
            // Schilling's star marks its headers at the end, and stores times in the last bytes of the prefix.
            let prefix = text(field(345, if field(508, 4) == b"tar\0" { 131 } else { 155 }));
            if !prefix.is_empty() {
                path = [prefix, b"/", &path].concat();
            }
        }
        let typeflag = field(156, 1).first().copied().unwrap_or_default();
        let device =
            // Older headers have no device fields. Their bytes may hold anything.
            if posix || magic == b"ustar " { (number(field(329, 8))?, number(field(337, 8))?) } else { (0, 0) };
        let small = |value: u64, what: &str| {
            u32::try_from(value).map_err(|_| Reason::Damaged(format!("its {what} is too large")))
        };
        Ok(Self {
            typeflag,
            path,
            link: text(field(157, 100)).to_vec(),
            mode: small(number(field(100, 8))?, "mode")? & 0o7777,
            uid: number(field(108, 8))?,
            gid: number(field(116, 8))?,
            size: number(field(124, 12))?,
            mtime: time(field(136, 12))?,
            device: (small(device.0, "device number")?, small(device.1, "device number")?),
        })
    }
}

/// Returns a field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Parses a number: octal digits surrounded by blanks and NULs, or base 256 if the highest bit is set (GNU).
pub(super) fn number(field: &[u8]) -> Result<u64, Reason> {
    let wrong = || Reason::Damaged("a header has a field that is no number".to_owned());
    if let [0x80, rest @ ..] = field {
        return rest.iter().try_fold(
            0_u64,
            |sum, &byte| {
                if sum >> 56 == 0 { Ok(sum << 8 | u64::from(byte)) } else { Err(wrong()) }
            },
        );
    }
    let digits = field.trim_ascii_start();
    let end = digits.iter().position(|&byte| byte == 0 || byte == b' ').unwrap_or(digits.len());
    let (digits, rest) = digits.split_at_checked(end).ok_or_else(wrong)?;
    // Digits after a blank are refused: readers differ on whether the number continues.
    if !rest.iter().all(|&byte| byte == 0 || byte == b' ') {
        return Err(wrong());
    }
    digits.iter().try_fold(0_u64, |sum, &byte| match byte {
        b'0'..=b'7' if sum >> 61 == 0 => Ok(sum << 3 | u64::from(byte - b'0')),
        _ => Err(wrong()),
    })
}

/// Parses a time. Unlike other numbers, a time in base 256 may be negative.
fn time(field: &[u8]) -> Result<i64, Reason> {
    let wrong = || Reason::Damaged("a header's time is out of range".to_owned());
    if field.first() == Some(&0xff) {
        // Two's complement. The sign fills the upper bytes.
        let low = field.get(field.len().saturating_sub(8)..).and_then(|low| <[u8; 8]>::try_from(low).ok());
        return low.map(i64::from_be_bytes).filter(|time| *time < 0).ok_or_else(wrong);
    }
    i64::try_from(number(field)?).map_err(|_| wrong())
}
