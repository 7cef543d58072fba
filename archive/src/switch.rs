//! The two files of a recovery partition that say what boots, `config.txt` and `autoboot.txt`. Whoever writes a card and
//! whoever switches it keep them at one length, so that each switch is one write in place.

/// Length of both files: one sector less one byte, and the firmware reads no more of `autoboot.txt`.
pub const LENGTH: usize = 511;
/// The first line of `config.txt`, which tells people and agents who made it.
pub const HEAD: &str = "# Marco Bootstrap writes this\n";
/// The firmware ignores what is behind this many characters of a line.
pub const LINE: usize = 98;
/// The partition with the installer.
pub const INSTALLER: u32 = 1;
/// The partition with the system's boot files.
pub const SYSTEM: u32 = 4;

/// A text does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.txt of the recovery partition would have {length} bytes, and may have {LENGTH}")]
pub struct TooLong {
    /// How many bytes it has.
    pub length: usize,
}

/// Pads a text to its length with comments, which every stage of the firmware skips.
///
/// # Errors
/// It is longer than that.
pub fn pad(mut text: String) -> Result<Vec<u8>, TooLong> {
    if text.len() > LENGTH {
        return Err(TooLong { length: text.len() });
    }
    while text.len() < LENGTH {
        let line = (LENGTH - text.len()).min(LINE);
        text.push_str(&"#".repeat(line - 1));
        text.push('\n');
    }
    Ok(text.into_bytes())
}

/// `autoboot.txt`: which partition boots, and which one on trial.
pub fn autoboot_txt(partition: u32, trial: u32) -> Vec<u8> {
    let text = format!("[all]\ntryboot_a_b=1\nboot_partition={partition}\n[tryboot]\nboot_partition={trial}\n");
    // Two numbers of any length fit.
    pad(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{INSTALLER, LENGTH, LINE, SYSTEM, TooLong, autoboot_txt, pad};

    #[test]
    fn every_text_gets_the_same_length_and_no_line_is_longer_than_the_firmware_reads() {
        for text in [
            autoboot_txt(INSTALLER, SYSTEM),
            autoboot_txt(u32::MAX, u32::MAX),
            pad(String::new()).unwrap(),
            pad("x".repeat(LENGTH - 1)).unwrap(),
        ] {
            assert_eq!((text.len(), text.last()), (LENGTH, Some(&b'\n')));
        }
        let padded = String::from_utf8(pad("a=1\n".to_owned()).unwrap()).unwrap();
        assert!(padded.lines().skip(1).all(|line| line.len() < LINE && line.bytes().all(|byte| byte == b'#')));
        assert_eq!(pad("x".repeat(LENGTH + 1)), Err(TooLong { length: LENGTH + 1 }));
    }
}
