//! Puts the agent and the node's identity into the new root, so that the node comes back as itself.
//!
//! An image with an agent of its own keeps the newer of the two, by the times of their builds. One without such a time
//! counts as older.

use std::fs::File;
use std::io::{Read, Result};
use std::path::Path;

use crate::system::rooted::Rooted;

pub(super) mod elf;

/// Path of the agent in a root.
const PROGRAM: &str = "usr/bin/marco-agent";
/// Its unit, for images that have none.
const UNIT: &str = include_str!("../../dist/marco-agent.service");
const UNIT_NAME: &str = "marco-agent.service";
/// Folders in which images have the units of their packages.
const UNIT_FOLDERS: [&str; 3] = ["etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"];
/// Folder of links to the units that start by themselves.
const WANTS: &str = "etc/systemd/system/multi-user.target.wants";
/// The agent's identity and its way: key, certificates, controllers that it knew, and the time.
const FILES: [(&str, u32); 6] = [
    ("node.key", 0o600),
    ("node.crt", 0o644),
    ("ca.crt", 0o644),
    ("controllers.json", 0o644),
    ("live-controllers.json", 0o644),
    ("time", 0o644),
];
/// Text in a program. The time of its build follows, in seconds since 1970, and a space.
const MARK: &str = "marco-agent was built at ";
/// Output of `--version`: the version, and the mark, which so cannot be optimised away.
pub const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\nmarco-agent was built at ",
    env!("MARCO_BUILD_SECONDS"),
    " (seconds since 1970)"
);

/// Installs program and unit. Returns true if the image's own program was kept.
pub(super) fn install(root: &Rooted, program: &Path) -> Result<bool> {
    let own = root.open_file(PROGRAM).ok().and_then(built);
    // The image's newer agent must not give way to that of an older installer, and none to one that does not run there.
    let keep =
        own.is_some_and(|own| Some(own) >= File::open(program).ok().and_then(built) || !elf::fits(program, root));
    if !keep {
        let mut file = root.create(PROGRAM, 0o755)?;
        std::io::copy(&mut File::open(program)?, &mut file)?;
        // `create` is subject to the umask, which an initramfs may set to anything.
        rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o755))?;
    }
    // Both paths: `/lib` is a link to `/usr/lib` in newer images only.
    let systemd = ["usr/lib/systemd/systemd", "lib/systemd/systemd"];
    if !systemd.iter().any(|init| root.is_file(init, true)) {
        // Not an error: an image may start the agent by another init.
        tracing::warn!("the image has no systemd: it must start `marco-agent run` by itself");
        return Ok(keep);
    }
    let found =
        UNIT_FOLDERS.iter().map(|folder| format!("{folder}/{UNIT_NAME}")).find(|unit| root.is_file(unit, false));
    let unit = match found {
        Some(unit) => unit,
        None => {
            let unit = format!("etc/systemd/system/{UNIT_NAME}");
            root.write(&unit, UNIT.as_bytes(), 0o644)?;
            unit
        }
    };
    // The link that `systemctl enable` makes: no program of the image runs here.
    root.link(format!("{WANTS}/{UNIT_NAME}"), format!("/{unit}"))?;
    Ok(keep)
}

/// Copies the node's identity to the agent's folder in the root.
pub(super) fn identify(root: &Rooted, identity_dir: &Path) -> Result<()> {
    // These only: the folder may also hold a log and a journal of the installer.
    for (name, mode) in FILES {
        match crate::durable::read(&identity_dir.join(name)) {
            Ok(bytes) => root.write(Path::new(super::STATE_DIR).join(name), &bytes, mode)?,
            // The node never learnt it, for example the time.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    // The key is in it, and the image may bring the folder with any mode.
    let folder = root.folder(super::STATE_DIR)?;
    Ok(rustix::fs::fchmod(&folder, rustix::fs::Mode::from_raw_mode(0o700))?)
}

/// Returns the time of a program's build in seconds since 1970; `None`: it has no mark.
fn built(mut program: File) -> Option<u64> {
    /// Bytes that are searched at once; the mark may lie over the border of two windows.
    const WINDOW: usize = 1 << 20;
    /// Longer than the mark, ten digits and the space.
    const OVERLAP: usize = 64;
    let mut bytes = Vec::new();
    loop {
        let kept = bytes.len().min(OVERLAP);
        bytes.drain(..bytes.len() - kept);
        let read = (&mut program).take(u64::try_from(WINDOW).ok()?).read_to_end(&mut bytes).ok()?;
        let found = bytes.windows(MARK.len()).enumerate().filter(|(_, window)| *window == MARK.as_bytes()).find_map(
            |(at, _)| {
                let rest = bytes.get(at + MARK.len()..)?;
                let digits: Vec<u8> = rest.iter().take_while(|byte| byte.is_ascii_digit()).copied().collect();
                // The space shows that no digit is cut off by the window.
                (rest.get(digits.len()) == Some(&b' ')).then(|| std::str::from_utf8(&digits).ok()?.parse().ok())?
            },
        );
        if found.is_some() || read == 0 {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use tempfile::TempDir;

    use super::elf::tests::header;
    use super::{PROGRAM, identify, install};
    use crate::system::rooted::Rooted;

    struct Image {
        dir: TempDir,
        root: Rooted,
    }

    impl Image {
        fn new(systemd: bool) -> Self {
            let dir = TempDir::new().unwrap();
            if systemd {
                fs::create_dir_all(dir.path().join("usr/lib/systemd")).unwrap();
                let init = dir.path().join("usr/lib/systemd/systemd");
                fs::write(&init, "init").unwrap();
                fs::set_permissions(init, fs::Permissions::from_mode(0o755)).unwrap();
            }
            let root = Rooted::open(dir.path()).unwrap();
            Self { dir, root }
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.dir.path().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
        }
    }

    #[test]
    fn the_agent_is_installed_and_started_by_systemd() {
        let image = Image::new(true);
        let program = image.dir.path().join("agent");
        fs::write(&program, "ELF marco-agent was built at 1800000000 and so on").unwrap();
        assert!(!install(&image.root, &program).unwrap());
        assert!(image.read(PROGRAM).contains("1800000000"));
        let mode = fs::metadata(image.dir.path().join(PROGRAM)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert!(image.read("etc/systemd/system/marco-agent.service").contains("ExecStart=/usr/bin/marco-agent run"));
        let link = image.dir.path().join("etc/systemd/system/multi-user.target.wants/marco-agent.service");
        assert_eq!(fs::read_link(link).unwrap().to_str(), Some("/etc/systemd/system/marco-agent.service"));
        // A second installation replaces the files of the first.
        install(&image.root, &program).unwrap();
    }

    #[test]
    fn of_two_agents_the_newer_is_kept() {
        for (image_has, ours, kept) in [
            ("marco-agent was built at 1800000001 ", "marco-agent was built at 1800000000 ", true),
            ("marco-agent was built at 1700000000 ", "marco-agent was built at 1800000000 ", false),
            ("does not say", "marco-agent was built at 1800000000 ", false),
            ("marco-agent was built at x ", "marco-agent was built at 1800000000 ", false),
        ] {
            let image = Image::new(false);
            fs::create_dir_all(image.dir.path().join("usr/bin")).unwrap();
            fs::write(image.dir.path().join(PROGRAM), image_has).unwrap();
            let program = image.dir.path().join("agent");
            fs::write(&program, ours).unwrap();
            assert_eq!(install(&image.root, &program).unwrap(), kept, "{image_has}");
            assert_eq!(image.read(PROGRAM), if kept { image_has } else { ours });
        }
    }

    #[test]
    fn agent_for_another_processor_does_not_replace_the_images_own() {
        let image = Image::new(false);
        for folder in ["usr/bin", "sbin"] {
            fs::create_dir_all(image.dir.path().join(folder)).unwrap();
        }
        let own = [header(1, 40), b"marco-agent was built at 1700000000 ".to_vec()].concat();
        fs::write(image.dir.path().join(PROGRAM), &own).unwrap();
        fs::write(image.dir.path().join("sbin/init"), header(1, 40)).unwrap();
        let program = image.dir.path().join("agent");
        fs::write(&program, [header(2, 183), b"marco-agent was built at 1800000000 ".to_vec()].concat()).unwrap();
        assert!(install(&image.root, &program).unwrap());
        assert_eq!(fs::read(image.dir.path().join(PROGRAM)).unwrap(), own);
    }

    #[test]
    fn a_mark_over_the_border_of_two_reads_is_found() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("program");
        let mut bytes = vec![0; (1 << 20) - 10];
        bytes.extend_from_slice(b"marco-agent was built at 1800000000 ");
        fs::write(&path, bytes).unwrap();
        assert_eq!(super::built(fs::File::open(path).unwrap()), Some(1_800_000_000));
    }

    #[test]
    fn the_identity_is_for_its_owner_only() {
        let image = Image::new(false);
        let identity = TempDir::new().unwrap();
        for name in ["node.key", "node.crt", "ca.crt", "controllers.json", "install.log"] {
            fs::write(identity.path().join(name), name).unwrap();
        }
        identify(&image.root, identity.path()).unwrap();
        let folder = image.dir.path().join("var/lib/marco-agent");
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(folder.join("node.key")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(image.read("var/lib/marco-agent/controllers.json"), "controllers.json");
        assert!(!folder.join("install.log").exists());
    }
}
