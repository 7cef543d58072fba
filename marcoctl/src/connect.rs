//! The connection to the controller, and explanations for its failures.

mod dial;

use std::time::Duration;

use marco_proto::names::API_PORT;
use marco_proto::secrets;
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::args::Global;
use crate::failure::{Failure, chain};

/// Timeout for connecting: ample for a local network, short for a waiting operator.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Deadline of a unary call.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval of HTTP/2 keepalive pings while calls are open.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A connection is closed if a ping is not answered within this time.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a response in bytes. The first message of a watch names every node of an operation.
const ANSWER_MAX: usize = 64 * 1024 * 1024;

/// Environment variable with an API token. There is no flag for it: command lines are visible to every local user.
const API_TOKEN: &str = "MARCO_API_TOKEN";
/// Hint for an address at which nothing listens.
const NOBODY_HINT: &str =
    "is marco-controller running there? Name another address with --controller HOST:PORT or MARCO_CONTROLLER";

/// An open connection. It reconnects by itself.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    channel: Dialled,
}

/// A channel that adds the API token to each call, if there is one.
pub(crate) type Dialled = InterceptedService<Channel, Credential>;

/// The API token that is sent with each call. `None`: the connection has a client certificate instead.
#[derive(Clone, Default)]
pub(crate) struct Credential(Option<MetadataValue<Ascii>>);

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The derived implementation would print the token.
        f.write_str("Credential")
    }
}

impl Interceptor for Credential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(shown) = &self.0 {
            request.metadata_mut().insert("authorization", shown.clone());
        }
        Ok(request)
    }
}

/// Reads the API token from the command line's file or the environment. Empty: the certificate counts.
fn credential(global: &Global) -> Result<Credential, Failure> {
    let text = match &global.api_token_file {
        Some(path) => {
            let hint = || "`marcoctl api-tokens create` makes one".to_owned();
            let bytes = std::fs::read(path).map_err(|error| Failure::Usage {
                message: format!("cannot read the API token in {}: {error}", path.display()),
                hint: hint(),
            })?;
            let text = secrets::text(&bytes).unwrap_or_default();
            // The two kinds of tokens are easily confused. The file must not be sent as a credential if it holds
            // another secret.
            let holds = match secrets::join_token(&bytes) {
                Ok(_) => Some("a join token, which lets nodes in"),
                Err(holds) if text.contains(char::is_whitespace) || !text.is_ascii() => Some(holds),
                Err(_) => None,
            };
            if let Some(holds) = holds {
                let message = format!("{} is not an API token: it holds {holds}", path.display());
                return Err(Failure::Usage { message, hint: hint() });
            }
            // An empty file is an error. Otherwise the call would run with the rights of the folder's certificate,
            // perhaps an admin's.
            if text.trim().is_empty() {
                return Err(Failure::Usage {
                    message: format!("there is no API token in {}: the file is empty", path.display()),
                    hint: "`marcoctl api-tokens create` makes one".to_owned(),
                });
            }
            text
        }
        None => std::env::var(API_TOKEN).unwrap_or_default(),
    };
    let text = text.trim();
    if text.is_empty() {
        return Ok(Credential::default());
    }
    let mut shown: MetadataValue<Ascii> = format!("Bearer {text}").parse().map_err(|_| Failure::Usage {
        message: "the API token has characters that none has".to_owned(),
        hint: "`marcoctl api-tokens create` makes one".to_owned(),
    })?;
    // Keeps the token out of debug output and out of the HPACK table.
    shown.set_sensitive(true);
    Ok(Credential(Some(shown)))
}

impl Connection {
    /// Connects to the controller named by the command line.
    pub(crate) async fn open(global: &Global) -> Result<Self, Failure> {
        let address = with_port(&global.controller);
        let credential = credential(global)?;
        let config = match dial::config(global, credential.0.is_none()) {
            Ok(config) => config,
            // If nothing listens at the address, that is the first thing to fix.
            Err(failure) => return Err(nobody_at(&address).await.unwrap_or(failure)),
        };
        let endpoint = endpoint(&address)?;
        let (dial, mut heard) = dial::dialer(address.clone(), config);
        let connect = async {
            // Connects at once, not with the first call: a failure is explained here, with the right hint.
            let channel = endpoint.connect_with_connector(dial).await.map_err(|error| chain(&error))?;
            // In TLS 1.3 the server refuses a client's certificate only after the client considers the connection open.
            // The refusal shows when the server first speaks.
            match heard.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(Err(refusal))) => Err(refusal.clone()),
                _ => Ok(channel),
            }
        };
        let cause = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Ok(Ok(channel)) => return Ok(Self { channel: InterceptedService::new(channel, credential) }),
            Ok(Err(cause)) => cause,
            Err(_) => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
        };
        let (certs, identity) = (global.certs.display(), &global.identity);
        let message = no_connection(&address, &cause);
        // The cause has passed several layers and is text by now, so its words are matched.
        Err(if cause.contains("NoApplicationProtocol") {
            let hint = format!(
                "that is a controller's file mirror, or something else that speaks no gRPC; the API is on port {API_PORT}, \
                 unless the controller's --listen differs"
            );
            Failure::Unreachable { message, hint }
        } else if cause.contains("InvalidContentType") {
            let hint = format!(
                "what listens there speaks no TLS; the controller's API is on port {API_PORT}, unless its --listen differs"
            );
            Failure::Unreachable { message, hint }
        } else if cause.contains("certificate not valid yet") || cause.contains("certificate expired") {
            // This is this machine's own check. The controller's alert has another text.
            let hint = format!(
                "this machine's clock says {}; the controller's certificate is not valid at that time. Set the clock that is \
                 wrong, here or on the controller: a controller replaces its own certificate within seconds",
                crate::clock::now().format("%Y-%m-%d %H:%M UTC")
            );
            Failure::Unreachable { message, hint }
        } else if cause.contains("CertificateExpired") {
            let hint = format!(
                "the controller takes {certs}/{identity}.crt for expired or not valid yet. If it is neither, the clock on the \
                 controller is wrong; otherwise choose another certificate with --certs and --identity, or have one made \
                 (`marcoctl users create`)"
            );
            Failure::ShutOut { message, hint }
        } else if cause.contains("received fatal alert") {
            let hint = format!(
                "the controller does not take {certs}/{identity}.crt: it is of another CA; choose another with --certs and \
                 --identity"
            );
            Failure::ShutOut { message, hint }
        } else if cause.contains("certificate") {
            let hint = format!(
                "the controller there is not the one whose ca.crt is in {certs}; choose its folder with --certs DIR"
            );
            Failure::Unreachable { message, hint }
        } else {
            Failure::Unreachable { message, hint: NOBODY_HINT.to_owned() }
        })
    }

    /// Client for users, API tokens, certificates and the audit.
    pub(crate) fn access(&self) -> AccessServiceClient<Dialled> {
        AccessServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }

    /// Client for nodes and join tokens.
    pub(crate) fn nodes(&self) -> NodeServiceClient<Dialled> {
        NodeServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }

    /// Client for artifacts.
    pub(crate) fn artifacts(&self) -> ArtifactServiceClient<Dialled> {
        ArtifactServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }

    /// Client for operations.
    pub(crate) fn operations(&self) -> OperationServiceClient<Dialled> {
        OperationServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }

    /// Client for schedules.
    pub(crate) fn schedules(&self) -> ScheduleServiceClient<Dialled> {
        ScheduleServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }
}

/// Wraps a message into a unary request with the deadline [`CALL_TIMEOUT`].
pub(crate) fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    // Sent along as `grpc-timeout`, so the controller drops a call whose deadline has passed.
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn no_connection(address: &str, cause: &str) -> String {
    format!("no connection to the controller at {address}: {cause}")
}

/// Returns the failure to report if nothing listens at this address. `None` if something does, or if the address is
/// invalid.
async fn nobody_at(address: &str) -> Option<Failure> {
    // An invalid address has its own message with the expected form.
    match tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::TcpStream::connect(address)).await {
        Ok(Err(error)) if error.kind() != std::io::ErrorKind::InvalidInput => Some(Failure::Unreachable {
            message: no_connection(address, &error.to_string()),
            hint: NOBODY_HINT.to_owned(),
        }),
        _ => None,
    }
}

fn endpoint(address: &str) -> Result<Endpoint, Failure> {
    let bad_address = |error: tonic::transport::Error| Failure::Usage {
        message: format!("{address:?} is not an address: {}", chain(&error)),
        hint: "write HOST:PORT, for example controller.local:1346 or [fd00::1]:1346".to_owned(),
    };
    // The dialer does TLS itself, so tonic sees a plain connection.
    Ok(Endpoint::from_shared(format!("http://{address}"))
        .map_err(bad_address)?
        .user_agent(concat!("marcoctl/", env!("CARGO_PKG_VERSION")))
        .map_err(bad_address)?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT))
}

/// Appends the API's port if the address has none.
fn with_port(address: &str) -> String {
    let colons = address.matches(':').count();
    if colons == 1 || address.contains("]:") {
        address.to_owned()
    // More than one colon without brackets: a bare IPv6 address.
    } else if colons > 1 && !address.starts_with('[') {
        format!("[{address}]:{API_PORT}")
    } else {
        format!("{address}:{API_PORT}")
    }
}

#[cfg(test)]
mod tests {
    use super::with_port;

    #[test]
    fn the_port_may_be_left_out() {
        assert_eq!(with_port("localhost:9"), "localhost:9");
        assert_eq!(with_port("marco.local"), "marco.local:1346");
        assert_eq!(with_port("fd00::1"), "[fd00::1]:1346");
        assert_eq!(with_port("[fd00::1]"), "[fd00::1]:1346");
        assert_eq!(with_port("[fd00::1]:9"), "[fd00::1]:9");
    }
}
