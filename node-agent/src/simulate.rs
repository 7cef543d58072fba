//! `marco-agent simulate`: virtual Pis in one process, through the same code as the real agent. It serves trials
//! without hardware, and load tests.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use marco_proto::names::NodeId;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::cause::chain;
use crate::run::{self, Connection, OnEnrolled};
use crate::system::virtual_pi::{Options, VirtualPi};
use crate::system::{System, SystemError};

/// A simulation of several Pis.
#[derive(Debug, Clone)]
pub struct Simulation {
    /// Number of Pis.
    pub count: u32,
    /// Folder that holds a folder for each Pi, with its id as its name.
    pub directory: PathBuf,
    /// Prefix of their ids; a number follows.
    pub prefix: String,
    /// Times of boot and shutdown, and the contents of new cards.
    pub options: Options,
    /// Settings by which they find the controller.
    pub connection: Connection,
}

/// The simulation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// A Pi could not be made or driven.
    #[error("virtual Pi {id}")]
    Pi {
        /// Id of the Pi.
        id: String,
        /// Cause.
        source: SystemError,
    },
    /// The prefix makes invalid ids.
    #[error("--prefix {prefix:?} makes the id {id:?}: {why}")]
    Prefix {
        /// The prefix as it was given.
        prefix: String,
        /// The first invalid id.
        id: String,
        /// Reason that it is invalid.
        why: String,
    },
    /// The agents of all Pis were refused for good.
    #[error("no virtual Pi can get in; {id}")]
    Refused {
        /// Id of one of them.
        id: String,
        /// Cause.
        source: run::RunError,
    },
    /// The task of a Pi panicked.
    #[error("a virtual Pi stopped working")]
    Broken,
}

impl Simulation {
    /// Returns the Pis' ids: numbered from 1, all of one width.
    pub fn ids(&self) -> Vec<String> {
        let width = self.count.to_string().len().max(2);
        (1..=self.count).map(|number| format!("{}{number:0width$}", self.prefix)).collect()
    }

    /// Fails if the prefix makes invalid ids. Each id becomes the name of a folder.
    fn check_prefix(&self) -> Result<(), SimulateError> {
        for id in self.ids() {
            let why = match NodeId::parse(&id) {
                // `nodes/pi-01` parses, too, but its folder would be below another one.
                Ok(parsed) if parsed.as_str() == id => continue,
                Ok(_) => "it is a name, not an id; leave nodes/ out".to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(SimulateError::Prefix { prefix: self.prefix.clone(), id, why });
        }
        Ok(())
    }

    /// Runs the Pis until `stop`.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), SimulateError> {
        self.check_prefix()?;
        let mut pis = JoinSet::new();
        let count = usize::try_from(self.count).unwrap_or(usize::MAX).max(1);
        let (refused, mut refusals) = mpsc::channel(count);
        for id in self.ids() {
            let (folder, options) = (self.directory.join(&id), self.options);
            let connection = Connection { name: id.clone(), ..self.connection.clone() };
            let (stop, refused) = (stop.clone(), refused.clone());
            pis.spawn(async move {
                let open = {
                    let id = id.clone();
                    move || VirtualPi::open(&folder, &id, options)
                };
                let opened = tokio::task::spawn_blocking(open).await.map_err(|_| SimulateError::Broken)?;
                let pi = opened.map_err(|source| SimulateError::Pi { id: id.clone(), source })?;
                let agent = {
                    let id = id.clone();
                    move |system: Arc<dyn System>,
                          stop: CancellationToken|
                          -> futures_util::future::BoxFuture<'static, ()> {
                        let (id, connection, refused) = (id.clone(), connection.clone(), refused.clone());
                        let span = tracing::info_span!("pi", node = %id);
                        let agent = async move {
                            if let Err(error) = run::run(system, connection, say_enrolled(), stop).await {
                                tracing::error!(error = %chain(&error), "agent ended");
                                if matches!(error, run::RunError::Permanent(_)) {
                                    // A full channel holds a refusal of every Pi, and that is enough.
                                    let _ = refused.try_send((id, error));
                                }
                            }
                        };
                        Box::pin(agent.instrument(span))
                    }
                };
                pi.power(agent, stop).await.map_err(|source| SimulateError::Pi { id, source })
            });
        }
        // The channel then closes with the last Pi.
        drop(refused);
        let mut outcome = Ok(());
        let mut out: BTreeSet<String> = BTreeSet::new();
        loop {
            // Cancel-safe: both only wait, and the result of one is handled below.
            let ended = tokio::select! {
                Some((id, source)) = refusals.recv() => {
                    out.insert(id.clone());
                    // Others may still get in.
                    if out.len() < count {
                        continue;
                    }
                    Err(SimulateError::Refused { id, source })
                }
                ended = pis.join_next() => match ended {
                    Some(ended) => ended.unwrap_or(Err(SimulateError::Broken)),
                    None => break,
                },
            };
            if let Err(error) = ended {
                // The others end in order first.
                tracing::error!(error = %chain(&error), "virtual Pi ended");
                stop.cancel();
                outcome = Err(error);
            }
        }
        outcome
    }
}

/// Prints a line on standard output for each node that was enrolled.
fn say_enrolled() -> OnEnrolled {
    Arc::new(|node, held| {
        let held = if held { ", held until an admin approves it" } else { "" };
        // Best effort: a reader that went away does not concern the Pi.
        let _ = writeln!(std::io::stdout().lock(), "{node} enrolled{held}");
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use marco_proto::names::NODE_ID_MAX;
    use tokio_util::sync::CancellationToken;

    use super::{SimulateError, Simulation};
    use crate::run::Connection;
    use crate::system::virtual_pi::Options;

    fn simulation(count: u32, prefix: &str) -> Simulation {
        let options = Options { boot_time: Duration::ZERO, shutdown_time: Duration::ZERO, blank: false, stock: false };
        let (directory, connection) = (PathBuf::new(), Connection::default());
        Simulation { count, directory, prefix: prefix.to_owned(), options, connection }
    }

    #[test]
    fn prefix_stays_below_its_folder() {
        // The number takes two more characters.
        let (longest, too_long) = ("x".repeat(NODE_ID_MAX - 2), "x".repeat(NODE_ID_MAX - 1));
        assert!(simulation(2, &longest).check_prefix().is_ok());
        for bad in ["../", "a/../../b", "/etc/", "nodes/pi-", "pi 1", ".", "-", "p\u{ef}-", &too_long] {
            let error = simulation(2, bad).check_prefix().unwrap_err();
            assert!(error.to_string().contains("--prefix"), "{bad}: {error}");
        }
        for good in ["", "pi-", "lab.a_1-"] {
            assert!(simulation(200, good).check_prefix().is_ok(), "{good}");
        }
    }

    #[tokio::test]
    async fn bad_prefix_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let bad = Simulation { directory: dir.path().join("pis"), ..simulation(2, "../pi-") };
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(matches!(bad.run(stop).await, Err(SimulateError::Prefix { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn ids_are_numbered_in_one_width() {
        let ids = |count| simulation(count, "pi-").ids();
        assert_eq!(ids(2), ["pi-01", "pi-02"]);
        assert_eq!(ids(200).first().unwrap(), "pi-001");
        assert_eq!(ids(200).last().unwrap(), "pi-200");
    }
}
