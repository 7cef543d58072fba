//! The way to a controller: from the operator, from the card, and from the last success.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Connection, RunError};
use crate::bootpart::BootPart;
use crate::cause::chain;
use crate::discovery::{Address, Discovery, InvalidAddress, Search};
use crate::durable;
use crate::identity::{JoinFile, JoinToken};
use crate::system::{self, System};

/// An agent's way to a controller, from every source.
pub(super) struct Way {
    /// Named controllers, or a search for some.
    pub(super) discovery: Discovery,
    /// Known enrolment listeners, host:port.
    pub(super) enroll: Vec<String>,
    /// The join token; `None`: an enrolled node needs none.
    pub(super) token: Option<JoinToken>,
    /// The id to ask for; empty: the controller makes one.
    pub(super) name: String,
    /// Path of the join file, from which the token is removed after the enrolment; `None`: there is no file.
    pub(super) join_file: Option<PathBuf>,
}

impl Way {
    pub(super) fn find(system: &dyn System, board: &system::Board, connection: &Connection) -> Result<Self, RunError> {
        let card = system.card();
        let partitions: Vec<PathBuf> = match &card {
            Some(card) => vec![card.recovery.clone(), card.boot.clone()],
            None => ["boot/firmware", "boot"].iter().map(|folder| system.root().join(folder)).collect(),
        };
        let last_good = LastGood::read(system);
        let found = match JoinFile::find(&partitions) {
            Ok(found) => found,
            // A torn join file must not cut off a node that was in before.
            Err(error) if last_good.is_some() => {
                tracing::warn!(error = %chain(&error), "join file not usable");
                None
            }
            Err(error) => return Err(error.into()),
        };
        let (join_file, join) = found.map_or((None, JoinFile::default()), |(path, file)| (Some(path), file));

        let mut controllers = connection.controllers.clone();
        let mut enroll = connection.enroll.clone();
        if controllers.is_empty() {
            controllers = parse(&join.controllers)?;
        }
        if enroll.is_empty() {
            enroll = parse(&join.enroll)?;
        }
        if connection.controllers.is_empty()
            && system.mode() == system::Mode::Installer
            && let Some(card) = &card
            && let Ok(Some(job)) = BootPart::new(&card.recovery, board).read_job()
        {
            // The join file says where the controllers were when the card was made, and the job where they are now.
            let known = parse(&job.controllers)?;
            controllers.retain(|old| !known.contains(old));
            controllers.splice(0..0, known);
            if !job.enroll.is_empty() {
                let listener = parse(std::slice::from_ref(&job.enroll))?;
                enroll.retain(|old| !listener.contains(old));
                enroll.splice(0..0, listener);
            }
        }
        // Last resort: the operator, the join file and the job know more recent addresses.
        if let Some(last_good) = last_good.filter(|_| controllers.is_empty()) {
            controllers = parse(&last_good.controllers)?;
            enroll = parse(&last_good.enroll)?;
        }
        let discovery = match &connection.search {
            // Only without controllers that an operator named: those are final.
            Some(asking) if connection.controllers.is_empty() => {
                let (fallback, searcher) = (asking.fallback.clone(), Arc::clone(&asking.searcher));
                Discovery::Search(Search::new(controllers.clone(), fallback, searcher))
            }
            _ if controllers.is_empty() => return Err(RunError::NoController),
            _ => Discovery::Fixed(controllers.clone()),
        };
        let listeners = if enroll.is_empty() {
            controllers.iter().map(Address::enroll_beside).collect()
        } else {
            enroll.iter().map(Address::enroll).collect()
        };
        let token = match &connection.token {
            Some(token) => Some(token.clone()),
            None if join.token.is_empty() => None,
            None => Some(JoinToken::parse(&join.token)?),
        };
        // A join file on this very card says more than an option that many nodes may share.
        let name = if join.name.is_empty() { connection.name.clone() } else { join.name };
        Ok(Self { discovery, enroll: listeners, token, name, join_file })
    }
}

/// The last way of an enrolled node, in a file beside its identity, for a time without any named controller.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LastGood {
    pub(super) controllers: Vec<String>,
    pub(super) enroll: Vec<String>,
}

impl LastGood {
    const FILE: &str = "controllers.json";

    fn read(system: &dyn System) -> Option<Self> {
        let contents = durable::read(&system.identity_dir().join(Self::FILE)).ok()?;
        serde_json::from_slice(&contents).ok()
    }

    pub(super) fn remember(self, system: &dyn System) {
        // Spares the card a write at each start.
        if Self::read(system).is_some_and(|before| before == self) {
            return;
        }
        let path = system.identity_dir().join(Self::FILE);
        let written = serde_json::to_vec(&self)
            .map_err(std::io::Error::from)
            .and_then(|contents| durable::replace(&path, &contents, 0o644));
        if let Err(error) = written {
            tracing::warn!(error = %error, "controllers not remembered");
        }
    }
}

fn parse(texts: &[String]) -> Result<Vec<Address>, InvalidAddress> {
    texts.iter().map(|text| text.parse()).collect()
}

#[cfg(test)]
mod tests {
    use super::{Connection, Way};
    use crate::bootpart::{InstallJob, Instruction, JOB_VERSION, Prefix};
    use crate::system::virtual_pi::tests::Powered;
    use crate::system::{Reboot, System as _};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn installer_begins_with_the_controllers_of_its_job() {
        let dir = tempfile::tempdir().unwrap();
        let mut powered = Powered::new(dir.path());
        powered.boot().await;
        let join = "controllers = [\"moved-away:1\", \"still-there\"]\n";
        std::fs::write(dir.path().join("recovery/marco/join.toml"), join).unwrap();
        powered.pi.reboot(Reboot::TryBoot, None, "").await.unwrap();
        let installer = powered.boot().await;
        let job = InstallJob {
            version: JOB_VERSION,
            instruction: Instruction::BootOnly { sha256: "0".repeat(64) },
            execution: String::new(),
            attempt: 1,
            sequence: 1,
            boot_id: String::new(),
            controllers: vec!["taught:1".into(), "still-there".into()],
            enroll: "taught:2".into(),
            node: "pi-01".into(),
            discard_home: false,
            trials: 0,
            prefix: Prefix::B0,
            disk: None,
        };
        powered.bootpart().write_job(&job).unwrap();
        let board = installer.facts().unwrap().board;
        let way = Way::find(installer.as_ref(), &board, &Connection::default()).unwrap();
        assert_eq!(way.discovery.known(), ["taught:1", "still-there:1346", "moved-away:1"]);
        assert_eq!(way.enroll, ["taught:2"]);
        powered.kill().await;
    }
}
