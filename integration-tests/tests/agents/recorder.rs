//! Records the agent of this build: `make record-agent`.
//!
//! A tap stands between a virtual Pi and a real controller. It ends the agent's TLS with a certificate of the
//! controller's CA, speaks to the controller with the node's own key, and keeps the messages of the node.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use integration_tests::client::Credentials;
use integration_tests::fleet::{Pi, poweroff, reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::names::{CONTROLLER_TLS_NAME, PROTOCOL_VERSION};
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::artifact_service_server::{ArtifactService, ArtifactServiceServer};
use marco_proto::v1::connect_response::Message as Answer;
use marco_proto::v1::{
    Artifact, ConnectRequest, ConnectResponse, DeleteArtifactRequest, DeleteArtifactResponse, DownloadArtifactRequest,
    DownloadArtifactResponse, GetArtifactRequest, ListArtifactsRequest, ListArtifactsResponse, OpenArtifactRequest,
    Operation, SetDefaultArtifactRequest, UploadArtifactRequest, UploadArtifactResponse, connect_request, operation,
};
use prost::Message as _;
use rcgen::{CertificateParams, Issuer, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Channel, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::recording::{self, SCENES, Session, folder};

/// Files of the card that are kept with a report.
const CARD: [(&str, &str); 4] = [
    ("root/var/lib/marco-agent/journal.json", "journal.json"),
    ("root/etc/marco-release", "marco-release"),
    ("recovery/marco/journal.json", "installer-journal.json"),
    ("recovery/marco/install.json", "install.json"),
];

#[derive(Default)]
struct Kept {
    sessions: Vec<Session>,
    /// Files of the card by path in the recording: `SESSION-STATE-SEQUENCE/FILE`, of the first such report.
    card: BTreeMap<String, Vec<u8>>,
}

/// The tap's services.
#[derive(Clone)]
struct Tap {
    /// The Pi's folder.
    pi: PathBuf,
    controller: SocketAddr,
    kept: Arc<Mutex<Kept>>,
}

fn internal(error: anyhow::Error) -> Status {
    Status::internal(format!("{error:#}"))
}

impl Tap {
    /// A channel to the controller with the node's key.
    fn as_node(&self) -> Result<Channel> {
        let read = |name: &str| fs::read_to_string(self.pi.join("agent").join(name)).with_context(|| name.to_owned());
        let identity = Some((read("node.crt")?, read("node.key")?));
        Credentials { ca: read("ca.crt")?, identity }.channel(self.controller)
    }

    fn keep(&self, session: usize, message: &ConnectRequest) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connect_request::Message::Report(report)) = &message.message {
            let state = report.state().as_str_name().trim_start_matches("STATE_");
            let place = format!("{}-{state}-{}", session + 1, report.sequence);
            // The agent has journalled the state before it reports it.
            for (file, name) in CARD {
                if let Ok(bytes) = fs::read(self.pi.join(file)) {
                    kept.card.entry(format!("{place}/{name}")).or_insert(bytes);
                }
            }
        }
        if let Some(kept) = kept.sessions.get_mut(session) {
            kept.push(Bytes::from(message.encode_to_vec()));
        }
    }

    async fn start(fleet: &Fleet, pi: PathBuf) -> Result<(Self, SocketAddr, AbortOnDropHandle<()>)> {
        let ca = fs::read_to_string(fleet.certs().join("ca.crt"))?;
        let key = KeyPair::from_pem(&fs::read_to_string(fleet.data().join("pki/ca.key"))?)?;
        let (issuer, own) = (Issuer::from_ca_cert_pem(&ca, key)?, KeyPair::generate()?);
        let mut params = CertificateParams::new([CONTROLLER_TLS_NAME.to_owned()])?;
        params.insert_extended_key_usage(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
        let identity = Identity::from_pem(params.signed_by(&own, &issuer)?.pem() + &ca, own.serialize_pem());
        let tap = Self { pi, controller: fleet.addresses().api, kept: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serve = Server::builder()
            .tls_config(ServerTlsConfig::new().identity(identity))?
            .add_service(AgentServiceServer::new(tap.clone()))
            .add_service(ArtifactServiceServer::new(tap.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { drop(serve.await) });
        Ok((tap, address, AbortOnDropHandle::new(server)))
    }
}

#[tonic::async_trait]
impl AgentService for Tap {
    type ConnectStream = ReceiverStream<Result<ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let session = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.sessions.push(Session::new());
            kept.sessions.len() - 1
        };
        let (mut heard, tap) = (request.into_inner(), self.clone());
        let (says, said) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(message)) = heard.message().await {
                tap.keep(session, &message);
                if says.send(message).await.is_err() {
                    return;
                }
            }
        });
        let mut client = AgentServiceClient::new(self.as_node().map_err(internal)?);
        let mut answers = client.connect(ReceiverStream::new(said)).await?.into_inner();
        let (out, stream) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Some(mut answer) = answers.message().await.transpose() {
                // The node must not learn the controller's own address, where no tap is.
                if let Ok(ConnectResponse { message: Some(Answer::Welcome(welcome)) }) = &mut answer {
                    welcome.controllers.clear();
                }
                let is_over = answer.is_err();
                if out.send(answer).await.is_err() || is_over {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

#[tonic::async_trait]
impl ArtifactService for Tap {
    type UploadArtifactStream = Streaming<UploadArtifactResponse>;
    type DownloadArtifactStream = Streaming<DownloadArtifactResponse>;

    async fn download_artifact(
        &self,
        request: Request<DownloadArtifactRequest>,
    ) -> Result<Response<Self::DownloadArtifactStream>, Status> {
        let channel = self.as_node().map_err(internal)?;
        let client = ArtifactServiceClient::new(channel).max_decoding_message_size(usize::MAX);
        client.clone().download_artifact(request.into_inner()).await
    }
    async fn get_artifact(&self, request: Request<GetArtifactRequest>) -> Result<Response<Artifact>, Status> {
        ArtifactServiceClient::new(self.as_node().map_err(internal)?).get_artifact(request.into_inner()).await
    }
    async fn upload_artifact(
        &self,
        _: Request<Streaming<UploadArtifactRequest>>,
    ) -> Result<Response<Self::UploadArtifactStream>, Status> {
        Err(Status::unimplemented("agents do not call it"))
    }
    async fn list_artifacts(
        &self,
        _: Request<ListArtifactsRequest>,
    ) -> Result<Response<ListArtifactsResponse>, Status> {
        Err(Status::unimplemented("agents do not call it"))
    }
    async fn delete_artifact(
        &self,
        _: Request<DeleteArtifactRequest>,
    ) -> Result<Response<DeleteArtifactResponse>, Status> {
        Err(Status::unimplemented("agents do not call it"))
    }
    async fn open_artifact(&self, _: Request<OpenArtifactRequest>) -> Result<Response<Artifact>, Status> {
        Err(Status::unimplemented("agents do not call it"))
    }
    async fn set_default_artifact(&self, _: Request<SetDefaultArtifactRequest>) -> Result<Response<Artifact>, Status> {
        Err(Status::unimplemented("agents do not call it"))
    }
}

/// The operation of a scene. An update's image is pushed first.
pub(crate) async fn operation(fleet: &Fleet, scene: &str) -> Result<(Operation, String)> {
    Ok(match scene {
        "update" => {
            let file = make_image(fleet.dir(), "recorded", Compression::Gzip)?;
            let image = push(&mut fleet.artifacts(), "recorded", Kind::Image, Purpose::Unspecified, &file).await?;
            (update(&["pi-01"], &image.name, ""), image.sha256)
        }
        "reboot" => (reboot(&["pi-01"], seconds(0)), String::new()),
        _ => (poweroff(&["pi-01"]), String::new()),
    })
}

/// True if the controller has acknowledged everything in the journal.
fn is_settled(pi: &Pi) -> Result<bool> {
    let journal: serde_json::Value = serde_json::from_str(&pi.read("root/var/lib/marco-agent/journal.json")?)?;
    let entries = journal.get("entries").and_then(|entries| entries.as_array()).context("no entries")?;
    Ok(entries.iter().all(|entry| entry.get("acked") == entry.get("sequence")))
}

#[tokio::test]
#[ignore = "writes the recording of the present agent: `make record-agent`"]
async fn record() -> Result<()> {
    let card = folder(PROTOCOL_VERSION).join("card");
    for scene in SCENES {
        let mut fleet = Fleet::builder().pis(0).start().await?;
        let pi = fleet.pi("pi-01");
        let (tap, address, _server) = Tap::start(&fleet, pi.dir().to_owned()).await?;
        fleet.proxy().retarget(address);
        let token = fleet.dir().join("token");
        fs::write(&token, fleet.token(1).await?)?;
        fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        fleet.start_new_agents(&["--token-file".to_owned(), token.display().to_string()])?;
        wait_until(seconds(60), "the Pi is connected", async || {
            Ok(fleet.list_nodes().await?.iter().any(|node| node.connected).then_some(()))
        })
        .await?;
        let (asked, _) = operation(&fleet, scene).await?;
        let created = fleet.create(asked).await?;
        if scene == "power-off" {
            wait_until(seconds(60), "the Pi is off", async || {
                Ok(pi.log()?.iter().any(|line| line.event == "power-off").then_some(()))
            })
            .await?;
            wait_until(seconds(60), "its session is over", async || {
                Ok((!fleet.node("pi-01").await?.connected).then_some(()))
            })
            .await?;
            pi.power_on()?;
        }
        fleet.ends(&created.name, seconds(180), operation::State::Succeeded).await?;
        // A Hello may end the operation, and the agent says more after it.
        wait_until(seconds(30), "the agent knows that all is known", async || Ok(is_settled(&pi)?.then_some(())))
            .await?;
        fleet.kill_agents().await?;
        let kept = std::mem::take(&mut *tap.kept.lock().unwrap_or_else(PoisonError::into_inner));
        recording::write(PROTOCOL_VERSION, scene, &kept.sessions)?;
        if scene == "update" {
            for (path, bytes) in &kept.card {
                let path = card.join(path);
                fs::create_dir_all(path.parent().context("no folder")?)?;
                fs::write(path, bytes)?;
            }
        }
        fleet.went_well();
    }
    Ok(())
}
