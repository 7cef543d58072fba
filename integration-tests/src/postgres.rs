//! A real Postgres for tests: one server for each test process, one database for each test.
//!
//! The server ends, and its folder is removed, however the test process ends: a shell waits for the end of a pipe of
//! which only this process holds the writing end.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::failing::Failing;

/// A running Postgres server.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    folder: PathBuf,
    port: u16,
    /// `max_connections` of the server.
    connections: u32,
    databases: AtomicU32,
    /// Its disk, if that can fail.
    failing: Option<Failing>,
    /// Shell that stops the server at the end of its standard input. An `Option` only so that `drop` can close that
    /// pipe first.
    janitor: Option<Child>,
}

/// Default of `max_connections`: many fleets share one server.
const CONNECTIONS: u32 = 200;
/// Script of the janitor. `$1` is the folder; the rest is the command that stops the server.
const JANITOR: &str =
    r#"trap "" HUP INT TERM; cat > /dev/null; folder=$1; shift; "$@" > /dev/null 2>&1; rm -rf "$folder""#;

impl Postgres {
    /// The server that all tests of this process share. The first caller starts it.
    pub fn start() -> anyhow::Result<&'static Self> {
        static SHARED: OnceLock<Result<Postgres, String>> = OnceLock::new();
        match SHARED.get_or_init(|| Self::start_own().map_err(|error| format!("{error:#}"))) {
            Ok(server) => Ok(server),
            Err(error) => bail!("Postgres did not start: {error}"),
        }
    }

    /// Starts a server for one test, for faults that would disturb the others (outages).
    pub fn start_own() -> anyhow::Result<Self> {
        Self::start_own_for(CONNECTIONS)
    }

    /// Starts a server with this `max_connections`; a test that uses all of them wants few.
    pub fn start_own_for(connections: u32) -> anyhow::Result<Self> {
        let mut server = Self::empty()?;
        server.connections = connections;
        server.janitor = Some(server.hire_janitor()?);
        let data = server.data();
        run(server
            .program("initdb")?
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8"])
            .arg("--pgdata")
            .arg(&data))?;
        server.resume()?;
        Ok(server)
    }

    /// Starts a server whose disk can fail below its write-ahead log.
    pub fn start_own_failing() -> anyhow::Result<(Self, Failing)> {
        let mut server = Self::start_own()?;
        let failing = Failing::build(&server.folder, "pg_wal")?;
        server.pause()?;
        server.failing = Some(failing.clone());
        server.resume()?;
        Ok((server, failing))
    }

    /// Prepares a folder and a port; starts nothing.
    fn empty() -> anyhow::Result<Self> {
        let programs = find_programs()?;
        let folder = tempfile::Builder::new().prefix("marco-postgres-").tempdir()?.keep();
        if let Some(user) = user()? {
            std::os::unix::fs::chown(&folder, Some(user.uid), Some(user.gid))?;
        }
        let (port, databases) = (free_port()?, AtomicU32::new(0));
        Ok(Self { programs, folder, port, connections: CONNECTIONS, databases, failing: None, janitor: None })
    }

    /// Creates an empty database and returns its URL.
    pub fn database(&self) -> anyhow::Result<String> {
        let name = format!("marco_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        run(self
            .program("psql")?
            .args(["--no-psqlrc", "--quiet", "--host=127.0.0.1", "--username=postgres", "--dbname=postgres"])
            .arg(format!("--port={}", self.port))
            // `template0` accepts no connections. `template1` cannot be copied while another session uses it.
            .arg(format!("--command=CREATE DATABASE {name} TEMPLATE template0")))?;
        Ok(format!("postgres://postgres@127.0.0.1:{}/{name}", self.port))
    }

    /// Creates an empty database with its tables in a folder of their own, and returns its URL. The write-ahead log
    /// stays with the server's data.
    pub fn database_in(&self, folder: &Path) -> anyhow::Result<String> {
        let number = self.databases.fetch_add(1, Ordering::Relaxed);
        let (name, tables) = (format!("marco_{number}"), folder.join("tables"));
        fs::create_dir(&tables)?;
        if let Some(user) = user()? {
            std::os::unix::fs::chown(&tables, Some(user.uid), Some(user.gid))?;
            // The server's user must reach the folder, and temporary folders are private to this user.
            for above in tables.ancestors().skip(1).filter(|above| above.starts_with(std::env::temp_dir())) {
                let open = fs::metadata(above)?.permissions().mode() | 0o011;
                fs::set_permissions(above, fs::Permissions::from_mode(open))?;
            }
        }
        let url = |database: &str| format!("postgres://postgres@127.0.0.1:{}/{database}", self.port);
        for statement in [
            format!("CREATE TABLESPACE {name} LOCATION '{}'", tables.display()),
            format!("CREATE DATABASE {name} TEMPLATE template0 TABLESPACE {name}"),
        ] {
            self.by_hand(&url("postgres"), &statement)?.map_err(anyhow::Error::msg)?;
        }
        Ok(url(&name))
    }

    /// Starts a PgBouncer in front of this server, in transaction mode; `None` if it is not installed.
    pub fn pooler(&self) -> anyhow::Result<Option<Pooler>> {
        pgbouncers().first().map(|program| self.pooler_of(program)).transpose()
    }

    /// Starts this PgBouncer in front of this server, in transaction mode.
    pub fn pooler_of(&self, program: &Path) -> anyhow::Result<Pooler> {
        let (port, folder) = (free_port()?, tempfile::Builder::new().prefix("marco-pgbouncer-").tempdir()?);
        if let Some(user) = user()? {
            std::os::unix::fs::chown(folder.path(), Some(user.uid), Some(user.gid))?;
        }
        let settings = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 5\n",
            self.port
        );
        // `auth_type = any` ignores the client's user name, so the server's user must be named here.
        let text = text.replace(&format!("port={}", self.port), &format!("port={} user=postgres", self.port));
        fs::write(&settings, text)?;
        let program = program.to_owned();
        let mut pooler = Pooler { program, settings, port, child: None, _folder: folder };
        pooler.restart()?;
        Ok(pooler)
    }

    /// The rows of a query on one of its databases, as JSON objects.
    pub fn rows(&self, url: &str, query: &str) -> anyhow::Result<Vec<serde_json::Value>> {
        let mut psql = self.program("psql")?;
        psql.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--dbname"]).arg(url);
        let output = psql.arg(format!("--command=SELECT row_to_json(q) FROM ({query}) q")).output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// The rows of several queries from one snapshot. With separate queries, a running fleet changes the data between
    /// them.
    pub fn snapshot<const N: usize>(
        &self,
        url: &str,
        queries: [&str; N],
    ) -> anyhow::Result<[Vec<serde_json::Value>; N]> {
        let mut psql = self.program("psql")?;
        psql.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "--dbname"])
            .arg(url);
        // At this isolation level a transaction sees the database as it was at its first query.
        psql.arg("--command=BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
        for (number, query) in queries.iter().enumerate() {
            psql.arg(format!("--command=SELECT {number} || ' ' || row_to_json(q)::text FROM ({query}) q"));
        }
        let output = psql.arg("--command=COMMIT").output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut found: [Vec<serde_json::Value>; N] = std::array::from_fn(|_| Vec::new());
        for line in String::from_utf8(output.stdout)?.lines() {
            let (number, row) = line.split_once(' ').with_context(|| format!("no row: {line:?}"))?;
            let rows = found.get_mut(number.parse::<usize>()?).with_context(|| format!("no query: {line:?}"))?;
            rows.push(serde_json::from_str(row)?);
        }
        Ok(found)
    }

    /// Listen address of the server.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Makes a synchronous standby of this server: from now on each COMMIT waits for both.
    pub fn standby(&self) -> anyhow::Result<Self> {
        let mut standby = Self::empty()?;
        standby.connections = self.connections;
        standby.janitor = Some(standby.hire_janitor()?);
        run(standby
            .program("pg_basebackup")?
            .args(["--host=127.0.0.1", "--username=postgres", "--write-recovery-conf", "--wal-method=stream"])
            .args(["--checkpoint=fast", "--no-sync"])
            .arg(format!("--port={}", self.port))
            .arg("--pgdata")
            .arg(standby.data()))?;
        standby.resume()?;
        let url = format!("postgres://postgres@{}/postgres", self.address());
        for statement in ["ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"] {
            self.by_hand(&url, statement)?.map_err(anyhow::Error::msg)?;
        }
        Ok(standby)
    }

    /// Promotes a standby to primary: it takes writes, and waits for no other server.
    pub fn promote(&self) -> anyhow::Result<()> {
        run(self.program("pg_ctl")?.args(["promote", "--wait", "--pgdata"]).arg(self.data()))
    }

    /// Runs statements in a session of their own. Dropping the returned process ends the session.
    pub fn session(&self, url: &str, statements: &str) -> anyhow::Result<tokio::process::Child> {
        let mut psql = tokio::process::Command::from(self.program("psql")?);
        psql.args(["--no-psqlrc", "--quiet", "--dbname", url, "--command", statements]);
        psql.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        psql.spawn().context("psql")
    }

    /// Number of connections that ordinary users can still open. Connections reserved for superusers do not count.
    pub fn connections_left(&self, url: &str) -> anyhow::Result<usize> {
        let left = "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int \
                    - count(*) AS left FROM pg_stat_activity WHERE backend_type = 'client backend'";
        let rows = self.rows(url, left)?;
        let left = rows.first().and_then(|row| row["left"].as_u64()).unwrap_or_default();
        Ok(usize::try_from(left)?)
    }

    /// Runs a statement in the database at `url`. The inner error is the database's message.
    pub fn by_hand(&self, url: &str, statement: &str) -> anyhow::Result<Result<(), String>> {
        let mut psql = self.program("psql")?;
        let output = psql.args(["--no-psqlrc", "--quiet", "--dbname", url, "--command", statement]).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(if output.status.success() { Ok(()) } else { Err(said) })
    }

    /// Stops the server at once (immediate mode), as an outage does; connections break.
    pub fn pause(&self) -> anyhow::Result<()> {
        run(self.program("pg_ctl")?.args(["stop", "--wait", "--mode=immediate", "--pgdata"]).arg(self.data()))
    }

    /// Starts the server, also again, on the same port with the same databases, and waits until it answers.
    pub fn resume(&self) -> anyhow::Result<()> {
        // Tests kill the server's processes and never the machine, so nothing is lost without fsync. A disk that fails
        // is noticed only with it.
        let options = format!(
            "-p {} -k {} -c listen_addresses=127.0.0.1 -c fsync={} -c max_connections={}",
            self.port,
            self.folder.display(),
            if self.failing.is_some() { "on" } else { "off" },
            self.connections
        );
        let log = self.folder.join("log");
        run(self
            .program("pg_ctl")?
            .envs(self.failing.iter().flat_map(Failing::environment))
            .args(["start", "--wait", "--timeout=60", "--pgdata"])
            .arg(self.data())
            .arg("--log")
            .arg(&log)
            .arg("--options")
            .arg(options))
        .with_context(|| fs::read_to_string(&log).unwrap_or_default())
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Dumps a whole database with `pg_dump`.
    pub fn dump(&self, url: &str) -> anyhow::Result<Vec<u8>> {
        let dump = self.program("pg_dump")?.args(["--dbname", url]).output().context("pg_dump")?;
        ensure!(dump.status.success(), "pg_dump: {}", String::from_utf8_lossy(&dump.stderr));
        Ok(dump.stdout)
    }

    fn program(&self, name: &str) -> anyhow::Result<Command> {
        let mut command = as_user(&self.programs.join(name))?;
        command.current_dir(&self.folder);
        Ok(command)
    }

    fn hire_janitor(&self) -> anyhow::Result<Child> {
        let mut stop = as_user(&self.programs.join("pg_ctl"))?;
        stop.args(["stop", "--wait", "--mode=immediate", "--pgdata"]).arg(self.data());
        let mut janitor = command(Path::new("/bin/sh"));
        janitor.arg("-c").arg(JANITOR).arg("janitor").arg(&self.folder).arg(stop.get_program()).args(stop.get_args());
        janitor.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(janitor.spawn()?)
    }
}

/// The PgBouncers of this machine: the packaged one, and those that `scripts/pgbouncer.sh` put beside it.
pub fn pgbouncers() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    let packaged = folders.map(|folder| folder.join("pgbouncer")).find(|program| program.is_file());
    let mut beside: Vec<PathBuf> = fs::read_dir("/usr/local/lib")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("pgbouncer-"))
        .map(|entry| entry.path().join("pgbouncer"))
        .filter(|program| program.is_file())
        .collect();
    beside.sort();
    packaged.into_iter().chain(beside).collect()
}

/// A running PgBouncer, killed on drop.
#[derive(Debug)]
pub struct Pooler {
    program: PathBuf,
    settings: PathBuf,
    port: u16,
    child: Option<Child>,
    _folder: tempfile::TempDir,
}

impl Pooler {
    /// Its version, for example `(1, 24)`.
    pub fn version(&self) -> anyhow::Result<(u32, u32)> {
        let said = command(&self.program).arg("--version").output().context("pgbouncer --version")?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let mut numbers = said.split_whitespace().nth(1).unwrap_or_default().split('.').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => bail!("pgbouncer says of itself: {said}"),
        }
    }

    /// The pooler's URL for the database at `direct`.
    pub fn url(&self, direct: &str) -> String {
        let database = direct.rsplit('/').next().unwrap_or_default();
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Restarts the pooler, so that it opens new connections to the server.
    #[expect(clippy::disallowed_methods, reason = "waits for a condition, bounded; there is no runtime here")]
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.end();
        let mut command = as_user(&self.program)?;
        command.arg("-q").arg(&self.settings).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().context("pgbouncer")?);
        for _ in 0..200 {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("pgbouncer does not listen")
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // `kill` fails for a process that has ended already; `wait` reaps it all the same.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.end();
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut janitor) = self.janitor.take() {
            drop(janitor.stdin.take());
            // There is no remedy for a janitor that failed.
            let _ = janitor.wait();
        }
    }
}

/// The unprivileged user that the server runs as.
struct User {
    name: &'static str,
    uid: u32,
    gid: u32,
}

/// Postgres refuses to run as root, so it runs as `postgres`, or else as `nobody`. `None`: this process is not root.
fn user() -> anyhow::Result<Option<User>> {
    if fs::metadata("/proc/self")?.uid() != 0 {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd")?;
    for name in ["postgres", "nobody"] {
        let line = passwd.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let mut fields = line.unwrap_or_default().split(':').skip(1).map(str::parse);
        if let (Some(Ok(uid)), Some(Ok(gid))) = (fields.next(), fields.next()) {
            return Ok(Some(User { name, uid, gid }));
        }
    }
    bail!("this process is root, and there is neither a user `postgres` nor `nobody` to run the server as")
}

fn as_user(program: &Path) -> anyhow::Result<Command> {
    let Some(user) = user()? else { return Ok(command(program)) };
    let mut wrapped = command(Path::new("setpriv"));
    wrapped
        .arg(format!("--reuid={}", user.uid))
        .arg(format!("--regid={}", user.gid))
        .arg("--clear-groups")
        .arg("--")
        .arg(program)
        .env("USER", user.name);
    Ok(wrapped)
}

#[allow(clippy::disallowed_methods, reason = "test harness: nothing of the product, and there is no runtime here")]
fn command(program: &Path) -> Command {
    Command::new(program)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let log = tempfile::tempfile()?;
    // Output goes to a file, not to a pipe: the server inherits it and would keep a pipe open for as long as it runs.
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let status = command.status().with_context(|| format!("{command:?}"))?;
    let mut said = String::new();
    io::Seek::rewind(&mut &log)?;
    io::Read::read_to_string(&mut &log, &mut said)?;
    ensure!(status.success(), "{command:?}: {status}: {said}");
    Ok(())
}

/// The folder with `initdb`: the newest version under Debian's path, otherwise one of `PATH`.
fn find_programs() -> anyhow::Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for entry in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        let version = entry.file_name().to_string_lossy().parse().unwrap_or(0);
        found.push((version, entry.path().join("bin")));
    }
    found.sort();
    // Newest version first.
    let debian = found.into_iter().rev().map(|(_, folder)| folder);
    let path = std::env::var_os("PATH").unwrap_or_default();
    debian
        .chain(std::env::split_paths(&path))
        .find(|folder| folder.join("initdb").is_file())
        .context("no initdb under /usr/lib/postgresql or in PATH: install Postgres (`make deps`)")
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
