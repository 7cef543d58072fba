//! Settings: defaults, then the configuration file, then `MARCO_*` variables, then flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use chrono::TimeDelta;
use clap::{Args, Parser, Subcommand};
use marco_proto::names::{API_PORT, ENROLL_PORT, MIRROR_PORT};
use serde::Deserialize;

use crate::clock;
use crate::discovery::Ways;
use crate::identity::ca::Ca;

/// Default of `missed-after`.
const MISSED_AFTER: Duration = Duration::from_secs(300);
/// Upper limit of `missed-after`: a fire that is later than a day would surprise everyone.
const MISSED_AFTER_MAX: TimeDelta = TimeDelta::days(1);
/// Default of `keep-events`, in days.
const KEEP_EVENTS_DAYS: u32 = 90;

/// The command line of `marco-controller`.
#[derive(Debug, Parser)]
#[command(name = "marco-controller", version, about = "The control plane of a fleet of Raspberry Pis", long_about = None)]
pub struct Cli {
    /// The verb.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs of `marco-controller`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the controller until SIGTERM or Ctrl-C.
    ///
    /// In an empty folder it just works: an embedded SQLite database, development certificates in ./certs, and one
    /// line on standard output that shows how to call it. Logs go to standard error (RUST_LOG sets their level).
    Serve(ServeArgs),
}

/// Flags and variables of `serve`. Unset ones come from the file or the defaults.
#[derive(Debug, Clone, Default, Args)]
pub struct ServeArgs {
    /// Read settings from this TOML file; unknown keys are refused
    #[arg(long, env = "MARCO_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the database, the artifacts and the CA's key [default: ./marco-data]
    #[arg(long, env = "MARCO_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Folder of the certificates for operators and the controller, also read from MARCO_CERTS unless that folder holds
    /// an operator's certificates of another controller [default: ./certs]
    #[arg(long, value_name = "DIR")]
    pub certs: Option<PathBuf>,
    /// The database: postgres://USER:PASSWORD@HOST/NAME, or sqlite:///PATH; also read from DATABASE_URL
    /// [default: DATA-DIR/marco.db]
    #[arg(long, env = "MARCO_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Address of the API and of the agents' streams [default: [::]:1346]
    #[arg(long, env = "MARCO_LISTEN", value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Address where nodes enrol [default: the API's address, port 1347]
    #[arg(long, env = "MARCO_ENROLL_LISTEN", value_name = "ADDR")]
    pub enroll_listen: Option<SocketAddr>,
    /// Address of the file mirror, for installers of the 2015 system [default: the API's address, port 1345, if it is
    /// free]
    #[arg(long, env = "MARCO_MIRROR_LISTEN", value_name = "ADDR")]
    pub mirror_listen: Option<SocketAddr>,
    /// Address of the metrics; accepted, and used once this version serves them
    #[arg(long, env = "MARCO_METRICS_LISTEN", value_name = "ADDR")]
    pub metrics_listen: Option<SocketAddr>,
    /// Discovery methods to offer: mdns, marcopolo, both with a comma between them, or off
    /// [default: mdns,marcopolo unless the API listens on the loopback interface]
    #[arg(long, env = "MARCO_DISCOVERY", value_name = "WAYS")]
    pub discovery: Option<Ways>,
    /// Times of schedules that are noticed later than this are missed [default: 5m]
    #[arg(long, env = "MARCO_MISSED_AFTER", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub missed_after: Option<Duration>,
    /// A further host name or address by which operators reach this controller; repeats
    #[arg(long = "name", env = "MARCO_NAME", value_name = "HOST", value_delimiter = ',')]
    pub names: Vec<String>,
    /// Pass changes on between controllers by LISTEN and NOTIFY; without, the others see them within a second [default:
    /// true]
    #[arg(long, env = "MARCO_NOTIFICATIONS", value_name = "BOOL")]
    pub notifications: Option<bool>,
    /// Days for which the events of an operation are kept after its end; the operation itself is kept forever [default:
    /// 90]
    #[arg(long, env = "MARCO_KEEP_EVENTS", value_name = "DAYS")]
    pub keep_events: Option<u32>,
}

/// Environment variables that other programs read as well.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    /// `DATABASE_URL`.
    pub database_url: Option<String>,
    /// `MARCO_CERTS`, which names an operator's folder for `marcoctl`.
    pub certs: Option<PathBuf>,
}

impl Shared {
    /// Reads them from the process; an empty value counts as unset.
    pub fn of_process() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { database_url: variable("DATABASE_URL"), certs: variable("MARCO_CERTS").map(PathBuf::from) }
    }
}

/// Keys of the configuration file; the same names as the flags.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    data_dir: Option<PathBuf>,
    certs: Option<PathBuf>,
    database_url: Option<String>,
    listen: Option<SocketAddr>,
    enroll_listen: Option<SocketAddr>,
    mirror_listen: Option<SocketAddr>,
    metrics_listen: Option<SocketAddr>,
    discovery: Option<String>,
    missed_after: Option<String>,
    #[serde(default)]
    name: Vec<String>,
    notifications: Option<bool>,
    keep_events: Option<u32>,
}

/// The settings in force.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of the database, the artifacts and the CA's key.
    pub data_dir: PathBuf,
    /// Folder of the certificates.
    pub certs: PathBuf,
    /// Database URL; it may hold a password.
    pub database_url: String,
    /// The API's address.
    pub listen: SocketAddr,
    /// The enrolment listener's address.
    pub enroll_listen: SocketAddr,
    /// The file mirror's address.
    pub mirror_listen: SocketAddr,
    /// True if the mirror's address was set. Otherwise the controller runs without a mirror if the default is taken.
    pub mirror_asked_for: bool,
    /// Discovery methods to offer.
    pub discovery: Ways,
    /// Delay from which a schedule's time counts as missed.
    pub missed_after: TimeDelta,
    /// Further names in the controller's certificate.
    pub names: Vec<String>,
    /// True if changes are passed on between controllers by LISTEN and NOTIFY.
    pub notifications: bool,
    /// Time for which the events of an operation are kept after its end.
    pub keep_events: TimeDelta,
}

impl Config {
    /// Puts flags, variables, file and defaults together.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or has an unknown key, or if a value has the wrong form.
    pub fn load(args: ServeArgs, shared: Shared) -> anyhow::Result<Self> {
        let file = match &args.config {
            Some(path) => read(path)?,
            None => File::default(),
        };
        let data_dir = args.data_dir.or(file.data_dir).unwrap_or_else(|| "marco-data".into());
        let listen = args
            .listen
            .or(file.listen)
            .unwrap_or_else(|| SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, API_PORT)));
        // On the API's interface: an operator who restricts one of them means both.
        let enroll_listen =
            args.enroll_listen.or(file.enroll_listen).unwrap_or_else(|| SocketAddr::new(listen.ip(), ENROLL_PORT));
        let database_url = match args.database_url.or(shared.database_url).or(file.database_url) {
            Some(url) => url,
            None => format!("sqlite://{}", data_dir.join("marco.db").display()),
        };
        let mirror = args.mirror_listen.or(file.mirror_listen);
        // Accepted so that a configuration for a later version starts this one too.
        if let Some(unserved) = args.metrics_listen.or(file.metrics_listen) {
            tracing::info!(address = %unserved, "this version serves no metrics");
        }
        let discovery = match (args.discovery, file.discovery) {
            (Some(ways), _) => ways,
            (None, Some(text)) => text.parse().context("discovery")?,
            // No other machine could reach the announced address.
            (None, None) if listen.ip().is_loopback() => Ways::OFF,
            (None, None) => Ways::ALL,
        };
        let missed_after = match (args.missed_after, file.missed_after) {
            (Some(patience), _) => patience,
            (None, Some(text)) => humantime::parse_duration(&text).context("missed-after is no length of time")?,
            (None, None) => MISSED_AFTER,
        };
        let missed_after = TimeDelta::from_std(missed_after).context("missed-after is too long")?;
        anyhow::ensure!(missed_after <= MISSED_AFTER_MAX, "missed-after is longer than a day");
        // `marcoctl` reads MARCO_CERTS too. An operator's folder must not be taken for the controller's own.
        let own = |certs: &PathBuf| {
            let own = !is_operators(certs, &data_dir);
            if !own {
                tracing::warn!(
                    folder = %certs.display(),
                    "MARCO_CERTS holds an operator's certificates of another controller: this one does not use it"
                );
            }
            own
        };
        let certs = args.certs.or_else(|| shared.certs.filter(own)).or(file.certs);
        Ok(Self {
            certs: certs.unwrap_or_else(|| "certs".into()),
            data_dir,
            database_url,
            listen,
            enroll_listen,
            mirror_listen: mirror.unwrap_or_else(|| SocketAddr::new(listen.ip(), MIRROR_PORT)),
            // A second controller on one machine must not fail for a mirror that nobody asked for.
            mirror_asked_for: mirror.is_some(),
            discovery,
            missed_after,
            names: if args.names.is_empty() { file.name } else { args.names },
            notifications: args.notifications.or(file.notifications).unwrap_or(true),
            keep_events: TimeDelta::days(i64::from(args.keep_events.or(file.keep_events).unwrap_or(KEEP_EVENTS_DAYS))),
        })
    }
}

/// True if a folder holds an operator's certificates: the CA's certificate, but neither a controller's key nor the
/// certificate of the CA whose key is in the data directory.
fn is_operators(certs: &Path, data_dir: &Path) -> bool {
    let Ok(ca) = std::fs::read_to_string(certs.join("ca.crt")) else { return false };
    // The controller's own folder may have lost its key; the CA's key in the data directory still tells.
    let own_ca = std::fs::read_to_string(data_dir.join("pki").join("ca.key"))
        .is_ok_and(|key| Ca::load(&ca, &key, clock::built()).is_ok());
    !own_ca && !certs.join("controller.key").exists()
}

fn read(path: &Path) -> anyhow::Result<File> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the settings in {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is not a valid configuration", path.display()))
}

#[cfg(test)]
impl Config {
    /// Settings of a controller with its files in this folder, at free ports of the loopback interface.
    pub(crate) fn in_test(folder: &Path) -> Self {
        let anywhere = Some("127.0.0.1:0".parse().unwrap());
        let flags = ServeArgs {
            data_dir: Some(folder.join("data")),
            certs: Some(folder.join("certs")),
            listen: anywhere,
            enroll_listen: anywhere,
            mirror_listen: anywhere,
            ..ServeArgs::default()
        };
        Self::load(flags, Shared::default()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{Config, ServeArgs, Shared};
    use chrono::DateTime;

    use crate::identity::ca::Pki;

    fn with_file(text: &str, args: ServeArgs) -> anyhow::Result<Config> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), text)?;
        Config::load(ServeArgs { config: Some(file.path().to_owned()), ..args }, Shared::default())
    }

    /// The certificate folder that follows from `MARCO_CERTS`, the data directory and the flag.
    fn certs(variable: &Path, data_dir: &Path, flag: Option<&str>) -> PathBuf {
        let args =
            ServeArgs { data_dir: Some(data_dir.to_owned()), certs: flag.map(Into::into), ..ServeArgs::default() };
        Config::load(args, Shared { certs: Some(variable.to_owned()), ..Shared::default() }).unwrap().certs
    }

    #[test]
    fn operators_certificates_are_not_taken_for_the_controllers() {
        let dir = tempfile::tempdir().unwrap();
        let (data, own, theirs) = (dir.path().join("data"), dir.path().join("own"), dir.path().join("theirs"));
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        // An empty folder and a missing one become the controller's own.
        assert_eq!(certs(&own, &data, None), own);
        Pki::open(&data, &own, &[], now, DateTime::UNIX_EPOCH).unwrap();
        assert_eq!(certs(&own, &data, None), own);
        // It stays the controller's own if only its CA is left there.
        std::fs::remove_file(own.join("controller.key")).unwrap();
        assert_eq!(certs(&own, &data, None), own);

        std::fs::create_dir(&theirs).unwrap();
        let (elsewhere, given) = (dir.path().join("elsewhere"), dir.path().join("given"));
        Pki::open(&elsewhere, &given, &[], now, DateTime::UNIX_EPOCH).unwrap();
        for name in ["ca.crt", "admin.crt", "admin.key"] {
            std::fs::copy(given.join(name), theirs.join(name)).unwrap();
        }
        for data in [&data, &dir.path().join("fresh")] {
            assert_eq!(certs(&theirs, data, None).to_str(), Some("certs"));
            assert_eq!(certs(&theirs, data, Some("/flag")).to_str(), Some("/flag"));
            // Named by a flag it is used. The refusal then must not advise to remove a CA.
            assert_eq!(certs(&own, data, Some(theirs.to_str().unwrap())), theirs);
        }
        let refused = |data: &Path, certs: &Path| {
            let opened = Pki::open(data, certs, &[], now, DateTime::UNIX_EPOCH);
            let refused = crate::chain(&opened.map(|_| ()).unwrap_err());
            // A CA that is lost is lost for every node.
            for advice in ["remove", "delete", "erase", "move away", "rm "] {
                assert!(!refused.contains(advice), "{refused}");
            }
            refused
        };
        let said = refused(&dir.path().join("fresh"), &theirs);
        assert!(said.contains("--certs"), "{said}");
        // The other half is missing, and a CA that cannot be read.
        std::fs::remove_file(given.join("ca.crt")).unwrap();
        refused(&elsewhere, &given);
        std::fs::write(own.join("ca.crt"), "no certificate").unwrap();
        refused(&data, &own);
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let args = ServeArgs { listen: Some("127.0.0.1:5".parse().unwrap()), ..ServeArgs::default() };
        let config = with_file("listen = \"127.0.0.1:4\"\ncerts = \"/c\"", args).unwrap();
        assert_eq!(config.listen.port(), 5);
        assert_eq!(config.certs.to_str(), Some("/c"));
        assert_eq!(config.enroll_listen.to_string(), "127.0.0.1:1347");
        assert_eq!((config.mirror_listen.to_string().as_str(), config.mirror_asked_for), ("127.0.0.1:1345", false));
        assert_eq!(config.database_url, "sqlite://marco-data/marco.db");
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = with_file("lisen = \"127.0.0.1:4\"", ServeArgs::default()).unwrap_err();
        assert!(format!("{error:#}").contains("lisen"), "{error:#}");
    }

    #[test]
    fn the_shipped_configuration_is_valid_and_shows_every_key() {
        let shipped = include_str!("../dist/controller.toml");
        let all: String = shipped
            .lines()
            .map(|line| {
                line.strip_prefix('#').filter(|rest| rest.contains(" = ") && !rest.starts_with(' ')).unwrap_or(line)
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let config = with_file(&all, ServeArgs::default()).unwrap();
        assert_eq!(config.names, ["pi-lab.example.org"]);
        assert_eq!((config.notifications, config.keep_events.num_days()), (true, 90));
        for key in [
            "data-dir",
            "certs",
            "database-url",
            "listen",
            "enroll-listen",
            "mirror-listen",
            "metrics-listen",
            "discovery",
            "missed-after",
            "name",
            "notifications",
            "keep-events",
        ] {
            assert!(shipped.lines().any(|line| line.starts_with(&format!("#{key} = "))), "{key} is not shown");
        }
    }
}
