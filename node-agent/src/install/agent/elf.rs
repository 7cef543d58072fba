//! The processor that a program is for, by its ELF header.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::system::rooted::Rooted;

/// Bytes of the header up to `e_machine` (elf(5)).
const HEADER: usize = 20;
/// Programs of a system, one of which is no script.
const PROGRAMS: [&str; 6] =
    ["sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd", "bin/init", "usr/bin/env", "bin/sh"];

/// Class, byte order and machine of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Processor {
    class: u8,
    order: u8,
    machine: [u8; 2],
}

impl Processor {
    /// `None`: it is no ELF file, or cannot be read.
    fn of(mut file: File) -> Option<Self> {
        let mut header = [0; HEADER];
        file.read_exact(&mut header).ok()?;
        match header {
            [0x7f, b'E', b'L', b'F', class, order, .., low, high] => Some(Self { class, order, machine: [low, high] }),
            _ => None,
        }
    }
}

/// True if the program is for the processor of this root's own programs, or nothing tells. A kernel of 64 bits may run one
/// of 32 bits, but not each kernel does: one with pages of 16 KiB does not.
pub(in crate::install) fn fits(program: &Path, root: &Rooted) -> bool {
    let theirs = PROGRAMS.iter().find_map(|path| root.open_file(path).ok().and_then(Processor::of));
    let ours = File::open(program).ok().and_then(Processor::of);
    theirs.is_none() || ours.is_none() || theirs == ours
}

#[cfg(test)]
pub(in crate::install) mod tests {
    use std::fs;

    use super::fits;
    use crate::system::rooted::Rooted;

    /// A header of this class (1: 32 bits, 2: 64 bits) and machine (40: ARM, 183: AArch64).
    pub(in crate::install) fn header(class: u8, machine: u8) -> Vec<u8> {
        let mut bytes = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
        bytes.resize(18, 0);
        bytes.extend([machine, 0, 0, 0]);
        bytes
    }

    #[test]
    fn program_for_another_processor_does_not_fit() {
        let dir = tempfile::tempdir().unwrap();
        let (program, root) = (dir.path().join("program"), dir.path().join("root"));
        fs::create_dir_all(root.join("sbin")).unwrap();
        let rooted = Rooted::open(&root).unwrap();
        fs::write(&program, header(2, 183)).unwrap();
        assert!(fits(&program, &rooted), "the root is empty");
        for (theirs, fit) in [(header(2, 183), true), (header(1, 40), false), (b"#!/bin/sh\n".to_vec(), true)] {
            fs::write(root.join("sbin/init"), &theirs).unwrap();
            assert_eq!(fits(&program, &rooted), fit, "{theirs:?}");
        }
        fs::create_dir_all(root.join("usr/lib/systemd")).unwrap();
        fs::write(root.join("usr/lib/systemd/systemd"), header(1, 40)).unwrap();
        assert!(!fits(&program, &rooted), "init is a script");
        fs::write(&program, "no program").unwrap();
        assert!(fits(&program, &rooted), "nothing tells");
    }
}
