//! The connection to the controller: mutual TLS, and what is said when there is none.

use std::error::Error as _;
use std::path::Path;
use std::time::Duration;

use marco_proto::names::{API_PORT, CONTROLLER_TLS_NAME};
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use tonic::Request;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::args::Global;
use crate::failure::{Failure, chain};

/// How long to wait for a connection: ample for a network of one house, short for a person.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a call that answers once may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// With calls open, a silent connection is asked after this time whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// And is given up after this time without an answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer taken: the first message of a watch names every node of an operation.
const ANSWER_MAX: usize = 64 * 1024 * 1024;

/// What to do when nobody answers.
const NOBODY_HINT: &str =
    "is marco-controller running there? Name another address with --controller HOST:PORT or MARCO_CONTROLLER";

/// An open connection. It comes back by itself when it broke.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    channel: Channel,
}

impl Connection {
    /// Connects to the controller that the command line names.
    pub(crate) async fn open(global: &Global) -> Result<Self, Failure> {
        let address = with_port(&global.controller);
        let endpoint = match endpoint(&address, global) {
            Ok(endpoint) => endpoint,
            // Where nobody listens, that is the first thing to put right.
            Err(failure) => return Err(nobody_at(&address).await.unwrap_or(failure)),
        };
        let attempt = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await;
        let cause = match attempt {
            Ok(Ok(channel)) => return Ok(Self { channel }),
            Ok(Err(error)) => chain(error.source().unwrap_or(&error)),
            Err(_) => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
        };
        let hint = if cause.contains("certificate") {
            format!(
                "the controller there is not the one whose ca.crt is in {}; choose its folder with --certs DIR",
                global.certs.display()
            )
        } else {
            NOBODY_HINT.to_owned()
        };
        Err(Failure::Unreachable { message: no_connection(&address, &cause), hint })
    }

    /// Calls about nodes and join tokens.
    pub(crate) fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }

    /// Calls about artifacts.
    pub(crate) fn artifacts(&self) -> ArtifactServiceClient<Channel> {
        ArtifactServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }

    /// Calls about operations.
    pub(crate) fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_MAX)
    }
}

/// A request that answers once, with its deadline.
pub(crate) fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn no_connection(address: &str, cause: &str) -> String {
    format!("no connection to the controller at {address}: {cause}")
}

/// The failure to report when nobody listens at this address; none when somebody does, or when it is no address.
async fn nobody_at(address: &str) -> Option<Failure> {
    match tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::TcpStream::connect(address)).await {
        Ok(Err(error)) if error.kind() != std::io::ErrorKind::InvalidInput => Some(Failure::Unreachable {
            message: no_connection(address, &error.to_string()),
            hint: NOBODY_HINT.to_owned(),
        }),
        _ => None,
    }
}

fn endpoint(address: &str, global: &Global) -> Result<Endpoint, Failure> {
    let certs = &global.certs;
    let ca = read(certs, "ca.crt")?;
    let certificate = read(certs, &format!("{}.crt", global.identity))?;
    let key = read(certs, &format!("{}.key", global.identity))?;
    let tls = ClientTlsConfig::new()
        .domain_name(CONTROLLER_TLS_NAME)
        .ca_certificate(Certificate::from_pem(ca))
        .identity(Identity::from_pem(certificate, key))
        .timeout(CONNECT_TIMEOUT);
    let bad_address = |error: tonic::transport::Error| Failure::Usage {
        message: format!("{address:?} is not an address: {}", chain(&error)),
        hint: "write HOST:PORT, for example controller.local:1346 or [fd00::1]:1346".to_owned(),
    };
    let bad_certificates = |error: tonic::transport::Error| Failure::Usage {
        message: format!("the certificates in {} cannot be used: {}", certs.display(), chain(&error)),
        hint: format!("ca.crt, {0}.crt and {0}.key must be PEM, and the key must fit the certificate", global.identity),
    };
    Endpoint::from_shared(format!("https://{address}"))
        .map_err(bad_address)?
        .user_agent(concat!("marcoctl/", env!("CARGO_PKG_VERSION")))
        .map_err(bad_address)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .tls_config(tls)
        .map_err(bad_certificates)
}

fn read(certs: &Path, file: &str) -> Result<Vec<u8>, Failure> {
    let path = certs.join(file);
    std::fs::read(&path).map_err(|error| Failure::Usage {
        message: format!("cannot read {}: {error}", path.display()),
        hint: "name the folder that the controller wrote its certificates to with --certs DIR or MARCO_CERTS, and \
               another certificate in it with --identity NAME"
            .to_owned(),
    })
}

/// The address with the API's port where none is given.
fn with_port(address: &str) -> String {
    let colons = address.matches(':').count();
    if colons == 1 || address.contains("]:") {
        address.to_owned()
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
