//! Writer for initramfs archives, format `newc` (Linux documentation, "initramfs buffer format").

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// An entry of the initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    /// A folder.
    Folder,
    /// A file: contents, and true if it is executable.
    File(Vec<u8>, bool),
    /// A symbolic link to this target.
    Link(String),
    /// A character device: major and minor number.
    Device(u32, u32),
}

/// Entries by path without a leading slash. The order puts a folder before its contents, as the kernel requires.
pub(crate) type Tree = BTreeMap<String, Node>;

/// Adds an entry, with its parent folders.
pub(crate) fn put(tree: &mut Tree, path: &str, node: Node) {
    let path = path.trim_matches('/');
    for (at, _) in path.match_indices('/') {
        let (folder, _) = path.split_at(at);
        // The kernel does not create missing parents.
        tree.entry(folder.to_owned()).or_insert(Node::Folder);
    }
    tree.insert(path.to_owned(), node);
}

/// Renders the archive. `time` (seconds since 1970) is the time of all entries, and root owns them.
pub(crate) fn write(tree: &Tree, time: u32) -> Vec<u8> {
    let mut archive = Vec::new();
    // Inode numbers count up, so no two entries look like hard links of one file.
    for (number, (path, node)) in (1_u32..).zip(tree) {
        let (mode, links, device, data) = match node {
            Node::Folder => (0o040_755, 2, (0, 0), [].as_slice()),
            Node::File(data, executable) => {
                (if *executable { 0o100_755 } else { 0o100_644 }, 1, (0, 0), data.as_slice())
            }
            Node::Link(target) => (0o120_777, 1, (0, 0), target.as_bytes()),
            Node::Device(major, minor) => (0o020_600, 1, (*major, *minor), [].as_slice()),
        };
        entry(&mut archive, path, &[number, mode, 0, 0, links, time], device, data);
    }
    // The format's end mark is an entry with this name.
    entry(&mut archive, "TRAILER!!!", &[0, 0, 0, 0, 1, 0], (0, 0), &[]);
    archive
}

/// Appends an entry. `first`: inode, mode, owner, group, links, time.
fn entry(archive: &mut Vec<u8>, path: &str, first: &[u32; 6], device: (u32, u32), data: &[u8]) {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let mut header = String::from("070701");
    let rest = [length(data.len()), 0, 0, device.0, device.1, length(path.len() + 1), 0];
    for number in first.iter().chain(&rest) {
        let _ = write!(header, "{number:08x}");
    }
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(path.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::{Node, Tree, put, write};

    #[test]
    fn entries_are_aligned_and_folders_come_first() {
        let mut tree = Tree::new();
        put(&mut tree, "/usr/bin/agent", Node::File(b"x".to_vec(), true));
        put(&mut tree, "init", Node::Link("there".to_owned()));
        let archive = write(&tree, 7);
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("init\0") < at("usr\0") && at("usr\0") < at("usr/bin\0") && at("usr/bin\0") < at("usr/bin/agent\0"));
        assert!(text.starts_with("070701000000010000a1ff0000000000000000000000010000000700000005"), "{text}");
        assert!(text.contains("TRAILER!!!"));
    }
}
