//! Files that make a system this node's own: its host name, and the machine id and SSH host keys that it had before.

use std::collections::BTreeMap;
use std::io::Result;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::plan;
use crate::bootpart::{self, BootPart, InstallJob};
use crate::system::rooted::{Kind, Rooted};

mod ssh;

/// SSH host keys, `ssh_host_*_key` and `.pub`, in this folder (sshd(8)).
const SSH: &str = "etc/ssh";

/// The version of the file that is written, and the highest that is read.
const VERSION: u32 = 1;

/// Files that a node keeps over an installation. They are on p1, too, for a power cut between erasing the old root and
/// finishing the new one.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Keep {
    /// Version of the file. 0 or absent: written before there was one, otherwise as version 1. Another installer may go
    /// on with it, so fields are only added, and readers leave alone those that they do not know.
    version: u32,
    /// The execution that saved it.
    execution: String,
    /// 32 hexadecimal digits (machine-id(5)); empty: none yet.
    machine_id: String,
    /// Host keys by file name, their bytes in hexadecimal.
    ssh: BTreeMap<String, String>,
}

impl Keep {
    /// Returns the files that this execution saved before. Otherwise saves those of the old root now, before anything
    /// touches it. (A root that an interrupted try has begun to fill has the image's, which are no node's own.)
    pub(super) fn save(
        part: &BootPart,
        old: Option<&Rooted>,
        job: &InstallJob,
    ) -> std::result::Result<Self, super::InstallError> {
        let path = part.keep_file();
        let saved = crate::durable::read(&path).ok().and_then(|bytes| Self::parse(&bytes));
        if let Some(saved) = saved.clone().filter(|saved| saved.execution == job.execution) {
            return Ok(saved);
        }
        let mut keep =
            old.map(read).transpose().map_err(super::InstallError::disk("read the old root"))?.unwrap_or_default();
        if let Some(saved) = saved {
            // After a failed installation the root may have nothing, or only the image's files.
            if keep.machine_id.is_empty() {
                keep.machine_id = saved.machine_id;
            }
            if keep.ssh.is_empty() {
                keep.ssh = saved.ssh;
            }
        }
        if keep.machine_id.is_empty() {
            let mut bytes = [0; 16];
            getrandom::fill(&mut bytes)
                .map_err(|error| super::InstallError::io(format!("no random numbers: {error}")))?;
            keep.machine_id = hex::encode(bytes);
        }
        // Made now and saved: the system has the same keys after an installation that begins again.
        if keep.ssh.is_empty()
            && let Some((private, public)) = ssh::fresh(&format!("root@{}", plan::host_name(&job.node)))
        {
            keep.ssh.insert(ssh::NAME.to_owned(), hex::encode(private));
            keep.ssh.insert(format!("{}.pub", ssh::NAME), hex::encode(public));
        }
        job.execution.clone_into(&mut keep.execution);
        keep.version = VERSION;
        let bytes = serde_json::to_vec(&keep).map_err(|error| super::InstallError::io(error.to_string()))?;
        bootpart::write_whole(&path, &bytes)?;
        Ok(keep)
    }

    /// `None`: torn, or of a later version.
    fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice::<Self>(bytes).ok().filter(|saved| saved.version <= VERSION)
    }

    /// Writes the files into the new root, with the node's name. Host keys only if there is an sshd to use them.
    pub(super) fn restore(&self, root: &Rooted, node: &str) -> Result<()> {
        let host = plan::host_name(node);
        root.write("etc/hostname", format!("{host}\n").as_bytes(), 0o644)?;
        if let Some(hosts) = root.read("etc/hosts")? {
            root.write("etc/hosts", plan::hosts(&String::from_utf8_lossy(&hosts), &host).as_bytes(), 0o644)?;
        }
        root.write("etc/machine-id", format!("{}\n", self.machine_id).as_bytes(), 0o444)?;
        if !root.is_dir(SSH) {
            return Ok(());
        }
        // An image's own host keys would be the same on every node.
        for (name, _) in host_keys(root)? {
            root.remove(Path::new(SSH).join(name))?;
        }
        for (name, bytes) in &self.ssh {
            let mode = if name.ends_with(".pub") { 0o644 } else { 0o600 };
            root.write(Path::new(SSH).join(name), &hex::decode(bytes).unwrap_or_default(), mode)?;
        }
        Ok(())
    }
}

fn read(root: &Rooted) -> Result<Keep> {
    let machine_id = root.read("etc/machine-id")?.unwrap_or_default();
    let machine_id = String::from_utf8_lossy(&machine_id).trim().to_owned();
    // Images ship `uninitialized`, or an empty file, for systemd to fill (machine-id(5)).
    let good = machine_id.len() == 32 && machine_id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut ssh = BTreeMap::new();
    for (name, bytes) in host_keys(root)? {
        ssh.insert(name, hex::encode(bytes));
    }
    Ok(Keep {
        version: VERSION,
        execution: String::new(),
        machine_id: if good { machine_id } else { String::new() },
        ssh,
    })
}

fn host_keys(root: &Rooted) -> Result<Vec<(String, Vec<u8>)>> {
    let mut keys = Vec::new();
    for (name, kind) in root.list(SSH)? {
        let Some(name) = name.to_str().filter(|name| name.starts_with("ssh_host_") && name.contains("_key")) else {
            continue;
        };
        if kind == Kind::File
            && let Some(bytes) = root.read(Path::new(SSH).join(name))?
        {
            keys.push((name.to_owned(), bytes));
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::Keep;

    #[test]
    fn recorded_files_are_read_and_written_as_they_were() {
        let today = include_str!("../../testdata/card/keep-1.json");
        let keep = Keep::parse(today.as_bytes()).unwrap();
        assert_eq!(keep.machine_id, "0123456789abcdef0123456789abcdef");
        assert_eq!(serde_json::to_string(&keep).unwrap(), today);
        let before = Keep::parse(include_bytes!("../../testdata/card/keep-0.json")).unwrap();
        assert!(before == Keep { version: 0, ..keep.clone() });
        let next = Keep::parse(include_bytes!("../../testdata/card/keep-next.json")).unwrap();
        assert!(next == keep, "unknown fields change nothing");
        assert!(Keep::parse(today.replace("\"version\":1", "\"version\":2").as_bytes()).is_none());
        assert!(Keep::parse(&today.as_bytes()[..60]).is_none());
    }
}
