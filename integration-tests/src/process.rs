//! Child processes: found beside the test, logged to a file, killed with SIGKILL, and never left behind.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::process::{Child, Command};

/// Finds a program of this workspace in the folders above this test's binary.
///
/// Cargo tells a test only the programs of its own package, so the others are searched for.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this test is")?;
    own.ancestors()
        // Tests are in `deps/`, programs in the folder above it.
        .skip(1)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} has not been built: run `cargo build --bins` first, or `make test`"))
}

/// The workspace's root folder.
pub fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// Finds a third-party program: in the workspace's `.venv`, otherwise in `PATH`.
pub fn tool(name: &str) -> Result<PathBuf> {
    let venv = workspace().join(".venv/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(venv)
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed: run `make deps` first, or `make test`"))
}

/// Command line, environment and log of a process, to start it more than once.
#[derive(Debug, Clone)]
pub struct Recipe {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    log: PathBuf,
}

/// A child process. Its output goes to a file. It is killed when this value is dropped and when this test ends.
#[derive(Debug)]
pub struct Process {
    recipe: Recipe,
    child: Option<Child>,
}

impl Recipe {
    /// A program with its arguments. Standard output and error are appended to `log`.
    pub fn new(program: PathBuf, arguments: impl IntoIterator<Item = impl Into<String>>, log: PathBuf) -> Self {
        let arguments = arguments.into_iter().map(Into::into).collect();
        Self { program, arguments, environment: Vec::new(), log }
    }

    /// Adds an environment variable.
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// Starts the process.
    pub fn start(self) -> Result<Process> {
        let mut process = Process { recipe: self, child: None };
        process.start()?;
        Ok(process)
    }
}

impl Process {
    /// Starts the process, also again, with the same arguments.
    pub fn start(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("{} already runs", self.recipe.program.display());
        }
        let Recipe { program, arguments, environment, log } = &self.recipe;
        let log = File::options().create(true).append(true).open(log).context("the log of a process")?;
        // The kernel kills the child when the thread that started it ends, even if this test is killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            // A developer's own settings must not send a test's controller to their database.
            .env_remove("DATABASE_URL")
            .env_remove("MARCO_DATABASE_URL")
            .env_remove("MARCO_TOKEN")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Kills the process (`-9`) and waits for its end.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await.with_context(|| format!("killing {}", self.recipe.program.display()))?;
        }
        Ok(())
    }

    /// The process id; `None` while it does not run.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Sends a signal, named without `SIG`.
    pub async fn signal(&self, name: &str) -> Result<()> {
        let pid = self.child.as_ref().and_then(Child::id).context("it does not run")?;
        let sent = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().await?;
        if !sent.success() {
            bail!("kill -{name} {pid} failed");
        }
        Ok(())
    }

    /// Sends SIGTERM and waits for the end, at most for `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal("TERM").await?;
        let mut child = self.child.take().context("it does not run")?;
        tokio::time::timeout(limit, child.wait())
            .await
            .with_context(|| format!("{} did not end in {limit:?}", self.recipe.program.display()))?
            .context("waiting for it")
    }

    /// Waits until the process ends by itself. Cancel-safe: dropping the future leaves it running.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let child = self.child.as_mut().context("it does not run")?;
        let status = child.wait().await.context("waiting for it")?;
        self.child = None;
        Ok(status)
    }

    /// Returns an error, with the end of the log, if the process has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait()?
        {
            bail!("{} ended by itself: {status}\n{}", self.recipe.program.display(), self.tail(20));
        }
        Ok(())
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        let text = std::fs::read(&self.recipe.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all.iter().skip(all.len().saturating_sub(lines)).map(|line| format!("    {line}\n")).collect()
    }
}

impl Drop for Process {
    /// Kills the process and waits up to 5 s, so that nothing writes into folders that are removed next.
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = child.start_kill();
        // `drop` cannot await, so it polls.
        let given_up = Instant::now() + Duration::from_secs(5);
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < given_up {
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

/// Output and exit status of a program.
#[derive(Debug)]
pub struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Standard error; bytes that are not UTF-8 are replaced.
    pub stderr: String,
}

impl Output {
    /// Returns standard output if the program succeeded, otherwise an error with all output.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            bail!("{}\nstdout: {}\nstderr: {}", self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}

/// Runs a program to its end. Returns an error if that takes longer than `limit`.
pub async fn run(program: &Path, arguments: &[&str], limit: Duration) -> Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(limit, command.output())
        .await
        .with_context(|| format!("{} {arguments:?} did not end in {limit:?}", program.display()))?
        .with_context(|| format!("starting {}", program.display()))?;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Raises this test's limit of open files to the hard limit. A test with many connections holds both ends, more than a
/// shell's default allows.
pub fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
