//! Programs that the installer runs, with their libraries.

use anyhow::{Context as _, Result, bail};

use super::cpio::{Node, Tree, put};
use super::elf::Binary;
use super::source::Source;
use crate::args::Arch;

/// Path in the initramfs, true if the installer requires it, and the Debian package that contains it.
const PROGRAMS: [(&str, bool, &str); 7] = [
    ("/bin/busybox", true, "busybox-static"),
    ("/sbin/mke2fs", true, "e2fsprogs"),
    ("/sbin/e2fsck", true, "e2fsprogs"),
    ("/sbin/resize2fs", true, "e2fsprogs"),
    ("/sbin/mkfs.vfat", true, "dosfstools"),
    ("/sbin/fsck.vfat", false, "dosfstools"),
    // Identifies the contents of a partition before the decision to keep it.
    ("/sbin/blkid", true, "util-linux"),
];

/// Adds the programs and `extra` ones (by path) to the tree. They must run on a kernel of this architecture.
pub(super) fn add(tree: &mut Tree, source: &Source, kernel: Arch, extra: &[String]) -> Result<()> {
    for (path, must, package) in PROGRAMS {
        match source.read(path)? {
            Some(bytes) => add_binary(tree, source, kernel, path, bytes)?,
            None if must => bail!("there is no {path} in what --root and --package name: Debian's {package} has it"),
            None => {}
        }
    }
    // e2fsprogs installs this usual name as a link, too.
    put(tree, "/sbin/mkfs.ext4", Node::Link("mke2fs".to_owned()));
    for path in extra {
        let bytes =
            source.read(path)?.with_context(|| format!("there is no {path} in what --root and --package name"))?;
        add_binary(tree, source, kernel, path, bytes)?;
    }
    match source.read("/etc/mke2fs.conf")? {
        Some(text) => put(tree, "/etc/mke2fs.conf", Node::File(text, false)),
        None => bail!("there is no /etc/mke2fs.conf in what --root and --package name: Debian's e2fsprogs has it"),
    }
    Ok(())
}

/// Adds a program or a library, and recursively the libraries that it needs.
fn add_binary(tree: &mut Tree, source: &Source, kernel: Arch, path: &str, bytes: Vec<u8>) -> Result<()> {
    let binary = Binary::parse(&bytes).with_context(|| path.to_owned())?;
    // Checked here, because on a board the program would only fail to start.
    if !kernel.runs(binary.arch) {
        bail!("{path} is for {}, which a kernel for {kernel} does not run", binary.arch);
    }
    put(tree, path, Node::File(bytes, true));
    if let Some(loader) = &binary.loader
        && !tree.contains_key(loader.trim_matches('/'))
    {
        let bytes = source.read(loader)?.with_context(|| missing(path, loader))?;
        put(tree, loader, Node::File(bytes, true));
    }
    for name in &binary.needed {
        let folders = folders(&binary, path);
        // The loader is also a library. It lies at the path that the program names.
        let there = |folder: &String| tree.contains_key(format!("{folder}/{name}").trim_matches('/'));
        let is_loader = |path: &String| name.starts_with("ld-") && path.ends_with(&format!("/{name}"));
        if folders.iter().any(there) || tree.keys().any(is_loader) {
            continue;
        }
        // Searched in the loader's order, so the library is the one that the program uses on the source's system.
        let mut found = None;
        for folder in &folders {
            let place = format!("{folder}/{name}");
            if let Some(bytes) = source.read(&place)? {
                found = Some((place, bytes));
                break;
            }
        }
        let (place, bytes) = found.with_context(|| missing(path, name))?;
        add_binary(tree, source, kernel, &place, bytes)?;
    }
    Ok(())
}

fn missing(path: &str, name: &str) -> String {
    format!(
        "{path} needs {name}, which is not in what --root and --package name (its package, and that of libc, are needed too)"
    )
}

/// Returns the folders in which the loader looks for a binary's libraries, in order (ld.so(8)).
fn folders(binary: &Binary, path: &str) -> Vec<String> {
    let origin = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let own = binary.runpath.iter().map(|folder| folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin));
    let triplet = match binary.arch {
        Arch::Amd64 => "x86_64-linux-gnu",
        Arch::Arm64 => "aarch64-linux-gnu",
        Arch::Armhf => "arm-linux-gnueabihf",
        Arch::Armel => "arm-linux-gnueabi",
    };
    let usual = [format!("/lib/{triplet}"), format!("/usr/lib/{triplet}"), "/lib64".to_owned(), "/lib".to_owned()];
    own.chain(usual).map(|folder| folder.trim_end_matches('/').to_owned()).collect()
}
