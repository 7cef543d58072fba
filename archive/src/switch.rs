//! The two files of the recovery partition that select what boots: `config.txt` and `autoboot.txt`. Both keep one fixed
//! length, so each switch is one write in place, without a change to the FAT.

/// Length of both files in bytes: one sector less one byte. The firmware reads no more of `autoboot.txt`.
pub const LENGTH: usize = 511;
/// First line of `config.txt`. It tells people and agents that the file is ours.
pub const HEAD: &str = "# Marco Bootstrap writes this\n";
/// The firmware ignores the rest of a line after this many characters.
pub const LINE: usize = 98;
/// Number of the partition with the installer.
pub const INSTALLER: u32 = 1;
/// Number of the partition with the system's boot files.
pub const SYSTEM: u32 = 4;

/// The text does not fit into [`LENGTH`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.txt of the recovery partition would have {length} bytes, and may have {LENGTH}")]
pub struct TooLong {
    /// Length of the text in bytes.
    pub length: usize,
}

/// Pads a text to [`LENGTH`] with comments, which every stage of the firmware skips.
///
/// # Errors
/// Returns an error if the text is longer than [`LENGTH`].
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

/// Renders `autoboot.txt` with the default partition and the partition for a trial boot.
pub fn autoboot_txt(partition: u32, trial: u32) -> Vec<u8> {
    let text = format!("[all]\ntryboot_a_b=1\nboot_partition={partition}\n[tryboot]\nboot_partition={trial}\n");
    // Two numbers of any length fit, so the default is never used.
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
