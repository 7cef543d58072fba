//! Plays a recorded agent against the controller, byte by byte. Only the execution's name and the image's digest are
//! those of the test: each is as long as the recorded one.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use integration_tests::client::Credentials;
use integration_tests::fleet::Database;
use integration_tests::postgres::Postgres;
use integration_tests::{Fleet, raw, seconds, wait_until};
use marco_proto::v1::connect_response::Message as Answer;
use marco_proto::v1::{Assign, ConnectResponse, Report, execution, operation};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::recorder;
use super::recording::{self, SCENES, Session, report};

/// Numbers of the messages that an agent of protocol 1 knows: Welcome, Assign, Cancel, Ack, Goodbye, Query. Any other
/// one ends its session.
const KNOWN_TO_1: [u32; 6] = [1, 2, 3, 4, 5, 45];

/// A node's session, played from its recording.
struct Player {
    /// `None`: the agent has ended its half of the stream.
    says: Option<mpsc::Sender<Bytes>>,
    hears: Streaming<Bytes>,
    assign: Option<Assign>,
    /// Acknowledged executions and sequences.
    acked: BTreeSet<(String, u64)>,
}

/// The number of an answer's only field.
fn number(answer: &[u8]) -> Result<u32> {
    Ok(prost::encoding::decode_key(&mut &*answer)?.0)
}

impl Player {
    /// Opens a session with its recorded Hello, and waits for the Welcome.
    async fn open(fleet: &Fleet, node: &Credentials, hello: Bytes) -> Result<Self> {
        let (says, said) = mpsc::channel(16);
        says.send(hello).await?;
        let path = "/marco.bootstrap.v1.AgentService/Connect";
        let hears = raw::open(&node.channel(fleet.addresses().api)?, path, ReceiverStream::new(said)).await?;
        let mut player = Self { says: Some(says), hears, assign: None, acked: BTreeSet::new() };
        let first = player.hear().await?;
        ensure!(matches!(first, Answer::Welcome(_)), "no Welcome but {first:?}");
        Ok(player)
    }

    async fn say(&self, message: Bytes) -> Result<()> {
        Ok(self.says.as_ref().context("the agent has ended")?.send(message).await?)
    }

    /// Ends the agent's half of the stream, as its end does, and lets the controller end its own.
    async fn end(&mut self) {
        self.says = None;
        while let Ok(Some(_)) = self.hears.message().await {}
    }

    /// The controller's next message.
    async fn hear(&mut self) -> Result<Answer> {
        let next = tokio::time::timeout(seconds(30), self.hears.message()).await.context("no answer")?;
        let bytes = next?.context("the stream ended")?;
        let known = number(&bytes)?;
        ensure!(KNOWN_TO_1.contains(&known), "message {known} is not of protocol 1");
        let answer = ConnectResponse::decode(bytes)?.message.context("an empty message")?;
        match &answer {
            Answer::Assign(assign) => self.assign = Some(assign.clone()),
            Answer::Ack(ack) => drop(self.acked.insert((ack.execution.clone(), ack.sequence))),
            _ => {}
        }
        Ok(answer)
    }

    async fn assigned(&mut self) -> Result<Assign> {
        while self.assign.is_none() {
            self.hear().await?;
        }
        self.assign.clone().context("no assignment")
    }

    /// Waits for the acknowledgement of a report. That of VERIFYING is the verdict.
    async fn acknowledged(&mut self, report: &Report) -> Result<()> {
        while !self.acked.iter().any(|(name, up_to)| *name == report.execution && *up_to >= report.sequence) {
            let what = || format!("{} of sequence {}", report.state().as_str_name(), report.sequence);
            self.hear().await.with_context(what)?;
        }
        Ok(())
    }
}

/// Puts the test's own texts for the recorded ones.
struct Names(Vec<(String, String)>);

impl Names {
    fn of(sessions: &[Session], assign: &Assign, digest: &str) -> Result<Self> {
        let mut names = Vec::new();
        for message in sessions.iter().flatten() {
            let Some(report) = report(message)? else { continue };
            names.push((report.execution, assign.execution.clone()));
            if let Some(release) = report.release {
                names.push((release.image_sha256, digest.to_owned()));
            }
        }
        names.retain(|(recorded, _)| !recorded.is_empty());
        names.sort();
        names.dedup();
        let fits = names.iter().all(|(recorded, own)| recorded.len() == own.len());
        ensure!(fits, "another length would make another message: {names:?}");
        Ok(Self(names))
    }

    fn put(&self, message: &Bytes) -> Bytes {
        let mut bytes = message.to_vec();
        for (recorded, own) in &self.0 {
            let mut at = 0;
            while let Some(found) = bytes.get(at..).and_then(|rest| find(rest, recorded.as_bytes())) {
                bytes.splice(at + found..at + found + recorded.len(), own.bytes());
                at += found + own.len();
            }
        }
        bytes.into()
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

/// Plays a scene, and returns the states that were reported in it, each once.
async fn play(database: Database, version: u32, scene: &str) -> Result<Vec<execution::State>> {
    let mut fleet = Fleet::builder().database(database).pis(0).start().await?;
    let node = fleet.enrol_by_hand("pi-01", false).await?;
    let sessions = recording::read(version, scene)?;
    let hello = |session: &Session| session.first().cloned().context("an empty session");
    let mut player = Player::open(&fleet, &node, hello(sessions.first().context("no session")?)?).await?;
    let (asked, digest) = recorder::operation(&fleet, scene).await?;
    let created = fleet.create(asked).await?;
    let assign = player.assigned().await?;
    let names = Names::of(&sessions, &assign, &digest)?;
    let mut states = Vec::new();
    for (number, session) in sessions.iter().enumerate() {
        if number > 0 {
            player = Player::open(&fleet, &node, names.put(&hello(session)?)).await?;
        }
        for message in session.iter().skip(1) {
            let message = names.put(message);
            player.say(message.clone()).await?;
            let Some(report) = report(&message)? else { continue };
            ensure!(report.attempt == assign.attempt, "the recording is of another delivery");
            // An agent goes on only when it knows that the controller knows.
            player.acknowledged(&report).await.with_context(|| format!("session {}", number + 1))?;
            states.push(report.state());
        }
        player.end().await;
        wait_until(seconds(30), "the session is over", async || {
            Ok((!fleet.node("pi-01").await?.connected).then_some(()))
        })
        .await?;
    }
    fleet.ends(&created.name, seconds(30), operation::State::Succeeded).await?;
    fleet.went_well();
    states.dedup();
    Ok(states)
}

async fn every_scene(database: impl AsyncFn() -> Result<Database>) -> Result<()> {
    use execution::State::{Rebooting, Running, Succeeded, Verifying};
    for scene in SCENES {
        let states = play(database().await?, 1, scene).await.context(scene)?;
        let wanted: &[execution::State] = match scene {
            "update" => &[Running, Rebooting, Running, Rebooting, Verifying, Succeeded],
            "reboot" | "power-off" => &[Running, Rebooting, Succeeded],
            other => bail!("no scene {other}"),
        };
        assert_eq!(states, wanted, "{scene}");
    }
    Ok(())
}

#[tokio::test]
async fn agent_of_protocol_1_is_served_on_sqlite() -> Result<()> {
    every_scene(async || Ok(Database::Sqlite)).await
}

#[tokio::test]
async fn agent_of_protocol_1_is_served_on_postgres() -> Result<()> {
    let postgres = tokio::task::spawn_blocking(Postgres::start).await??;
    every_scene(async || Ok(Database::Url(postgres.database()?))).await
}
