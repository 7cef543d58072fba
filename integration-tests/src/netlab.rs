//! A virtual network for one test: network namespaces as hosts, and one more as their switch. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};

use crate::process::{Output, Recipe, run, tool};

/// The network. Dropping it removes its namespaces; processes in them must have ended before.
#[derive(Debug)]
pub struct Lab {
    tag: String,
    hosts: u8,
}

impl Lab {
    /// Creates hosts 1 to `hosts` with the addresses 10.77.0.1 and up, on one switch.
    pub fn new(hosts: u8) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Made first, so that `drop` removes the rest if a later step fails.
        let lab = Self { tag: format!("marco-{}-{number}", std::process::id()), hosts };
        let switch = lab.namespace(0);
        ip(&["netns", "add", &switch]).context("network namespaces need root: run the tests as root")?;
        // Without multicast snooping the bridge floods multicast to all ports, as a simple switch does.
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        for host in 1..=hosts {
            let (namespace, port, address) = (lab.namespace(host), format!("p{host}"), lab.address(host));
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
            // A veth pair is a cable: one end in the host, the other one at the switch.
            ip(&["link", "add", "eth0", "netns", &namespace, "type", "veth", "peer", "name", &port, "netns", &switch])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &namespace, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            lab.plug(host)?;
        }
        Ok(lab)
    }

    /// The IPv4 address of a host.
    pub fn address(&self, host: u8) -> String {
        format!("10.77.0.{host}")
    }

    /// Disconnects a host from the network.
    pub fn unplug(&self, host: u8) -> Result<()> {
        ip(&["-n", &self.namespace(host), "link", "set", "eth0", "down"])
    }

    /// Connects the host again.
    pub fn plug(&self, host: u8) -> Result<()> {
        let namespace = self.namespace(host);
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        // Programs that choose no interface for multicast find one by the routes. Taking the link down removed the
        // route.
        ip(&["-n", &namespace, "route", "replace", "224.0.0.0/4", "dev", "eth0"])
    }

    /// The recipe of a program on a host.
    pub fn recipe(&self, host: u8, program: &Path, arguments: &[&str], log: PathBuf) -> Result<Recipe> {
        let mut all = self.prefix(host, program);
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        Ok(Recipe::new(tool("ip")?, all, log))
    }

    /// Runs a program on a host to its end, at most for 60 s.
    pub async fn run(&self, host: u8, program: &Path, arguments: &[&str]) -> Result<Output> {
        let prefix = self.prefix(host, program);
        let mut all: Vec<&str> = prefix.iter().map(String::as_str).collect();
        all.extend_from_slice(arguments);
        run(&tool("ip")?, &all, crate::seconds(60)).await
    }

    fn prefix(&self, host: u8, program: &Path) -> Vec<String> {
        let namespace = self.namespace(host);
        vec!["netns".to_owned(), "exec".to_owned(), namespace, program.display().to_string()]
    }

    fn namespace(&self, host: u8) -> String {
        format!("{}-{host}", self.tag)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in 0..=self.hosts {
            // It may not exist if `new` failed half way.
            let _ = ip(&["netns", "del", &self.namespace(host)]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "what is dropped cannot wait for a runtime; ip answers at once")]
    let output = Command::new("ip").args(arguments).output().context("ip is not installed: run `make deps` first")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
