//! Modules of a kernel and their dependencies. A package has no `modules.dep`, which is generated at installation. The
//! `.modinfo` of the modules has the same information.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::elf::{ModuleInfo, module_name};
use super::source::read;
use crate::compression::decoded;

/// File endings of modules.
const ENDINGS: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// The modules of one kernel by name.
#[derive(Debug)]
pub(crate) struct Modules {
    version: String,
    /// Path below the folder without its ending, and the full path, by name.
    files: BTreeMap<String, (String, PathBuf)>,
    builtin: BTreeSet<String>,
}

/// A module that goes into the initramfs.
#[derive(Debug)]
pub(crate) struct Module {
    /// Path in the initramfs. The module is stored uncompressed there.
    pub(crate) path: String,
    /// Uncompressed contents.
    pub(crate) bytes: Vec<u8>,
    /// Firmware files that it may request.
    pub(crate) firmware: Vec<String>,
}

impl Modules {
    /// Lists the modules in a kernel's folder.
    pub(crate) fn open(folder: &Path, version: &str) -> Result<Self> {
        let mut files = BTreeMap::new();
        list(folder, folder, &mut files).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut builtin = BTreeSet::new();
        if folder.join("modules.builtin").is_file() {
            let text = read(&folder.join("modules.builtin"))?;
            for line in String::from_utf8_lossy(&text).lines() {
                let file = line.rsplit('/').next().unwrap_or_default();
                builtin.insert(module_name(file.trim_end_matches(".ko")));
            }
        }
        if files.is_empty() && builtin.is_empty() {
            bail!("there are no modules in {}", folder.display());
        }
        Ok(Self { version: version.to_owned(), files, builtin })
    }

    /// Returns true if the kernel has the module, as a file or built in.
    pub(crate) fn has(&self, name: &str) -> bool {
        let name = module_name(name);
        self.files.contains_key(&name) || self.builtin.contains(&name)
    }

    /// Returns the named modules and their dependencies, each after its dependencies. Built-in ones are left out.
    pub(crate) fn closure(&self, names: &[String]) -> Result<Vec<Module>> {
        // `order` is the order of `insmod`: the installer has no modprobe.
        let mut load = Load { modules: self, done: BTreeSet::new(), order: Vec::new() };
        for name in names {
            load.add(&module_name(name), None)?;
        }
        Ok(load.order)
    }

    /// Returns modules with this alias, such as `crc32c` or, in newer kernels, `crypto_crc32c`. Only modules whose file
    /// name starts with the alias are inspected.
    fn aliased(&self, alias: &str) -> Result<Vec<String>> {
        let plain = alias.strip_prefix("crypto_").unwrap_or(alias);
        let mut found = Vec::new();
        for name in
            self.files.range(plain.to_owned()..).map(|(name, _)| name).take_while(|name| name.starts_with(plain))
        {
            let (info, _) = self.load(name)?;
            if info.aliases.iter().any(|other| *other == plain || *other == format!("crypto_{plain}")) {
                found.push(name.clone());
            }
        }
        Ok(found)
    }

    fn load(&self, name: &str) -> Result<(ModuleInfo, Vec<u8>)> {
        let (_, file) = self.files.get(name).with_context(|| format!("there is no module {name}"))?;
        let bytes = read(file).and_then(decoded).with_context(|| format!("module {name}"))?;
        let info = ModuleInfo::parse(&bytes).with_context(|| format!("{}", file.display()))?;
        // The kernel refuses a module of another version at load time. The error is clearer here.
        if !info.kernel.is_empty() && info.kernel != self.version {
            bail!("{} is for the kernel {}, not {}", file.display(), info.kernel, self.version);
        }
        Ok((info, bytes))
    }
}

/// Depth-first walk over the dependencies.
struct Load<'a> {
    modules: &'a Modules,
    done: BTreeSet<String>,
    order: Vec<Module>,
}

impl Load<'_> {
    fn add(&mut self, name: &str, needed_by: Option<&str>) -> Result<()> {
        // Marked before the dependencies are visited, so a cycle ends.
        if !self.done.insert(name.to_owned()) {
            return Ok(());
        }
        let Some((path, _)) = self.modules.files.get(name) else {
            if self.modules.builtin.contains(name) {
                return Ok(());
            }
            let by = needed_by.map(|by| format!(", which {by} needs")).unwrap_or_default();
            bail!("the kernel {} has no module {name}{by}", self.modules.version);
        };
        let path = format!("lib/modules/{}/{path}.ko", self.modules.version);
        let (info, bytes) = self.modules.load(name)?;
        for before in &info.before {
            // A missing softdep is not an error, as in modprobe.
            if self.modules.files.contains_key(before) {
                self.add(before, Some(name))?;
            }
            // ext4 names its checksum by alias only. Without this module the installer could not mount what it had
            // made.
            for other in self.modules.aliased(before)? {
                self.add(&other, Some(name))?;
            }
        }
        for needed in &info.depends {
            self.add(needed, Some(name))?;
        }
        self.order.push(Module { path, bytes, firmware: info.firmware });
        Ok(())
    }
}

fn list(folder: &Path, below: &Path, files: &mut BTreeMap<String, (String, PathBuf)>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(below)? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        // `build` and `source` are links to other places and are not followed.
        if kind.is_dir() {
            list(folder, &path, files)?;
            continue;
        }
        let relative = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
        let Some(stem) = ENDINGS.iter().find_map(|ending| relative.strip_suffix(ending)) else { continue };
        let name = module_name(stem.rsplit('/').next().unwrap_or(stem));
        files.insert(name, (stem.to_owned(), path));
    }
    Ok(())
}
