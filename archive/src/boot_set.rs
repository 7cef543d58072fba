//! Checks that a set of boot files can boot. The firmware reports no missing file: it silently takes one of another
//! set.

use std::collections::BTreeSet;

use crate::config_txt::{ConfigTxt, initramfs_files};
use crate::facts::best;
use crate::{Facts, Reason, Refused, ZipSummary};

/// Kernels of all boards that the firmware tries if `config.txt` names none.
const DEFAULT_KERNELS: [&str; 5] = ["kernel8.img", "kernel_2712.img", "kernel7l.img", "kernel7.img", "kernel.img"];

/// Checks that a zip is a set that starts the installer from a folder named by `os_prefix`.
///
/// # Errors
/// `Refused` with the first missing file or wrong setting.
pub fn check_installer_set(zip: &ZipSummary) -> Result<(), Refused> {
    let names = names(zip);
    let config = common(zip, &names)?;
    for key in ["os_prefix", "overlay_prefix", "include"] {
        // The lines of the set are copied into the card's own config.txt. There, these keys would leave the set's
        // folder.
        if config.all(key).next().is_some() {
            return Err(wrong(&format!("an installer's set may not have a line \"{key}\"")));
        }
    }
    for tree in config.all("device_tree").filter(|tree| !tree.is_empty()) {
        if !names.contains(&tree.to_lowercase()) {
            return Err(lacks(&format!("the device tree {tree:?} that config.txt names")));
        }
    }
    // If either file is missing, the firmware takes overlays from the root, which belong to another kernel.
    for file in ["overlays/README", "overlays/overlay_map.dtb"] {
        if !names.contains(&file.to_lowercase()) {
            return Err(lacks(file));
        }
    }
    // The firmware would otherwise load an initramfs by the kernel's name. Only an explicit file is checked here.
    let mut auto = config.all("auto_initramfs").peekable();
    if auto.peek().is_none() || auto.any(|value| value != "0") {
        return Err(wrong("an installer's set needs auto_initramfs=0"));
    }
    let initramfs: Vec<&str> = config.settings().iter().flat_map(initramfs_files).collect();
    if initramfs.is_empty() {
        return Err(wrong("an installer's set needs an explicit line \"initramfs FILE followkernel\""));
    }
    match initramfs.into_iter().find(|file| !names.contains(&file.to_lowercase())) {
        Some(missing) => Err(lacks(&format!("the initramfs {missing:?} that config.txt names"))),
        None => Ok(()),
    }
}

/// Checks that a zip is the boot partition of an operating system: the firmware of at least one board finds all its
/// files, with or without a prefix. The agent repeats the check for its own board.
///
/// # Errors
/// `Refused` with the first missing file.
pub fn check_system_set(zip: &ZipSummary) -> Result<(), Refused> {
    config(zip, &names(zip))?;
    let facts = Facts::of_zip(zip);
    match best(&facts, &facts.boot_files).lacks.first() {
        Some(missing) => Err(lacks(missing)),
        None => Ok(()),
    }
}

/// Parses `config.txt`, which both kinds of sets need.
fn config(zip: &ZipSummary, names: &BTreeSet<String>) -> Result<ConfigTxt, Refused> {
    let Some(text) = &zip.config_txt else {
        let unreadable = names.contains("config.txt");
        return Err(if unreadable { wrong("it is not UTF-8 text of at most 64 KiB") } else { lacks("config.txt") });
    };
    Ok(ConfigTxt::parse(text))
}

/// Checks a set that is unpacked into a folder and has no prefix of its own: kernel, command line, configuration and a
/// device tree, for each board that its sections name.
fn common(zip: &ZipSummary, names: &BTreeSet<String>) -> Result<ConfigTxt, Refused> {
    let config = config(zip, names)?;
    if let Some(missing) = config.all("kernel").find(|kernel| !names.contains(&kernel.to_lowercase())) {
        return Err(lacks(&format!("the kernel {missing:?} that config.txt names")));
    }
    if config.all("kernel").next().is_none() && !DEFAULT_KERNELS.iter().any(|kernel| names.contains(*kernel)) {
        return Err(lacks("a kernel (kernel8.img, kernel_2712.img, kernel7l.img, kernel7.img or kernel.img)"));
    }
    if !names.contains("cmdline.txt") {
        return Err(lacks("cmdline.txt"));
    }
    // An empty `device_tree=` tells the firmware that there is none. Sets for machines other than Pis use it.
    let none_meant = config.all("device_tree").any(str::is_empty);
    if !none_meant && !names.iter().any(|name| name.ends_with(".dtb") && !name.starts_with("overlays/")) {
        return Err(lacks("a device tree (*.dtb)"));
    }
    Ok(config)
}

/// Returns the names of non-empty files in lower case, because FAT ignores case. The README of the overlays counts even
/// if it is empty: the firmware only checks that it exists.
fn names(zip: &ZipSummary) -> BTreeSet<String> {
    let present = zip.files.iter().filter(|file| file.size > 0 || file.name == "overlays/README");
    present.map(|file| file.name.to_lowercase()).collect()
}

fn lacks(what: &str) -> Refused {
    Refused::archive(Reason::Lacks(what.to_owned()))
}

fn wrong(what: &str) -> Refused {
    Refused::archive(Reason::Config(what.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{check_installer_set, check_system_set};
    use crate::{ZipFile, ZipSummary};

    const CONFIG: &str = "arm_64bit=1\nauto_initramfs=0\ninitramfs initramfs8 followkernel\n";
    const FILES: [&str; 6] = [
        "kernel8.img",
        "cmdline.txt",
        "bcm2711-rpi-4-b.dtb",
        "overlays/README",
        "overlays/overlay_map.dtb",
        "initramfs8",
    ];

    fn set(config: &str, files: &[&str]) -> ZipSummary {
        let mut all = files.to_vec();
        all.push("config.txt");
        let files = all
            .iter()
            .map(|name| ZipFile {
                name: (*name).to_owned(),
                size: u64::from(*name != "overlays/README"),
                sha256: [0; 32],
            })
            .collect();
        let texts = [("config.txt".to_owned(), config.to_owned())].into();
        ZipSummary { files, config_txt: Some(config.to_owned()), texts, ..ZipSummary::default() }
    }

    #[test]
    fn a_whole_installer_set_is_taken() {
        check_installer_set(&set(CONFIG, &FILES)).unwrap();
    }

    #[test]
    fn an_installer_set_that_lacks_any_file_is_refused_by_name() {
        for missing in FILES {
            let rest: Vec<&str> = FILES.into_iter().filter(|file| *file != missing).collect();
            let refused = check_installer_set(&set(CONFIG, &rest)).unwrap_err().to_string();
            let named = missing.strip_suffix("bcm2711-rpi-4-b.dtb").map_or(missing, |_| "device tree");
            assert!(refused.contains(named), "{missing}: {refused}");
        }
    }

    #[test]
    fn an_installer_set_whose_configuration_cannot_work_is_refused() {
        for (config, why) in [
            ("initramfs initramfs8 followkernel\n", "auto_initramfs=0"),
            ("auto_initramfs=1\ninitramfs initramfs8 followkernel\n", "auto_initramfs=0"),
            ("auto_initramfs=0\n", "initramfs FILE"),
            ("auto_initramfs=0\ninitramfs gone.img followkernel\n", "gone.img"),
            (&format!("{CONFIG}kernel=gone.img\n"), "gone.img"),
            (&format!("{CONFIG}[pi5]\ndevice_tree=gone.dtb\n"), "gone.dtb"),
            (&format!("{CONFIG}os_prefix=x/\n"), "os_prefix"),
            (&format!("{CONFIG}include more.txt\n"), "include"),
        ] {
            let refused = check_installer_set(&set(config, &FILES)).unwrap_err().to_string();
            assert!(refused.contains(why), "{config:?}: {refused}");
        }
    }

    #[test]
    fn a_set_may_say_that_it_has_no_device_tree() {
        let files: Vec<&str> = FILES.into_iter().filter(|file| *file != "bcm2711-rpi-4-b.dtb").collect();
        check_installer_set(&set(&format!("{CONFIG}device_tree=\n"), &files)).unwrap();
        let later = format!("{CONFIG}device_tree=\n[pi4]\ndevice_tree=gone.dtb\n");
        assert!(check_installer_set(&set(&later, &files)).unwrap_err().to_string().contains("gone.dtb"));
    }

    #[test]
    fn a_system_set_needs_no_initramfs_and_no_overlays() {
        check_system_set(&set("", &["kernel.img", "cmdline.txt", "bcm2708-rpi-b.dtb"])).unwrap();
        for missing in ["kernel.img", "cmdline.txt", "bcm2708-rpi-b.dtb"] {
            let rest: Vec<&str> =
                ["kernel.img", "cmdline.txt", "bcm2708-rpi-b.dtb"].into_iter().filter(|f| *f != missing).collect();
            assert!(check_system_set(&set("", &rest)).is_err(), "without {missing}");
        }
    }

    #[test]
    fn a_system_set_is_looked_for_where_the_firmware_looks() {
        let config = "os_prefix=Current/\n[tryboot]\nos_prefix=new/\n[all]\nkernel=vmlinuz\n";
        let files = ["current/vmlinuz", "current/cmdline.txt", "current/bcm2711-rpi-4-b.dtb"];
        check_system_set(&set(config, &files)).unwrap();
        for missing in ["vmlinuz", "cmdline.txt"] {
            let rest: Vec<&str> = files.into_iter().filter(|name| !name.ends_with(missing)).collect();
            // A file of the right name outside the prefix's folder does not count.
            let beside = [rest.as_slice(), &["cmdline.txt"]].concat();
            let refused = check_system_set(&set(config, &beside)).unwrap_err().to_string();
            assert!(refused.contains(missing), "{refused}");
        }
        // A kernel that is named in an included file.
        let mut including = set("include more.txt\n", &["kernel8.img", "cmdline.txt", "bcm2711-rpi-4-b.dtb"]);
        check_system_set(&including).unwrap();
        including.texts.insert("more.txt".to_owned(), "kernel=gone.img\n".to_owned());
        assert!(check_system_set(&including).unwrap_err().to_string().contains("gone.img"));
    }
}
