//! `marco-agent simulate`: virtual Pis in one process, through the same code as the real agent. For trying things out
//! without hardware, and for load tests.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::cause::chain;
use crate::run::{self, Connection, OnEnrolled};
use crate::system::virtual_pi::{Options, VirtualPi};
use crate::system::{System, SystemError};

/// What to simulate.
#[derive(Debug, Clone)]
pub struct Simulation {
    /// How many Pis.
    pub count: u32,
    /// The folder that holds a folder for each.
    pub directory: PathBuf,
    /// What their ids begin with; a number follows.
    pub prefix: String,
    /// How fast they are.
    pub options: Options,
    /// How they find the controller.
    pub connection: Connection,
}

/// The simulation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// A Pi could not be made or driven.
    #[error("virtual Pi {id}")]
    Pi {
        /// Which one.
        id: String,
        /// Why.
        source: SystemError,
    },
    /// A Pi's task ended badly.
    #[error("a virtual Pi stopped working")]
    Broken,
}

impl Simulation {
    /// The Pis' ids: numbered from 1, all of one width.
    pub fn ids(&self) -> Vec<String> {
        let width = self.count.to_string().len().max(2);
        (1..=self.count).map(|number| format!("{}{number:0width$}", self.prefix)).collect()
    }

    /// Runs the Pis until `stop`.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), SimulateError> {
        let mut pis = JoinSet::new();
        for id in self.ids() {
            let (folder, options) = (self.directory.join(&id), self.options);
            let connection = Connection { name: id.clone(), ..self.connection.clone() };
            let stop = stop.clone();
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
                        let (id, connection) = (id.clone(), connection.clone());
                        let span = tracing::info_span!("pi", node = %id);
                        let agent = async move {
                            if let Err(error) = run::run(system, connection, say_enrolled(), stop).await {
                                tracing::error!(error = %chain(&error), "agent ended");
                            }
                        };
                        Box::pin(agent.instrument(span))
                    }
                };
                pi.power(agent, stop).await.map_err(|source| SimulateError::Pi { id, source })
            });
        }
        let mut outcome = Ok(());
        while let Some(ended) = pis.join_next().await {
            let ended = ended.unwrap_or(Err(SimulateError::Broken));
            if let Err(error) = ended {
                // The others go on to their end first.
                tracing::error!(error = %chain(&error), "virtual Pi ended");
                stop.cancel();
                outcome = Err(error);
            }
        }
        outcome
    }
}

/// One line on standard output for each node.
fn say_enrolled() -> OnEnrolled {
    Arc::new(|node, held| {
        let held = if held { ", held until an admin approves it" } else { "" };
        // Nobody may be reading any more; that does not concern the Pi.
        let _ = writeln!(std::io::stdout().lock(), "{node} enrolled{held}");
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::Simulation;
    use crate::run::Connection;
    use crate::system::virtual_pi::Options;

    #[test]
    fn ids_are_numbered_in_one_width() {
        let ids = |count| {
            let options =
                Options { boot_time: Duration::ZERO, shutdown_time: Duration::ZERO, blank: false, stock: false };
            let (directory, connection) = (PathBuf::new(), Connection::default());
            Simulation { count, directory, prefix: "pi-".to_owned(), options, connection }.ids()
        };
        assert_eq!(ids(2), ["pi-01", "pi-02"]);
        assert_eq!(ids(200).first().unwrap(), "pi-001");
        assert_eq!(ids(200).last().unwrap(), "pi-200");
    }
}
