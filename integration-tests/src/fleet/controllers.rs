//! Several controllers on one database, and faults that a test inflicts on each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tonic::transport::Channel;

use super::{Addresses, Builder, Database, Fleet, ports};
use crate::client::Credentials;
use crate::process::{Process, Recipe, binary, tool};
use crate::proxy::Proxy;

/// One of the controllers of a fleet.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) process: Process,
    pub(super) addresses: Addresses,
    pub(super) channel: Option<Channel>,
}

impl Builder {
    /// Number of controllers that share the database; default: 1. More than one need Postgres. Agents get the first
    /// one's address, through the proxy, and learn the others' addresses from it.
    pub fn controllers(mut self, count: usize) -> Self {
        self.controllers = count;
        self
    }

    /// Gives one controller a database URL of its own, for example that of a proxy.
    pub fn database_of(mut self, number: usize, url: &str) -> Self {
        self.own_urls.insert(number, url.to_owned());
        self
    }

    /// Turns the notifications between controllers on or off; default: on.
    pub fn notifications(mut self, on: bool) -> Self {
        self.notifications = on;
        self
    }

    /// Limit of open files of each controller (`RLIMIT_NOFILE`); default: this test's own limit.
    pub fn open_files(mut self, files: usize) -> Self {
        self.open_files = Some(files);
        self
    }

    /// Lets the controllers share the folders for data and certificates; default: each has its own.
    pub fn shared_folders(mut self) -> Self {
        self.shared_folders = true;
        self
    }

    /// Gives each controller a clock of its own (by libfaketime), which [`Fleet::jump_clock`] moves.
    pub fn own_clocks(mut self) -> Self {
        self.own_clocks = true;
        self
    }

    /// Age at which a due fire of a schedule counts as missed; default: five minutes.
    pub fn missed_after(mut self, late: Duration) -> Self {
        self.missed_after = Some(late);
        self
    }

    /// Puts a proxy between each controller and the database; needs Postgres. See [`Fleet::database_proxy`].
    pub fn database_proxies(mut self) -> Self {
        self.database_proxies = true;
        self
    }

    /// Starts the proxies to the database; none unless they were asked for.
    pub(super) async fn start_database_proxies(&mut self) -> Result<Vec<Proxy>> {
        let mut proxies = Vec::new();
        let Database::Url(url) = &self.database else { return Ok(proxies) };
        if !self.database_proxies {
            return Ok(proxies);
        }
        let (before, rest) = url.rsplit_once('@').context("a URL with a user")?;
        let (server, database) = rest.split_once('/').context("a URL with a database")?;
        for number in 0..self.controllers {
            let proxy = Proxy::start(server.parse().context("the address of the database")?).await?;
            self.own_urls.insert(number, format!("{before}@{}/{database}", proxy.address()));
            proxies.push(proxy);
        }
        Ok(proxies)
    }

    /// Adds the log filter to a process's environment, if one was set.
    pub(super) fn logging(&self, recipe: Recipe) -> Recipe {
        if self.log.is_empty() { recipe } else { recipe.env("RUST_LOG", &self.log).env("MARCO_LOG", &self.log) }
    }

    /// Starts the controller with this number.
    pub(super) fn start_controller(&self, dir: &Path, number: usize) -> Result<Member> {
        let addresses =
            Addresses { api: ports::free()?, enroll: ports::free()?, mirror: ports::free()?, metrics: ports::free()? };
        // Logs and clocks stay separate, also with shared folders.
        let own = if self.shared_folders { 0 } else { number };
        let path = |name: &str| dir.join(folder(name, own)).display().to_string();
        let mut arguments = vec!["serve".to_owned()];
        for (flag, value) in [
            ("--data-dir", path("data")),
            ("--certs", path("certs")),
            ("--listen", addresses.api.to_string()),
            ("--enroll-listen", addresses.enroll.to_string()),
            ("--mirror-listen", addresses.mirror.to_string()),
            ("--metrics-listen", addresses.metrics.to_string()),
            ("--notifications", self.notifications.to_string()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        // Controllers announce themselves to agents by these names, and never by default by a loopback address.
        if self.controllers > 1 {
            arguments.extend(["--name".to_owned(), addresses.api.ip().to_string()]);
        }
        if let Some(late) = self.missed_after {
            arguments.extend(["--missed-after".to_owned(), format!("{}ms", late.as_millis())]);
        }
        match (self.own_urls.get(&number), &self.database) {
            (Some(url), _) | (None, Database::Url(url)) => {
                arguments.extend(["--database-url".to_owned(), url.clone()]);
            }
            (None, Database::Sqlite) => {}
        }
        let log = dir.join(format!("{}.log", folder("controller", number)));
        let mut program = binary("marco-controller")?;
        if let Some(files) = self.open_files {
            arguments.splice(0..0, [format!("--nofile={files}:{files}"), program.display().to_string()]);
            // prlimit sets the limit and then executes the controller, so the process id stays the controller's.
            program = tool("prlimit")?;
        }
        let mut recipe = Recipe::new(program, arguments, log);
        if self.own_clocks {
            let clock = dir.join(format!("{}.clock", folder("controller", number)));
            std::fs::write(&clock, "+0").context("a controller's clock")?;
            recipe = recipe
                // libfaketime reads the offset from this file again after each second, so that a test can move the
                // clock of a process that runs. The monotonic clock stays true: a jump of wall time must not fire the
                // timers.
                .env("LD_PRELOAD", libfaketime()?.display())
                .env("FAKETIME_TIMESTAMP_FILE", clock.display())
                .env("FAKETIME_CACHE_DURATION", 1)
                .env("FAKETIME_DONT_FAKE_MONOTONIC", 1);
        }
        let process = self.logging(recipe).start()?;
        Ok(Member { process, addresses, channel: None })
    }

    /// Copies the first controller's CA to a further controller, and starts that.
    pub(super) fn start_further_controller(&self, dir: &Path, number: usize, admin: &Credentials) -> Result<Member> {
        // The key and the certificate are enough. The controller issues its own certificate from them.
        let needed = [("data/pki", "ca.key"), ("certs", "ca.crt")];
        for (from, name) in needed.into_iter().filter(|_| !self.shared_folders) {
            let (top, below) = from.split_once('/').unwrap_or((from, ""));
            let to = dir.join(folder(top, number)).join(below);
            std::fs::create_dir_all(&to).context("a folder of a further controller")?;
            std::fs::copy(dir.join(from).join(name), to.join(name)).context("copying the CA")?;
        }
        let mut member = self.start_controller(dir, number)?;
        member.channel = Some(admin.channel(member.addresses.api)?);
        Ok(member)
    }
}

/// The libfaketime library, which gives a process its own clock.
pub fn libfaketime() -> Result<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").context("/usr/lib")?;
    folders
        .filter_map(|folder| Some(folder.ok()?.path().join("faketime/libfaketime.so.1")))
        .find(|library| library.is_file())
        .context("libfaketime is not installed: run `make deps` first, or `make test`")
}

/// The folder of the controller with this number. The first one's name has no number.
fn folder(name: &str, number: usize) -> String {
    if number == 0 { name.to_owned() } else { format!("{name}-{number}") }
}

impl Fleet {
    /// Selects the controller that this test talks to from now on, by its number from 0.
    pub fn talk_to(&mut self, number: usize) -> Result<()> {
        let member = self.controllers.get(number).context("there is no such controller")?;
        self.channel = member.channel.clone().context("it was never reached")?;
        self.addresses = member.addresses;
        self.spoken_to = number;
        Ok(())
    }

    /// The process of one controller, by number.
    fn member(&mut self, number: usize) -> Result<&mut Process> {
        Ok(&mut self.controllers.get_mut(number).context("there is no such controller")?.process)
    }

    /// Listen addresses of the controller with this number.
    pub fn addresses_of(&self, number: usize) -> Result<Addresses> {
        Ok(self.controllers.get(number).context("no such controller")?.addresses)
    }

    /// Kills one controller (`-9`).
    pub async fn kill(&mut self, number: usize) -> Result<()> {
        self.member(number)?.kill().await
    }

    /// Starts a killed controller again, and does not wait until it is healthy.
    pub fn revive(&mut self, number: usize) -> Result<()> {
        self.member(number)?.start()
    }

    /// Sets one controller's clock off by `seconds` from the true time; negative: behind it.
    pub fn jump_clock(&self, number: usize, seconds: i64) -> Result<()> {
        let file = self.dir().join(format!("{}.clock", folder("controller", number)));
        std::fs::write(file, format!("{seconds:+}")).context("a controller's clock")
    }

    /// Freezes one controller (SIGSTOP): its connections stay open, and it answers nothing.
    pub async fn freeze(&mut self, number: usize) -> Result<()> {
        self.member(number)?.signal("STOP").await
    }

    /// Lets a frozen controller continue (SIGCONT).
    pub async fn thaw(&mut self, number: usize) -> Result<()> {
        self.member(number)?.signal("CONT").await
    }

    /// The proxy between one controller and the database; see [`Builder::database_proxies`].
    pub fn database_proxy(&self, number: usize) -> Result<&Proxy> {
        self.database_proxies.get(number).context("this controller has no proxy to the database")
    }

    /// A channel to one controller, with the admin's certificate.
    pub fn channel_of(&self, number: usize) -> Result<Channel> {
        self.admin.channel(self.addresses_of(number)?.api)
    }

    /// The process id of one controller.
    pub fn controller_pid(&self, number: usize) -> Result<u32> {
        let member = self.controllers.get(number).context("there is no such controller")?;
        member.process.id().context("it does not run")
    }

    /// Bytes of memory of one controller. `which`: a line of `/proc/PID/status`, for example `VmRSS` or `VmHWM`.
    pub fn memory(&self, number: usize, which: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.controller_pid(number)?))?;
        let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'));
        let kilobytes: u64 = line.context("no such line")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes * 1024)
    }

    /// Number of open file descriptors of one controller.
    pub fn files(&self, number: usize) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.controller_pid(number)?))?.count())
    }

    /// The whole log of one controller, over all its starts.
    pub fn controller_log(&self, number: usize) -> Result<String> {
        self.log(&format!("{}.log", folder("controller", number)))
    }

    /// The whole log of the agent process, over all its starts.
    pub fn agents_log(&self) -> Result<String> {
        self.log("agents.log")
    }

    fn log(&self, name: &str) -> Result<String> {
        let text = std::fs::read(self.dir().join(name)).with_context(|| name.to_owned())?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}
