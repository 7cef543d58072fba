//! The surroundings of an emulated machine: a network with DHCP, and a controller on the default ports. All of it is in
//! this process's network namespace, which must be a fresh one, so that the host sees none of it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::process::{Output, Process, Recipe, binary, run, tool};
use crate::wait::{seconds, wait_until};

/// The controller's address for the machines.
pub const ADDRESS: &str = "10.77.0.1";
/// The TAP interface for QEMU.
pub const TAP: &str = "tap0";
/// Timeout of a marcoctl call that does not wait for a machine.
const CALL: Duration = seconds(120);

/// Commands of ip(8) that make the network. The second end of the veth pair keeps the bridge up while no machine runs.
/// Without snooping the bridge floods multicast to all ports.
const NETWORK: [&str; 9] = [
    "link set lo up",
    "link add br0 type bridge mcast_snooping 0",
    "link add keep0 type veth peer name keep1",
    "link set keep1 up",
    "link set keep0 master br0 up",
    "addr add 10.77.0.1/24 dev br0",
    "link set br0 up",
    "tuntap add tap0 mode tap",
    "link set tap0 master br0 up",
];

/// The network, its DHCP server and the controller; dropping it ends both processes.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    controller: Process,
    _dhcp: Process,
}

/// A running `marcoctl operations watch`: the operation and its executions as they change.
#[derive(Debug)]
pub struct Watch {
    lines: Lines<BufReader<ChildStdout>>,
    /// Kept because dropping it kills marcoctl.
    _child: Child,
}

impl Lab {
    /// Makes the network and starts the controller, with all its files below `dir`. Returns an error on a host that has
    /// other interfaces.
    pub async fn start(dir: &Path) -> Result<Self> {
        let ip = tool("ip")?;
        let interfaces = run(&ip, &["-o", "link"], CALL).await?.success()?;
        // These commands would change the network of the host, so the test refuses to run there.
        ensure!(interfaces.lines().count() == 1, "this must run in a network namespace of its own: use make");
        for command in NETWORK {
            let words: Vec<&str> = command.split(' ').collect();
            run(&ip, &words, CALL).await?.success().with_context(|| format!("ip {command}"))?;
        }
        let settings = dir.join("udhcpd.conf");
        let leases = dir.join("leases");
        // Without this file udhcpd complains at its start.
        std::fs::write(&leases, "")?;
        std::fs::write(
            &settings,
            format!(
                "interface br0\nstart 10.77.0.10\nend 10.77.0.99\nlease_file {}\noption subnet 255.255.255.0\n\
                 option router {ADDRESS}\noption lease 3600\n",
                leases.display()
            ),
        )?;
        // In the foreground, so that it dies with this process.
        let arguments = ["udhcpd".to_owned(), "-f".to_owned(), settings.display().to_string()];
        let dhcp = Recipe::new(tool("busybox")?, arguments, dir.join("dhcp.log")).start()?;
        let controller = start_controller(dir)?;
        let mut lab = Self { dir: dir.to_owned(), controller, _dhcp: dhcp };
        let key = lab.certs().join("admin.key");
        wait_until(seconds(60), "the controller answers", || {
            let (alive, has_key) = (lab.controller.check_alive(), key.exists());
            async move {
                alive?;
                let api: SocketAddr = ([127, 0, 0, 1], marco_proto::names::API_PORT).into();
                // The port alone is not enough: marcoctl needs the admin's key, which the controller writes at its
                // first start.
                let listens = tokio::net::TcpStream::connect(api).await.is_ok();
                Ok((listens && has_key).then_some(()))
            }
        })
        .await?;
        Ok(lab)
    }

    /// The folder with the operator's certificates.
    pub fn certs(&self) -> PathBuf {
        self.dir.join("certs")
    }

    /// Plugs the machine's network cable in, or pulls it at the far end: the machine keeps its link, and nobody
    /// answers.
    pub async fn plug(&self, plugged: bool) -> Result<()> {
        let words =
            if plugged { ["link", "set", TAP, "master", "br0"].as_slice() } else { &["link", "set", TAP, "nomaster"] };
        run(&tool("ip")?, words, CALL).await?.success()?;
        Ok(())
    }

    /// The last lines of the controller's log.
    pub fn controller_says(&self) -> String {
        self.controller.tail(30)
    }

    fn marcoctl(&self, arguments: &[&str]) -> Vec<String> {
        let certs = self.certs().display().to_string();
        // Through marcoctl and not through the API directly: these runs also test the operator's tool.
        let own = ["--certs", &certs, "--output", "json"];
        own.iter().chain(arguments).map(|word| (*word).to_owned()).collect()
    }

    /// Calls marcoctl as admin, with JSON output.
    pub async fn call(&self, arguments: &[&str], limit: Duration) -> Result<Output> {
        let arguments = self.marcoctl(arguments);
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        run(&binary("marcoctl")?, &words, limit).await
    }

    /// Calls marcoctl as [`call`](Self::call) does, and parses its output. Returns an error unless it succeeds.
    pub async fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let called = format!("marcoctl {}", arguments.join(" "));
        let text = self.call(arguments, CALL).await?.success().with_context(|| called.clone())?;
        serde_json::from_str(&text).with_context(|| format!("{called} printed {text:?}"))
    }

    /// Watches an operation.
    pub fn watch(&self, operation: &str) -> Result<Watch> {
        let mut child = Command::new(binary("marcoctl")?)
            .args(self.marcoctl(&["operations", "watch", operation]))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("starting marcoctl")?;
        let stdout = child.stdout.take().context("its output")?;
        Ok(Watch { lines: BufReader::new(stdout).lines(), _child: child })
    }
}

impl Watch {
    /// The next message; `None` after the operation has ended.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        let Some(line) = self.lines.next_line().await.context("reading what marcoctl prints")? else { return Ok(None) };
        Ok(Some(serde_json::from_str(&line).with_context(|| format!("marcoctl printed {line:?}"))?))
    }
}

fn start_controller(dir: &Path) -> Result<Process> {
    let (data, certs) = (dir.join("data").display().to_string(), dir.join("certs").display().to_string());
    let arguments = ["serve", "--data-dir", &data, "--certs", &certs];
    Recipe::new(binary("marco-controller")?, arguments, dir.join("controller.log")).start()
}

/// A field of a document, by its path of names and indices separated by dots.
pub fn field<'a>(document: &'a Value, path: &str) -> Result<&'a Value> {
    let mut at = document;
    for name in path.split('.') {
        let found = match name.parse::<usize>() {
            Ok(position) => at.get(position),
            Err(_) => at.get(name),
        };
        let Some(found) = found else { bail!("there is no {path} in {document}") };
        at = found;
    }
    Ok(at)
}

/// A text field of a document; see [`field`].
pub fn text<'a>(document: &'a Value, path: &str) -> Result<&'a str> {
    field(document, path)?.as_str().with_context(|| format!("{path} is no text in {document}"))
}
