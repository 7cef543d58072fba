//! The command line, the configuration file, and the order in which they count.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use marco_proto::secrets;
use serde::Deserialize;

use crate::discovery::Address;
use crate::identity::JoinToken;
use crate::run::{Asking, Connection};

/// Configuration file if no other is named; it need not exist.
const DEFAULT_FILE: &str = "/etc/marco/agent.toml";
const DEFAULT_LOG: &str = "info";
/// Hint for a user without a join token.
const MAKE_ONE: &str = "`marcoctl tokens create` prints one";

/// The agent of Marco Bootstrap: runs on every Raspberry Pi of a fleet, does what its controller asks (reboot, power
/// off, update), and installs the Pi when it is started as its installer.
#[derive(Debug, Parser)]
#[command(
    name = "marco-agent",
    version,
    long_version = crate::install::LONG_VERSION,
    after_help = "What is set where: defaults < configuration file < MARCO_* variables < options.\n\n\
                  To let a Pi in: `marcoctl tokens create` on the operator's side, then here\n  \
                  marco-agent enroll --token-file FILE       (--controller HOST: a certain one)\n  \
                  systemctl enable --now marco-agent\n\
                  or put the token into marco/join.toml on the card's boot partition.\n\n\
                  To try it without a Pi:\n  \
                  marco-agent simulate --count 3 --dir ./pis --controller localhost:1346 --token-file FILE"
)]
pub struct Cli {
    /// Configuration file [default: /etc/marco/agent.toml, if it is there]
    #[arg(long, global = true, env = "MARCO_AGENT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Filter of the log on stderr: a level, or a filter such as `info,node_agent=debug`; RUST_LOG is heeded, too
    #[arg(long, global = true, env = "MARCO_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// The command to run
    #[command(subcommand)]
    pub command: Command,
}

/// Commands of the agent.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run as the daemon of this machine until it is told to stop (SIGTERM)
    Run(ConnectionArgs),
    /// Run as this machine's installer: only in the installer's own system, before there is another one
    Install(ConnectionArgs),
    /// Exchange a join token for this machine's identity, print the node's id, and end
    Enroll(ConnectionArgs),
    /// Ask the network for controllers, print their addresses, one a line and without a port, and end
    ///
    /// Asks by mDNS (the service _marco-bootstrap._tcp) and by MarcoPolo, the protocol of the 2015 system (UDP 1337,
    /// groups 224.0.0.112 and 224.0.0.113), on every interface. It takes two seconds if a controller answers, and six
    /// if none does; then it exits with 1. An answer alone gains no trust: `run`, `enroll` and `install`, which ask in
    /// the same way if no controller is named, go on only with one of the CA that the node knows.
    Discover(DiscoverArgs),
    /// Run virtual Pis, each in a folder of its own, in this one process, until it is told to stop (SIGTERM)
    Simulate(SimulateArgs),
}

/// Options of `discover`.
#[derive(Debug, Args)]
pub struct DiscoverArgs {
    /// Print the address that answers first, and do not wait for others
    #[arg(long)]
    pub first: bool,
}

/// Options by which the agent finds its controllers and gets in.
#[derive(Debug, Clone, Default, Args)]
pub struct ConnectionArgs {
    /// A controller's API; repeat it for several, tried in this order [port: 1346] [default: those of marco/join.toml on
    /// the card, and those that worked before; then who answers by mDNS or MarcoPolo]
    #[arg(long = "controller", env = "MARCO_CONTROLLER", value_name = "HOST:PORT", value_delimiter = ',')]
    pub controllers: Vec<Address>,
    /// An enrolment listener; repeat it for several [default: the controllers' hosts, port 1347]
    #[arg(long, env = "MARCO_ENROLL", value_name = "HOST:PORT", value_delimiter = ',')]
    pub enroll: Vec<Address>,
    /// A controller to try when none is named and none is found; repeat it for several [port: 1346]
    #[arg(long, env = "MARCO_FALLBACK", value_name = "HOST:PORT", value_delimiter = ',')]
    pub fallback: Vec<Address>,
    /// File with a join token; it is only read. MARCO_TOKEN may hold the token itself
    #[arg(long, env = "MARCO_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// `-`: read the join token from standard input. (A token given here is seen by every user of the machine.)
    #[arg(long, value_name = "-", conflicts_with = "token_file")]
    pub token: Option<String>,
    /// The id to ask for when the node is enrolled [default: made from the board's serial number]
    #[arg(long, env = "MARCO_NODE_NAME", value_name = "ID")]
    pub name: Option<String>,
}

/// Options of `simulate`.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// Number of Pis
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: u32,
    /// Folder for them: DIR/ID/{recovery,boot,root,home,agent,log.jsonl}; what is there is used again
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Prefix of the ids; a number follows
    #[arg(long, value_name = "TEXT", default_value = "pi-")]
    pub prefix: String,
    /// From power or reset until the agent runs
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = humantime::parse_duration)]
    pub boot_time: Duration,
    /// From the command to go down until the Pi is down
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = humantime::parse_duration)]
    pub shutdown_time: Duration,
    /// New Pis have only the installer on their cards, and no system: they get the default image of their board
    #[arg(long, conflicts_with = "stock")]
    pub blank: bool,
    /// New Pis have cards as a stock image has them, with one boot partition: their first update partitions them again
    #[arg(long)]
    pub stock: bool,
    /// The way to the controller
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// The configuration file. Every key is shown, with its default, in `dist/agent.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Controllers, host or host:port, in the order to try.
    pub controllers: Vec<String>,
    /// Enrolment listeners; empty: the controllers' hosts, port 1347.
    pub enroll: Vec<String>,
    /// Controllers to try if none is named and none is found.
    pub fallback: Vec<String>,
    /// File with a join token. It may be gone once the node is enrolled.
    pub token_file: Option<PathBuf>,
    /// The id to ask for; unset: the controller makes one.
    pub name: Option<String>,
    /// Filter of the log; unset: `info`.
    pub log: Option<String>,
    /// Folder of the journal.
    pub state_dir: Option<PathBuf>,
    /// Folder of the key and the certificates.
    pub identity_dir: Option<PathBuf>,
    /// Program that reboots and powers off, with its first arguments.
    pub shutdown_command: Option<Vec<String>>,
}

impl File {
    /// Reads the file that was named, or the usual one if it is there.
    pub fn read(named: Option<&Path>) -> anyhow::Result<Self> {
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            // A file that was named must exist.
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        toml::from_str(&text).with_context(|| format!("{} is not a configuration of marco-agent", path.display()))
    }

    /// Returns the filter of the log: the option, else RUST_LOG, else the file.
    pub fn log(&self, option: Option<&str>) -> String {
        let variable = || std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
        let chosen = option.map(str::to_owned).or_else(variable).or_else(|| self.log.clone());
        chosen.unwrap_or_else(|| DEFAULT_LOG.to_owned())
    }
}

impl ConnectionArgs {
    /// Merges the options over the file, and reads the token.
    pub fn resolve(&self, file: &File) -> anyhow::Result<Connection> {
        let addresses = |given: &[Address], key: &str, texts: &[String]| -> anyhow::Result<Vec<Address>> {
            if !given.is_empty() {
                return Ok(given.to_vec());
            }
            let parsed: Result<_, _> = texts.iter().map(|text| text.parse()).collect();
            parsed.with_context(|| format!("{key} in the configuration file"))
        };
        let text = match (self.token.as_deref(), &self.token_file) {
            (Some("-"), _) => Some(read_standard_input()?),
            (Some(literal), _) => {
                tracing::warn!("a token on the command line is seen by every user of this machine; use --token-file");
                Some(literal.to_owned())
            }
            (None, Some(path)) => Some(read_token(path)?),
            (None, None) => match std::env::var("MARCO_TOKEN").ok().filter(|token| !token.is_empty()) {
                Some(token) => Some(token),
                None => match &file.token_file {
                    // An enrolled node needs no token any more, and the file may be gone.
                    Some(path) if path.exists() => Some(read_token(path)?),
                    _ => None,
                },
            },
        };
        let token = text.map(|text| JoinToken::parse(&text)).transpose()?;
        let name = self.name.clone().or_else(|| file.name.clone()).unwrap_or_default();
        if !name.is_empty() {
            marco_proto::names::NodeId::parse(&name)?;
        }
        let fallback = addresses(&self.fallback, "fallback", &file.fallback)?;
        Ok(Connection {
            controllers: addresses(&self.controllers, "controllers", &file.controllers)?,
            enroll: addresses(&self.enroll, "enroll", &file.enroll)?,
            token,
            name,
            // A search happens only if no controllers are named.
            search: Some(Asking { fallback, ..Asking::default() }),
        })
    }
}

fn read_token(path: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the token file {}", path.display()))?;
    token(&bytes, &path.display().to_string())
}

fn token(bytes: &[u8], place: &str) -> anyhow::Result<String> {
    // Names the kind of the contents, never the contents: the file may be another secret.
    let wrong = |holds: &str| anyhow::anyhow!("{place} is not a join token: it holds {holds}. {MAKE_ONE}");
    let text = secrets::join_token(bytes).map_err(wrong)?;
    JoinToken::parse(&text).map_err(|_| wrong("a join token with a slip of the pen"))?;
    Ok(text)
}

fn read_standard_input() -> anyhow::Result<String> {
    /// Most bytes that are read; a token is shorter.
    const LIMIT: u64 = 4096;
    let mut bytes = Vec::new();
    std::io::stdin().take(LIMIT).read_to_end(&mut bytes).context("cannot read a token from standard input")?;
    token(&bytes, "standard input")
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::{Cli, Command, File};

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_program_says_when_it_was_built() {
        let text = Cli::command().render_long_version();
        assert!(text.contains("marco-agent was built at 1"), "{text}");
    }

    #[test]
    fn unknown_keys_of_the_file_are_refused() {
        assert!(toml::from_str::<File>("controler = []").is_err());
    }

    #[test]
    fn the_example_in_dist_shows_every_key_and_changes_nothing() {
        let example = include_str!("../dist/agent.toml");
        assert_eq!(toml::from_str::<File>(example).unwrap(), File::default());
        // `#key = value` is an example, `# text` is prose.
        let keys: String = example
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .map(|line| format!("{line}\n"))
            .collect();
        let all: File = toml::from_str(&keys).unwrap();
        assert!(!all.controllers.is_empty() && !all.enroll.is_empty() && all.token_file.is_some());
        assert!(!all.fallback.is_empty());
        assert!(
            all.name.is_some()
                && all.log.is_some()
                && all.state_dir.is_some()
                && all.identity_dir.is_some()
                && all.shutdown_command.is_some()
        );
    }

    #[test]
    fn token_file_that_is_none_is_named_with_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        for (text, holds) in [
            ("", "it holds nothing"),
            ("-----BEGIN CERTIFICATE-----\nabc\n", "it holds a certificate"),
            ("mj1.a.b.hunter2", "a slip of the pen"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = super::read_token(&path).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()) && error.contains(holds), "{error}");
            assert!(error.contains("marcoctl tokens create") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn options_go_over_the_file() {
        let cli = Cli::parse_from(["marco-agent", "run", "--controller", "a:1", "--controller", "b"]);
        let Command::Run(args) = cli.command else { panic!("not run") };
        let file = File { controllers: vec!["c".into()], enroll: vec!["d:4".into()], ..File::default() };
        let connection = args.resolve(&file).unwrap();
        let texts: Vec<String> = connection.controllers.iter().map(|address| address.api()).collect();
        assert_eq!(texts, ["a:1", "b:1346"]);
        assert_eq!(connection.enroll.first().unwrap().enroll(), "d:4");
    }
}
