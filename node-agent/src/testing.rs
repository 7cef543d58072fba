//! A controller for tests, with real TLS and gRPC. The test gives its answers.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use marco_proto::v1::artifact_service_server::{ArtifactService, ArtifactServiceServer};
use marco_proto::v1::enrollment_service_server::{EnrollmentService, EnrollmentServiceServer};
use marco_proto::v1::verdict::Decision;
use marco_proto::v1::{
    Ack, ConnectRequest, ConnectResponse, EnrollRequest, EnrollResponse, RenewCertificateRequest,
    RenewCertificateResponse, Report, Welcome, connect_response,
};
use marco_proto::v1::{
    Artifact, Chunk, DeleteArtifactRequest, DeleteArtifactResponse, DownloadArtifactRequest, DownloadArtifactResponse,
    DownloadHeader, GetArtifactRequest, ListArtifactsRequest, ListArtifactsResponse, OpenArtifactRequest,
    SetDefaultArtifactRequest, UploadArtifactRequest, UploadArtifactResponse, download_artifact_response,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use crate::system::{Lease, Target};

/// The test's answer to an enrolment: `Ok` issues the certificate, an error refuses.
type Verdict = Box<dyn FnMut(&EnrollRequest) -> Result<(), Status> + Send>;
type Answers = mpsc::Sender<Result<ConnectResponse, Status>>;

/// The controller's end of a session.
pub(crate) struct TestSession {
    pub(crate) requests: Streaming<ConnectRequest>,
    pub(crate) answers: Answers,
}

impl TestSession {
    pub(crate) async fn next(&mut self) -> Option<ConnectRequest> {
        let message = tokio::time::timeout(Duration::from_secs(10), self.requests.message());
        message.await.expect("no message came").unwrap_or(None)
    }

    pub(crate) async fn say(&self, message: connect_response::Message) {
        self.answers.send(Ok(ConnectResponse { message: Some(message) })).await.unwrap();
    }

    pub(crate) async fn welcome(&self) {
        // Far from the time of the test machine, so that a test sees which one counts.
        let time = prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 };
        // The shortest that an agent takes.
        let progress_interval = prost_types::Duration { seconds: 0, nanos: 50_000_000 };
        let session = "test".to_owned();
        let (time, progress_interval) = (Some(time), Some(progress_interval));
        let protocol_version = PROTOCOL_VERSION;
        let welcome = Welcome { session, time, progress_interval, protocol_version, ..Welcome::default() };
        self.say(connect_response::Message::Welcome(welcome)).await;
    }
}

/// A CA and a certificate for the controller under it.
pub(crate) struct Pki {
    ca: Arc<CertifiedIssuer<'static, KeyPair>>,
    pub(crate) valid: (DateTime<Utc>, DateTime<Utc>),
}

impl Pki {
    pub(crate) fn new(from: &str, to: &str) -> Self {
        let valid = (from.parse().unwrap(), to.parse().unwrap());
        let mut params = params(valid);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { ca: Arc::new(ca), valid }
    }

    /// The same CA, which certifies for another time.
    pub(crate) fn at(&self, from: &str, to: &str) -> Self {
        Self { ca: Arc::clone(&self.ca), valid: (from.parse().unwrap(), to.parse().unwrap()) }
    }

    pub(crate) fn pem(&self) -> String {
        self.ca.pem()
    }

    /// A token as this controller would make it.
    pub(crate) fn token(&self) -> String {
        let pin = super::identity::pin_of(self.ca.der());
        format!("mj1.one.{}.{}", URL_SAFE_NO_PAD.encode([7; 32]), URL_SAFE_NO_PAD.encode(pin))
    }

    fn controller(&self, name: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = params(self.valid);
        params.subject_alt_names = vec![rcgen::SanType::DnsName(name.try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &*self.ca).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    pub(crate) fn issue(&self, request_pem: &str, node: &str) -> String {
        let request = CertificateSigningRequestParams::from_pem(request_pem).unwrap();
        let mut params = params(self.valid);
        params.distinguished_name.push(DnType::CommonName, node);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.signed_by(&request.public_key, &*self.ca).unwrap().pem()
    }
}

fn params((from, to): (DateTime<Utc>, DateTime<Utc>)) -> CertificateParams {
    let mut params = CertificateParams::default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(from.timestamp().try_into().unwrap());
    params.not_after = epoch + Duration::from_secs(to.timestamp().try_into().unwrap());
    params
}

/// Acknowledges a report as a controller of protocol 2 does.
pub(crate) fn acknowledgement(report: &Report) -> connect_response::Message {
    connect_response::Message::Ack(Ack {
        execution: report.execution.clone(),
        sequence: report.sequence,
        attempt: report.attempt,
        state: report.state,
        boot_id: report.boot_id.clone(),
        release: report.release.clone(),
    })
}

/// Accepts the new system that a report of VERIFYING is about.
pub(crate) fn acceptance(report: &Report) -> marco_proto::v1::Verdict {
    marco_proto::v1::Verdict {
        execution: report.execution.clone(),
        attempt: report.attempt,
        boot_id: report.boot_id.clone(),
        release: report.release.clone(),
        decision: Decision::Accepted.into(),
        error: None,
    }
}

struct Shared {
    pki: Arc<Pki>,
    verdict: Mutex<Verdict>,
    enrolled: Mutex<Vec<EnrollRequest>>,
    renewed: Mutex<Vec<RenewCertificateRequest>>,
    sessions: mpsc::Sender<TestSession>,
    /// By digest.
    artifacts: Mutex<HashMap<String, bytes::Bytes>>,
}

/// A controller that runs until it is dropped.
pub(crate) struct Controller {
    pub(crate) address: String,
    pub(crate) pki: Arc<Pki>,
    shared: Arc<Shared>,
    sessions: mpsc::Receiver<TestSession>,
    _server: AbortOnDropHandle<()>,
}

impl Controller {
    pub(crate) async fn start(pki: Pki) -> Self {
        Self::start_as(Arc::new(pki), "controller.marco.internal").await
    }

    pub(crate) async fn start_as(pki: Arc<Pki>, name: &str) -> Self {
        let (sessions, received) = mpsc::channel(4);
        let shared = Arc::new(Shared {
            pki: pki.clone(),
            verdict: Mutex::new(Box::new(|_| Ok(()))),
            enrolled: Mutex::default(),
            renewed: Mutex::default(),
            sessions,
            artifacts: Mutex::default(),
        });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(pki.ca.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            // Enrolments come without a certificate, and here to the same listener.
            .allow_unauthenticated()
            .build()
            .unwrap();
        let (leaf, key) = pki.controller(name);
        // The certificates need not be valid at the time of the test machine.
        let micros = pki.valid.0.timestamp_micros() + 1_000_000;
        let time = Arc::new(super::identity::TlsTime::starting_at(micros));
        let mut config = rustls::ServerConfig::builder_with_details(provider, time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![leaf, pki.ca.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (accepted, incoming) = mpsc::channel(8);
        let services = Services(shared.clone());
        let server = tokio::spawn(async move {
            let accept = async {
                while let Ok((tcp, _)) = listener.accept().await {
                    if let Ok(tls) = acceptor.accept(tcp).await {
                        let _ = accepted.send(Ok::<_, std::io::Error>(Conn(tls))).await;
                    }
                }
            };
            let serve = tonic::transport::Server::builder()
                .add_service(AgentServiceServer::new(services.clone()))
                .add_service(ArtifactServiceServer::new(services.clone()))
                .add_service(EnrollmentServiceServer::new(services))
                .serve_with_incoming(ReceiverStream::new(incoming));
            let _ = tokio::join!(accept, serve);
        });
        Self { address, pki, shared, sessions: received, _server: AbortOnDropHandle::new(server) }
    }

    pub(crate) fn judge(&self, verdict: impl FnMut(&EnrollRequest) -> Result<(), Status> + Send + 'static) {
        *self.shared.verdict.lock().unwrap() = Box::new(verdict);
    }

    /// Stores an artifact. Returns its digest.
    pub(crate) fn store(&self, contents: Vec<u8>) -> String {
        let sha256 = hex::encode(Sha256::digest(&contents));
        self.shared.artifacts.lock().unwrap().insert(sha256.clone(), contents.into());
        sha256
    }

    pub(crate) fn enrolled(&self) -> Vec<EnrollRequest> {
        self.shared.enrolled.lock().unwrap().clone()
    }

    pub(crate) fn renewed(&self) -> Vec<RenewCertificateRequest> {
        self.shared.renewed.lock().unwrap().clone()
    }

    /// Waits for the next session that an agent opens.
    pub(crate) async fn session(&mut self) -> TestSession {
        let opened = tokio::time::timeout(Duration::from_secs(10), self.sessions.recv());
        opened.await.expect("no session was opened").unwrap()
    }
}

#[derive(Clone)]
struct Services(Arc<Shared>);

#[tonic::async_trait]
impl EnrollmentService for Services {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        self.0.enrolled.lock().unwrap().push(request.clone());
        (self.0.verdict.lock().unwrap())(&request)?;
        Ok(Response::new(EnrollResponse {
            node: format!("nodes/{}", request.node_id),
            certificate: self.0.pki.issue(&request.certificate_request, &request.node_id),
            ca_certificate: self.0.pki.pem(),
            held: false,
        }))
    }

    async fn renew_certificate(
        &self,
        request: Request<RenewCertificateRequest>,
    ) -> Result<Response<RenewCertificateResponse>, Status> {
        let request = request.into_inner();
        self.0.renewed.lock().unwrap().push(request.clone());
        let certificate = self.0.pki.issue(&request.certificate_request, "pi-01");
        Ok(Response::new(RenewCertificateResponse { certificate, ca_certificate: self.0.pki.pem() }))
    }
}

#[tonic::async_trait]
impl AgentService for Services {
    type ConnectStream = ReceiverStream<Result<ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (answers, stream) = mpsc::channel(8);
        let session = TestSession { requests: request.into_inner(), answers };
        self.0.sessions.send(session).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

type Stream<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

impl Services {
    /// Returns digest and bytes of an artifact by its name.
    fn stored(&self, name: &str) -> Result<(String, bytes::Bytes), Status> {
        let sha256 = name.strip_prefix("artifacts/sha256:").unwrap_or(name).to_owned();
        let stored = self.0.artifacts.lock().unwrap().get(&sha256).cloned();
        Ok((sha256, stored.ok_or_else(|| Status::not_found("no such artifact"))?))
    }
}

#[tonic::async_trait]
impl ArtifactService for Services {
    type UploadArtifactStream = Stream<UploadArtifactResponse>;
    type DownloadArtifactStream = Stream<DownloadArtifactResponse>;

    async fn download_artifact(
        &self,
        request: Request<DownloadArtifactRequest>,
    ) -> Result<Response<Self::DownloadArtifactStream>, Status> {
        use download_artifact_response::Part;
        const CHUNK: usize = 64 * 1024;
        let DownloadArtifactRequest { name, offset } = request.into_inner();
        let (sha256, contents) = self.stored(&name)?;
        let header = DownloadHeader {
            size_bytes: contents.len().try_into().unwrap(),
            sha256,
            chunk_size: CHUNK.try_into().unwrap(),
            chunk_sha256: contents.chunks(CHUNK).flat_map(Sha256::digest).collect::<Vec<u8>>().into(),
            ..DownloadHeader::default()
        };
        let offset = usize::try_from(offset).unwrap();
        let mut parts = vec![Part::Header(header)];
        for start in (offset..contents.len()).step_by(CHUNK) {
            let data = contents.slice(start..contents.len().min(start + CHUNK));
            parts.push(Part::Chunk(Chunk { offset: start.try_into().unwrap(), data }));
        }
        let messages: Vec<_> =
            parts.into_iter().map(|part| Ok(DownloadArtifactResponse { part: Some(part) })).collect();
        Ok(Response::new(tokio_stream::iter(messages)))
    }

    async fn upload_artifact(
        &self,
        _: Request<Streaming<UploadArtifactRequest>>,
    ) -> Result<Response<Self::UploadArtifactStream>, Status> {
        Err(Status::unimplemented("agents do not call it"))
    }
    /// Answers without facts, like a controller that judges no images.
    async fn get_artifact(&self, request: Request<GetArtifactRequest>) -> Result<Response<Artifact>, Status> {
        let name = request.into_inner().name;
        let (sha256, contents) = self.stored(&name)?;
        let size_bytes = contents.len().try_into().unwrap();
        Ok(Response::new(Artifact { name, sha256, size_bytes, ..Artifact::default() }))
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

/// Returns the SHA-256 of a text, for wrong tokens.
pub(crate) fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text).into()
}

struct Conn(tokio_rustls::server::TlsStream<TcpStream>);

impl Connected for Conn {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Conn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Target {
    /// Creates a target whose folders and devices do not exist.
    pub(crate) fn in_test() -> Self {
        Self {
            root: "/t".into(),
            boot: "/b".into(),
            root_device: "PARTUUID=00-02".into(),
            boot_device: "PARTUUID=00-04".into(),
            home_device: "PARTUUID=00-03".into(),
            root_type: "ext4".into(),
            home_type: "ext4".into(),
            lease: Lease::new(()),
        }
    }
}
