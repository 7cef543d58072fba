//! Repairs the folders that `fatfs` 0.3 creates: long names before `.` and `..`, and in folders of the root a `..` with
//! the root's cluster instead of 0 (Microsoft's FAT32 File System Specification, 6.5). `fsck.vfat` would rename these
//! entries.

use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context as _, Result};

/// Length of a directory entry in bytes.
const ENTRY: usize = 32;
/// First byte of an unused entry that is followed by others.
const DELETED: u8 = 0xe5;

/// Positions of the clusters, from the boot sector.
#[derive(Debug)]
struct Geometry {
    cluster: u64,
    data: u64,
    root: u32,
}

impl Geometry {
    fn read<D: Read + Seek>(disk: &mut D) -> Result<Self> {
        let mut sector = [0; 512];
        disk.seek(SeekFrom::Start(0))?;
        disk.read_exact(&mut sector)?;
        let number = |at: usize, length: usize| {
            let bytes = sector.get(at..at + length).unwrap_or_default();
            bytes.iter().rev().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte))
        };
        let bytes = number(11, 2);
        Ok(Self {
            cluster: number(13, 1) * bytes,
            data: (number(14, 2) + number(16, 1) * number(36, 4)) * bytes,
            root: u32::try_from(number(44, 4))?,
        })
    }

    fn place(&self, cluster: u32) -> u64 {
        self.data + u64::from(cluster.saturating_sub(2)) * self.cluster
    }
}

/// Repairs the first `used` clusters. A new file system uses no others.
pub(super) fn repair<D: Read + Write + Seek>(disk: &mut D, used: u32) -> Result<()> {
    let geometry = Geometry::read(disk).context("cannot read the boot sector")?;
    for number in 2..used.saturating_add(2) {
        let mut head = [[0; ENTRY]; 4];
        disk.seek(SeekFrom::Start(geometry.place(number)))?;
        disk.read_exact(head.as_flattened_mut())?;
        let [_, own, _, parent] = &head;
        // fatfs puts a long name before each of the two, so they are the second and the fourth entry. A file whose
        // contents look like this and contain their own cluster number is practically impossible.
        let is_folder = own.starts_with(b".          \x10") && parent.starts_with(b"..         \x10");
        if !is_folder || cluster_of(own) != number {
            continue;
        }
        let (own, mut parent) = (*own, *parent);
        // The root has no entry of its own. By the specification, `..` to the root is 0.
        if cluster_of(&parent) == geometry.root {
            set_cluster(&mut parent, 0);
        }
        let mut deleted = [0; ENTRY];
        deleted[0] = DELETED;
        disk.seek(SeekFrom::Start(geometry.place(number)))?;
        disk.write_all([own, parent, deleted, deleted].as_flattened())?;
    }
    Ok(())
}

/// Returns the first cluster of an entry: upper half at offset 20, lower half at 26.
fn cluster_of(entry: &[u8; ENTRY]) -> u32 {
    let [a, b] = [entry[20], entry[21]];
    let [c, d] = [entry[26], entry[27]];
    u32::from_le_bytes([c, d, a, b])
}

fn set_cluster(entry: &mut [u8; ENTRY], cluster: u32) {
    let [c, d, a, b] = cluster.to_le_bytes();
    [entry[20], entry[21], entry[26], entry[27]] = [a, b, c, d];
}

#[cfg(test)]
mod tests {
    use super::{ENTRY, cluster_of, set_cluster};

    #[test]
    fn a_cluster_stands_in_two_halves() {
        let mut entry = [0; ENTRY];
        set_cluster(&mut entry, 0x0102_0304);
        assert_eq!((entry[20], entry[26]), (2, 4));
        assert_eq!(cluster_of(&entry), 0x0102_0304);
    }
}
