//! The initramfs: the agent as first process, the programs that it runs, and the modules that it loads.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::boards;
use super::cpio::{Node, Tree, put};
use super::elf::Binary;
use super::kernel::Kernel;
use super::modules::Modules;
use super::programs;
use super::source::{Source, read};
use crate::args::{Board, BuildBootcode};
use crate::compression::decoded;

/// Contents of `/etc/marco/build`.
#[derive(Debug, Serialize)]
struct BuildFile<'a> {
    version: &'a str,
    kernel: &'a str,
    arch: String,
    build_time: String,
}

/// Result of the collection.
#[derive(Debug)]
pub(super) struct Initramfs {
    /// Files, folders, links and devices.
    pub(super) tree: Tree,
    /// Modules in loading order.
    pub(super) modules: Vec<String>,
    /// Firmware files that modules may request and that the source lacks.
    pub(super) missing_firmware: Vec<String>,
}

/// Collects the tree. `build_time` is in RFC 3339.
pub(super) fn collect(
    flags: &BuildBootcode,
    source: &Source,
    kernel: &Kernel,
    boards: &[Board],
    build_time: String,
) -> Result<Initramfs> {
    let mut tree = Tree::new();
    // The kernel unpacks the archive into an empty root, so the mount points must be in it.
    for folder in ["dev", "etc", "mnt", "proc", "run", "sys", "tmp", "var"] {
        put(&mut tree, folder, Node::Folder);
    }
    // The kernel opens the console for the first process before anything is mounted.
    put(&mut tree, "dev/console", Node::Device(5, 1));
    put(&mut tree, "dev/null", Node::Device(1, 3));
    agent(&mut tree, flags, kernel)?;
    programs::add(&mut tree, source, kernel.arch, &flags.programs)?;

    let all = Modules::open(&kernel.modules, &kernel.version)?;
    let mut names = boards::modules(boards, &all, &kernel.version)?;
    names.extend(flags.modules.iter().cloned());
    let loaded = all.closure(&names)?;
    let mut listed = Vec::new();
    let mut wanted = BTreeSet::new();
    for module in loaded {
        wanted.extend(module.firmware);
        put(&mut tree, &module.path, Node::File(module.bytes, false));
        listed.push(format!("/{}", module.path));
    }
    let list = listed.iter().map(|path| format!("{path}\n")).collect::<String>();
    put(&mut tree, "/etc/marco/modules", Node::File(list.into_bytes(), false));
    let missing_firmware = firmware(&mut tree, source, wanted)?;

    let build = BuildFile {
        version: env!("CARGO_PKG_VERSION"),
        kernel: &kernel.version,
        arch: kernel.arch.to_string(),
        build_time,
    };
    let build = toml::to_string(&build).context("cannot write /etc/marco/build")?;
    put(&mut tree, "/etc/marco/build", Node::File(build.into_bytes(), false));
    Ok(Initramfs { tree, modules: listed, missing_firmware })
}

/// Adds the agent and its other names.
fn agent(tree: &mut Tree, flags: &BuildBootcode, kernel: &Kernel) -> Result<()> {
    let bytes = read(&flags.agent)?;
    let binary = Binary::parse(&bytes).with_context(|| format!("{}", flags.agent.display()))?;
    // The agent is the init. It must start without any library in the initramfs.
    if binary.loader.is_some() || !binary.needed.is_empty() {
        bail!("{} is not static: build one with `make agent TARGET=...`", flags.agent.display());
    }
    if !kernel.arch.runs(binary.arch) {
        bail!(
            "{} is for {}, which the kernel {} for {} does not run",
            flags.agent.display(),
            binary.arch,
            kernel.version,
            kernel.arch
        );
    }
    put(tree, "/usr/bin/marco-agent", Node::File(bytes, true));
    // One program with several roles: process 1 is the init, and the hook of the DHCP client is known by its name.
    put(tree, "/init", Node::Link("usr/bin/marco-agent".to_owned()));
    put(tree, "/usr/lib/marco/udhcpc-hook", Node::Link("../../bin/marco-agent".to_owned()));
    Ok(())
}

/// Adds the firmware that the source has. Returns the names of the rest.
fn firmware(tree: &mut Tree, source: &Source, wanted: BTreeSet<String>) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    for name in wanted {
        let mut found = None;
        for ending in ["", ".xz", ".zst"] {
            found = source.read(&format!("/lib/firmware/{name}{ending}"))?;
            if found.is_some() {
                break;
            }
        }
        match found {
            Some(bytes) => put(tree, &format!("/lib/firmware/{name}"), Node::File(decoded(bytes)?, false)),
            // Reported, not fatal: most modules request firmware only for some of their devices.
            None => missing.push(name),
        }
    }
    Ok(missing)
}
