//! A scripted controller that records its requests.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use marco_proto::v1::artifact_service_server::{ArtifactService, ArtifactServiceServer};
use marco_proto::v1::node_service_server::{NodeService, NodeServiceServer};
use marco_proto::v1::operation_service_server::{OperationService, OperationServiceServer};
use marco_proto::v1::upload_artifact_request::Part as Sent;
use marco_proto::v1::upload_artifact_response::Part as Answer;
use marco_proto::v1::*;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::certificates::Certificates;
use crate::running::{self, Run};

/// The messages of a watch, and its ending.
pub(crate) type Script = (Vec<WatchOperationResponse>, Ending);

/// Ending of a scripted watch.
#[derive(Debug, Clone)]
pub(crate) enum Ending {
    /// The stream ends normally.
    Ok,
    /// The stream breaks with this status.
    Status(Status),
    /// The stream stays open without a message.
    Hang,
}

/// Inputs and records of a test.
#[derive(Default)]
pub(crate) struct Facts {
    /// Existing nodes, in list order.
    pub(crate) nodes: Vec<Node>,
    /// Recorded requests for a creation.
    pub(crate) created: Vec<CreateOperationRequest>,
    /// Number of creations to answer with UNAVAILABLE after they were recorded.
    pub(crate) unavailable: usize,
    /// Scripts of the watches, used in order.
    pub(crate) watches: VecDeque<Script>,
    /// Received bytes by their SHA-256.
    pub(crate) uploads: HashMap<String, Vec<u8>>,
    /// Offsets that were sent to uploads.
    pub(crate) offsets: Vec<u64>,
    /// Recorded headers of uploads.
    pub(crate) headers: Vec<UploadHeader>,
    /// Reason for refusing an upload once all bytes have arrived. `None`: accept it.
    pub(crate) bad_archive: Option<&'static str>,
    /// Recorded changes of nodes.
    pub(crate) updates: Vec<UpdateNodeRequest>,
}

/// A running controller. Dropping it stops it.
pub(crate) struct Controller {
    pub(crate) address: SocketAddr,
    pub(crate) facts: Arc<Mutex<Facts>>,
    certificates: Certificates,
    _server: JoinSet<()>,
}

impl Controller {
    pub(crate) async fn start(facts: Facts) -> Self {
        let certificates = Certificates::mint();
        let facts = Arc::new(Mutex::new(facts));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (certificate, key) = &certificates.controller;
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(certificate, key))
            .client_ca_root(Certificate::from_pem(&certificates.ca));
        let service = Service { facts: Arc::clone(&facts) };
        let router = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(NodeServiceServer::new(service.clone()))
            .add_service(OperationServiceServer::new(service.clone()))
            .add_service(ArtifactServiceServer::new(service));
        let mut server = JoinSet::new();
        server.spawn(async move { router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
        Self { address, facts, certificates, _server: server }
    }

    pub(crate) fn certs(&self) -> PathBuf {
        self.certificates.path()
    }

    /// Runs `marcoctl` against this controller.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Run {
        running::marcoctl(self.address, &self.certs(), arguments).await
    }
}

#[derive(Clone)]
struct Service {
    facts: Arc<Mutex<Facts>>,
}

impl Service {
    /// Sets the state of an existing node.
    fn set_state(&self, name: &str, state: node::State) -> Result<Response<Node>, Status> {
        let mut facts = self.facts.lock().unwrap();
        let found = facts.nodes.iter_mut().find(|node| node.name.ends_with(name));
        let Some(node) = found else {
            let details = ErrorDetails::with_error_info("NODE_NOT_FOUND", "marco.bootstrap", []);
            return Err(Status::with_error_details(tonic::Code::NotFound, format!("there is no node {name}"), details));
        };
        node.state = state.into();
        Ok(Response::new(node.clone()))
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Defines RPCs that no test needs.
macro_rules! unneeded {
    ($($rpc:ident($request:ty) -> $response:ty;)*) => {
        $(
            fn $rpc<'life0, 'async_trait>(
                &'life0 self,
                _request: Request<$request>,
            ) -> Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'async_trait>>
            where
                'life0: 'async_trait,
                Self: 'async_trait,
            {
                Box::pin(async { Err(Status::unimplemented(stringify!($rpc))) })
            }
        )*
    };
}

#[tonic::async_trait]
impl NodeService for Service {
    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let states = request.filter.unwrap_or_default().states;
        let all = self.facts.lock().unwrap().nodes.clone();
        let nodes: Vec<Node> =
            all.into_iter().filter(|node| states.is_empty() || states.contains(&node.state)).collect();
        // Real paging, so that the client's loop over pages is tested.
        let from: usize = request.page_token.parse().unwrap_or(0);
        let to = nodes.len().min(from + usize::try_from(request.page_size).unwrap());
        let next_page_token = if to < nodes.len() { to.to_string() } else { String::new() };
        Ok(Response::new(ListNodesResponse { nodes: nodes[from..to].to_vec(), next_page_token }))
    }

    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let name = request.into_inner().name;
        let facts = self.facts.lock().unwrap();
        let found = facts.nodes.iter().find(|node| node.name.ends_with(&name));
        found.cloned().map(Response::new).ok_or_else(|| {
            let details = ErrorDetails::with_error_info("NODE_NOT_FOUND", "marco.bootstrap", []);
            Status::with_error_details(tonic::Code::NotFound, format!("there is no node {name}"), details)
        })
    }

    async fn update_node(&self, request: Request<UpdateNodeRequest>) -> Result<Response<Node>, Status> {
        let request = request.into_inner();
        let node = request.node.clone().unwrap();
        self.facts.lock().unwrap().updates.push(request);
        Ok(Response::new(node))
    }

    async fn create_join_token(&self, request: Request<CreateJoinTokenRequest>) -> Result<Response<JoinToken>, Status> {
        let request = request.into_inner();
        Ok(Response::new(JoinToken {
            name: "joinTokens/t1".to_owned(),
            token: "the-secret".to_owned(),
            max_uses: request.max_uses,
            labels: request.labels,
            ..Default::default()
        }))
    }

    type WatchNodesStream = Answers<WatchNodesResponse>;

    async fn approve_node(&self, request: Request<ApproveNodeRequest>) -> Result<Response<Node>, Status> {
        self.set_state(&request.into_inner().name, node::State::Approved)
    }

    async fn quarantine_node(&self, request: Request<QuarantineNodeRequest>) -> Result<Response<Node>, Status> {
        self.set_state(&request.into_inner().name, node::State::Quarantined)
    }

    async fn delete_node(&self, request: Request<DeleteNodeRequest>) -> Result<Response<DeleteNodeResponse>, Status> {
        let name = request.into_inner().name;
        self.set_state(&name, node::State::Unspecified)?;
        self.facts.lock().unwrap().nodes.retain(|node| !node.name.ends_with(&name));
        Ok(Response::new(DeleteNodeResponse {}))
    }

    unneeded! {
        watch_nodes(WatchNodesRequest) -> Self::WatchNodesStream;
        resolve_node(ResolveNodeRequest) -> Node;
        list_join_tokens(ListJoinTokensRequest) -> ListJoinTokensResponse;
        revoke_join_token(RevokeJoinTokenRequest) -> JoinToken;
    }
}

#[tonic::async_trait]
impl OperationService for Service {
    async fn create_operation(&self, request: Request<CreateOperationRequest>) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let mut facts = self.facts.lock().unwrap();
        // Recorded before the failure: the first answer is lost, not the first request.
        facts.created.push(request.clone());
        if facts.unavailable > 0 {
            facts.unavailable -= 1;
            return Err(Status::unavailable("the store does not answer"));
        }
        let mut operation = request.operation.unwrap();
        if operation.schedule_time.is_some() {
            let mut details = ErrorDetails::with_error_info("TIME_IN_THE_PAST", "marco.bootstrap", []);
            details.add_bad_request_violation("operation.schedule_time", "is in the past");
            let message = "operation.schedule_time is in the past";
            return Err(Status::with_error_details(tonic::Code::InvalidArgument, message, details));
        }
        operation.name = "operations/one".to_owned();
        operation.state = operation::State::Running.into();
        Ok(Response::new(operation))
    }

    /// Refuses nodes whose names end in `-bad`. `-out` means quarantined, `-alone` in no group.
    async fn check_operation(
        &self,
        request: Request<CheckOperationRequest>,
    ) -> Result<Response<CheckOperationResponse>, Status> {
        // Only the tests of doubts come here, and they name nodes. For others the client ignores this failure.
        let Some(operation::Target::Nodes(target)) = request.into_inner().operation.unwrap().target else {
            return Err(Status::invalid_argument("nodes are to be named"));
        };
        let checks = target.nodes.into_iter().map(|node| {
            let bad = node.ends_with("-bad");
            let verdict = if bad { operation_check::Verdict::Refused } else { operation_check::Verdict::Ready };
            let (reason, message) = if bad { ("NOT_WIRED", "the cable is out") } else { ("", "") };
            OperationCheck {
                node: format!("nodes/{node}"),
                verdict: verdict.into(),
                reason: reason.to_owned(),
                message: message.to_owned(),
            }
        });
        let checks: Vec<OperationCheck> = checks.collect();
        let warning =
            |reason: &str, ask| OperationWarning { reason: reason.to_owned(), message: reason.to_owned(), ask };
        let mut warnings = Vec::new();
        if checks.iter().any(|check| check.node.ends_with("-out")) {
            warnings.push(warning("NODE_QUARANTINED", true));
        }
        if checks.iter().any(|check| check.node.ends_with("-alone")) {
            warnings.push(warning("NO_GROUP", false));
        }
        Ok(Response::new(CheckOperationResponse { checks, warnings }))
    }

    type WatchOperationStream = Answers<WatchOperationResponse>;

    async fn watch_operation(
        &self,
        _request: Request<WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        let script = self.facts.lock().unwrap().watches.pop_front();
        let (messages, ending) = script.ok_or_else(|| Status::not_found("no such operation"))?;
        let messages = tokio_stream::iter(messages.into_iter().map(Ok));
        let stream: Answers<_> = match ending {
            Ending::Ok => Box::pin(messages),
            Ending::Status(status) => Box::pin(messages.chain(tokio_stream::once(Err(status)))),
            Ending::Hang => Box::pin(messages.chain(tokio_stream::pending())),
        };
        Ok(Response::new(stream))
    }

    unneeded! {
        get_operation(GetOperationRequest) -> Operation;
        list_operations(ListOperationsRequest) -> ListOperationsResponse;
        cancel_operation(CancelOperationRequest) -> Operation;
        pause_operation(PauseOperationRequest) -> Operation;
        resume_operation(ResumeOperationRequest) -> Operation;
        retry_operation(RetryOperationRequest) -> Operation;
        list_executions(ListExecutionsRequest) -> ListExecutionsResponse;
        explain_execution(ExplainExecutionRequest) -> ExplainExecutionResponse;
        abandon_execution(AbandonExecutionRequest) -> Execution;
        list_events(ListEventsRequest) -> ListEventsResponse;
    }

    /// Returns a log with a terminal control sequence.
    async fn get_execution_log(
        &self,
        request: Request<GetExecutionLogRequest>,
    ) -> Result<Response<ExecutionLog>, Status> {
        let log = "first\n\u{1b}[2Jsecond\n".to_owned();
        Ok(Response::new(ExecutionLog { name: request.into_inner().name, log, time: None, cut: true }))
    }
}

#[tonic::async_trait]
impl ArtifactService for Service {
    type UploadArtifactStream = Answers<UploadArtifactResponse>;

    async fn upload_artifact(
        &self,
        request: Request<Streaming<UploadArtifactRequest>>,
    ) -> Result<Response<Self::UploadArtifactStream>, Status> {
        let mut sent = request.into_inner();
        let Some(UploadArtifactRequest { part: Some(Sent::Header(header)) }) = sent.message().await? else {
            return Err(Status::invalid_argument("the header comes first"));
        };
        let facts = Arc::clone(&self.facts);
        let (answers, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            if let Err(status) = receive(&facts, &header, &mut sent, &answers).await {
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type DownloadArtifactStream = Answers<DownloadArtifactResponse>;

    unneeded! {
        get_artifact(GetArtifactRequest) -> Artifact;
        list_artifacts(ListArtifactsRequest) -> ListArtifactsResponse;
        delete_artifact(DeleteArtifactRequest) -> DeleteArtifactResponse;
        open_artifact(OpenArtifactRequest) -> Artifact;
        set_default_artifact(SetDefaultArtifactRequest) -> Artifact;
        download_artifact(DownloadArtifactRequest) -> Self::DownloadArtifactStream;
    }
}

async fn receive(
    facts: &Mutex<Facts>,
    header: &UploadHeader,
    sent: &mut Streaming<UploadArtifactRequest>,
    answers: &tokio::sync::mpsc::Sender<Result<UploadArtifactResponse, Status>>,
) -> Result<(), Status> {
    let answer = async |part| {
        let _ = answers.send(Ok(UploadArtifactResponse { part: Some(part) })).await;
    };
    let mut length = {
        let mut facts = facts.lock().unwrap();
        facts.headers.push(header.clone());
        let length = u64::try_from(facts.uploads.entry(header.sha256.clone()).or_default().len()).unwrap();
        facts.offsets.push(length);
        length
    };
    answer(Answer::Offset(length)).await;
    while length < header.size_bytes {
        let Some(UploadArtifactRequest { part: Some(Sent::Chunk(chunk)) }) = sent.message().await? else {
            return Err(Status::invalid_argument("bytes are missing"));
        };
        if chunk.offset != length {
            return Err(Status::invalid_argument("the bytes do not join"));
        }
        let mut facts = facts.lock().unwrap();
        facts.uploads.get_mut(&header.sha256).unwrap().extend_from_slice(&chunk.data);
        length += u64::try_from(chunk.data.len()).unwrap();
    }
    answer(Answer::CheckedBytes(length / 2)).await;
    if let Some(reason) = facts.lock().unwrap().bad_archive {
        return Err(Status::invalid_argument(reason));
    }
    let artifact = Artifact {
        name: header.name.clone(),
        kind: header.kind,
        purpose: header.purpose,
        sha256: header.sha256.clone(),
        size_bytes: length,
        ..Default::default()
    };
    answer(Answer::Artifact(artifact)).await;
    Ok(())
}
