//! Reads ELF files: processor and libraries of a program, and the `.modinfo` of a kernel module.

use anyhow::{Context as _, Result, bail};
use goblin::elf::Elf;
use goblin::elf::header::{EM_386, EM_AARCH64, EM_ARM, EM_X86_64};

use crate::args::Arch;

/// Flag of 32-bit ARM programs that pass floating-point numbers in registers (ELF for the Arm Architecture).
const EF_ARM_ABI_FLOAT_HARD: u32 = 0x400;

/// A program or a library.
#[derive(Debug)]
pub(crate) struct Binary {
    /// Architecture.
    pub(crate) arch: Arch,
    /// Path of the loader. `None`: a static program or a library.
    pub(crate) loader: Option<String>,
    /// Names of the needed libraries.
    pub(crate) needed: Vec<String>,
    /// Folders that the loader searches first. May contain `$ORIGIN`.
    pub(crate) runpath: Vec<String>,
}

impl Binary {
    /// Parses the headers.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let elf = Elf::parse(bytes).context("it is no ELF program")?;
        let arch = match elf.header.e_machine {
            EM_X86_64 => Arch::Amd64,
            EM_AARCH64 => Arch::Arm64,
            EM_ARM if elf.header.e_flags & EF_ARM_ABI_FLOAT_HARD != 0 => Arch::Armhf,
            // The flag may be missing. The loader's name also tells the calling convention.
            EM_ARM if elf.interpreter.is_some_and(|loader| loader.contains("armhf")) => Arch::Armhf,
            EM_ARM => Arch::Armel,
            EM_386 => bail!("it is for 32-bit PCs"),
            other => bail!("it is for a processor that no Pi has (ELF machine {other})"),
        };
        let split = |paths: &[&str]| paths.iter().flat_map(|path| path.split(':')).map(str::to_owned).collect();
        Ok(Self {
            arch,
            loader: elf.interpreter.map(str::to_owned),
            needed: elf.libraries.iter().map(|name| (*name).to_owned()).collect(),
            // ld.so(8): RPATH is ignored if there is a RUNPATH.
            runpath: if elf.runpaths.is_empty() { split(&elf.rpaths) } else { split(&elf.runpaths) },
        })
    }
}

/// Contents of a module's `.modinfo`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ModuleInfo {
    /// Modules whose symbols it uses.
    pub(crate) depends: Vec<String>,
    /// Optional modules to load before it (softdep).
    pub(crate) before: Vec<String>,
    /// Firmware files that it may request.
    pub(crate) firmware: Vec<String>,
    /// Other names of the module.
    pub(crate) aliases: Vec<String>,
    /// Version of the kernel that it was built for.
    pub(crate) kernel: String,
}

impl ModuleInfo {
    /// Parses the section `.modinfo`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let elf = Elf::parse(bytes).context("it is no ELF file")?;
        let section = elf
            .section_headers
            .iter()
            .find(|section| elf.shdr_strtab.get_at(section.sh_name) == Some(".modinfo"))
            .context("it is no kernel module: it has no .modinfo")?;
        let text = section.file_range().and_then(|range| bytes.get(range)).context("its .modinfo is cut off")?;
        Ok(Self::from_records(text))
    }

    /// Parses records of `key=value`, each terminated by a NUL.
    pub(crate) fn from_records(text: &[u8]) -> Self {
        let mut info = Self::default();
        for record in text.split(|&byte| byte == 0) {
            let record = String::from_utf8_lossy(record);
            let Some((key, value)) = record.split_once('=') else { continue };
            match key {
                "depends" => info.depends.extend(value.split(',').filter(|name| !name.is_empty()).map(module_name)),
                "softdep" => {
                    // `pre: a b post: c`
                    let mut words = value.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
                    info.before.extend(words.by_ref().take_while(|word| !word.ends_with(':')).map(module_name));
                }
                "firmware" => info.firmware.push(value.to_owned()),
                "alias" => info.aliases.push(module_name(value)),
                "vermagic" => value.split(' ').next().unwrap_or_default().clone_into(&mut info.kernel),
                _ => {}
            }
        }
        info
    }
}

/// Normalises a module's name. The kernel treats `-` and `_` as equal.
pub(crate) fn module_name(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::{Binary, ModuleInfo};
    use crate::args::Arch;

    #[test]
    fn a_modules_records_are_read() {
        let info = ModuleInfo::from_records(
            b"license=GPL\0depends=mbcache,jbd2\0softdep=pre: crc32c post: other\0alias=fs-ext4\0firmware=a/b.fw\0\
              vermagic=6.1.0-9 SMP mod_unload\0",
        );
        assert_eq!(info.depends, ["mbcache", "jbd2"]);
        assert_eq!(info.before, ["crc32c"]);
        assert_eq!(info.aliases, ["fs_ext4"]);
        assert_eq!(info.firmware, ["a/b.fw"]);
        assert_eq!(info.kernel, "6.1.0-9");
        assert_eq!(ModuleInfo::from_records(b"depends=\0"), ModuleInfo::default());
    }

    #[test]
    fn this_program_is_read_for_what_it_is() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let binary = Binary::parse(&own).unwrap();
        let arch = if cfg!(target_arch = "x86_64") { Arch::Amd64 } else { Arch::Arm64 };
        assert_eq!(binary.arch, arch);
        assert!(binary.needed.iter().any(|name| name.starts_with("libc.so")), "{binary:?}");
        assert!(binary.loader.is_some_and(|loader| loader.contains("ld-")));
        assert!(Binary::parse(b"#!/bin/sh\n").is_err());
    }
}
