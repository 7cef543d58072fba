//! TLS to controllers: version 1.3 only. Their name is verified under our CA, and our certificate is shown.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use marco_proto::names::CONTROLLER_TLS_NAME;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::time_provider::TimeProvider;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use sha2::{Digest as _, Sha256};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::IdentityError;
use super::time::TlsTime;
use super::watched::{self, Told, Watched};
use crate::cause::chain;

/// Time limit of TCP and TLS together. A Pi 1 takes a second for the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Purpose of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Small messages, so small buffers: an idle session should cost little memory.
    Session,
    /// Image bytes: large frames, read in large pieces.
    Download,
}

impl Purpose {
    fn read_buffer(self) -> usize {
        match self {
            Self::Session => 8 * 1024,
            Self::Download => 256 * 1024,
        }
    }

    fn endpoint(self, endpoint: Endpoint) -> Endpoint {
        match self {
            Self::Session => endpoint,
            Self::Download => endpoint
                .initial_stream_window_size(512 * 1024)
                .initial_connection_window_size(512 * 1024)
                .max_frame_size(256 * 1024),
        }
    }
}

/// Way to recognise a controller's CA.
#[derive(Debug, Clone)]
pub(super) enum Trust {
    /// The stored CA.
    Ca(CertificateDer<'static>),
    /// SHA-256 of the CA's SubjectPublicKeyInfo. The controller sends the CA's certificate itself.
    Pin([u8; 32]),
}

/// Reason that the other end is not one of our controllers, worded for an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Foreign {
    #[error(
        "it is another controller than the one that made the join token: take a token of this one (`marcoctl tokens \
         create`), or name the other with --controller"
    )]
    Token,
    #[error(
        "it is another controller than the one where this node was enrolled: name that one with --controller, or remove \
         the node's identity to enrol it here"
    )]
    Identity,
    #[error(
        "it shows no CA, so it is no enrolment listener (port 1347, unless the controller's --enroll-listen differs)"
    )]
    NoCa,
    #[error(
        "it speaks no gRPC: it is a controller's file mirror (port 1345), or none; the API is on port 1346 and enrolment on \
         1347, unless the controller's --listen and --enroll-listen differ"
    )]
    NoGrpc,
}

impl From<Foreign> for Error {
    fn from(foreign: Foreign) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(foreign))))
    }
}

impl Foreign {
    /// The verifier's reason, if it ended the handshake.
    fn ended(error: &std::io::Error) -> Option<Self> {
        match error.get_ref()?.downcast_ref()? {
            Error::InvalidCertificate(CertificateError::Other(other)) => other.0.downcast_ref().copied(),
            Error::AlertReceived(AlertDescription::NoApplicationProtocol) => Some(Self::NoGrpc),
            _ => None,
        }
    }
}

/// Treatment of a controller's certificate that is not valid at this time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Validity {
    /// A certificate that has expired is refused.
    Needed,
    /// Any time is accepted. For a renewal: the answer is proved by the CA's signature over our key, and tells the time
    /// to a node with a wrong one.
    AtAnyTime,
}

/// Verifies that the other end is one of our controllers.
#[derive(Debug)]
struct ControllerVerifier {
    trust: Trust,
    validity: Validity,
    provider: Arc<CryptoProvider>,
}

impl ControllerVerifier {
    fn ca<'a>(
        &'a self,
        end_entity: &'a CertificateDer<'a>,
        intermediates: &'a [CertificateDer<'a>],
    ) -> Result<&'a CertificateDer<'a>, Error> {
        match &self.trust {
            Trust::Ca(ca) => Ok(ca),
            // The pin names a key, so the CA's certificate may be renewed without new tokens.
            Trust::Pin(pin) => intermediates
                .iter()
                .chain(std::iter::once(end_entity))
                .find(|certificate| spki_sha256(certificate).is_ok_and(|found| found == *pin))
                .ok_or_else(|| if intermediates.is_empty() { Foreign::NoCa } else { Foreign::Token }.into()),
        }
    }
}

impl ServerCertVerifier for ControllerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = self.ca(end_entity, intermediates)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        // A node that was off for long knows an old time, and meets a newer certificate. The CA signed the beginning of
        // the validity, so that time has passed too. The signature is verified below. The later time cannot hide that a
        // certificate has expired.
        let began = [ca, end_entity].into_iter().filter_map(|certificate| validity(certificate).ok());
        let began = began.filter_map(|(from, _)| u64::try_from(from).ok()).max().unwrap_or(0);
        let mut now = now.max(UnixTime::since_unix_epoch(Duration::from_micros(began)));
        if self.validity == Validity::AtAnyTime
            && let Ok((_, end)) = validity(end_entity)
            && let Ok(end) = u64::try_from(end)
        {
            now = now.min(UnixTime::since_unix_epoch(Duration::from_micros(end)));
        }
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).map_err(|error| {
            // CAs of different controllers may have the same name. Then the signature is what fails.
            match error {
                Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                    Foreign::Identity.into()
                }
                error => error,
            }
        })
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Only TLS 1.3 is configured, so this is never called.
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn config_builder(
    trust: Trust,
    validity: Validity,
    time: &Arc<TlsTime>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, IdentityError> {
    let provider = provider();
    let time: Arc<dyn TimeProvider> = time.clone();
    let builder = ClientConfig::builder_with_details(provider.clone(), time)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| IdentityError::invalid("the TLS configuration", error))?;
    let verifier = Arc::new(ControllerVerifier { trust, validity, provider });
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier))
}

fn speak_http2(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// TLS configuration of an enrolled node.
pub(super) fn node_config(
    leaf: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    ca: CertificateDer<'static>,
    time: &Arc<TlsTime>,
) -> Result<Arc<ClientConfig>, IdentityError> {
    config_builder(Trust::Ca(ca), Validity::Needed, time)?
        .with_client_auth_cert(vec![leaf], key)
        .map(speak_http2)
        .map_err(|error| IdentityError::invalid("the node's key or certificate", error))
}

/// TLS configuration for the enrolment listener, which asks for no certificate.
pub(super) fn anonymous_config(
    trust: Trust,
    validity: Validity,
    time: &Arc<TlsTime>,
) -> Result<Arc<ClientConfig>, IdentityError> {
    Ok(speak_http2(config_builder(trust, validity, time)?.with_no_client_auth()))
}

/// Opens an HTTP/2 connection over TLS to `address` (host:port). `told` receives each refusal of a certificate, by
/// either side, as not valid at this time. `None`: this side shows no certificate.
pub(super) async fn connect(
    address: &str,
    config: Arc<ClientConfig>,
    purpose: Purpose,
    told: Option<Told>,
) -> Result<Channel, IdentityError> {
    // The transport's error keeps only the text of the handshake's error, so the reason is passed on here.
    let ended: Arc<OnceLock<Foreign>> = Arc::default();
    let failed = |why: String| {
        let why = ended.get().map_or(why, ToString::to_string);
        // `NoCa` is not foreign: it may be the right controller on another port.
        let foreign = matches!(ended.get(), Some(Foreign::Token | Foreign::Identity));
        IdentityError::Connect { address: address.to_owned(), why, foreign }
    };
    // The connector below dials the address. The URI only carries the name for the requests.
    let endpoint = Endpoint::from_shared(format!("http://{CONTROLLER_TLS_NAME}"))
        .map_err(|error| failed(error.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        // A dead NAT entry or an unplugged cable ends an idle connection silently.
        .keep_alive_while_idle(true);
    let connector = TlsConnector::from(config);
    let dial = {
        let (address, ended) = (address.to_owned(), Arc::clone(&ended));
        tower::service_fn(move |_: http::Uri| {
            let (connector, address) = (connector.clone(), address.clone());
            let (ended, told) = (Arc::clone(&ended), told.clone());
            async move {
                let open = async {
                    let name = ServerName::try_from(CONTROLLER_TLS_NAME).map_err(std::io::Error::other)?;
                    let tcp = TcpStream::connect(&address).await?;
                    tcp.set_nodelay(true)?;
                    // rustls reads 4 KiB at a time.
                    connector.connect(name, BufReader::with_capacity(purpose.read_buffer(), tcp)).await
                };
                match tokio::time::timeout(CONNECT_TIMEOUT, open).await {
                    Ok(Ok(stream)) => Ok(TokioIo::new(Watched::new(stream, told))),
                    Ok(Err(error)) => {
                        if let Some(foreign) = Foreign::ended(&error) {
                            let _ = ended.set(foreign);
                        }
                        watched::note(&error, told.as_ref());
                        Err(error)
                    }
                    Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut)),
                }
            }
        })
    };
    purpose.endpoint(endpoint).connect_with_connector(dial).await.map_err(|error| failed(chain(&error)))
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| IdentityError::invalid("a certificate", error))?;
    Ok(parsed)
}

/// A certificate's SubjectPublicKeyInfo, DER.
pub(super) fn spki(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, IdentityError> {
    Ok(parse(certificate)?.public_key().raw.to_vec())
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo.
pub(super) fn spki_sha256(certificate: &CertificateDer<'_>) -> Result<[u8; 32], IdentityError> {
    Ok(Sha256::digest(parse(certificate)?.public_key().raw).into())
}

/// Validity of a certificate, microseconds since 1970: first and last moment.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> Result<(i64, i64), IdentityError> {
    let parsed = parse(certificate)?;
    let micros = |time: x509_parser::time::ASN1Time| time.timestamp().saturating_mul(1_000_000);
    Ok((micros(parsed.validity().not_before), micros(parsed.validity().not_after)))
}

/// The node's id: the common name of a certificate's subject.
pub(super) fn common_name(certificate: &CertificateDer<'_>) -> Result<String, IdentityError> {
    let parsed = parse(certificate)?;
    let name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok().map(str::to_owned));
    name.ok_or_else(|| IdentityError::invalid("the node's certificate", "it names no node"))
}

/// Checks that the CA issued the node's certificate. One that is expired or not valid yet passes: it can still be
/// renewed.
pub(super) fn check_issued(
    leaf: &CertificateDer<'_>,
    ca: &CertificateDer<'static>,
    time: &Arc<TlsTime>,
) -> Result<(), IdentityError> {
    let invalid = |error: &dyn std::fmt::Display| IdentityError::invalid("the node's certificate", error);
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(|error| invalid(&error))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| invalid(&error))?;
    let (not_before, not_after) = validity(leaf)?;
    let now = u64::try_from(time.now_micros().min(not_after).max(not_before)).unwrap_or(0);
    let now = UnixTime::since_unix_epoch(Duration::from_micros(now));
    verifier.verify_client_cert(leaf, &[], now).map(|_| ()).map_err(|error| invalid(&error))
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;

    use super::{ControllerVerifier, Foreign, Trust, Validity, provider};

    #[test]
    fn listener_that_shows_no_ca_is_named_as_such() {
        let (trust, validity) = (Trust::Pin([7; 32]), Validity::Needed);
        let verifier = ControllerVerifier { trust, validity, provider: provider() };
        let other = CertificateDer::from(Vec::new());
        let told = |shown: &[CertificateDer<'_>]| {
            let error = verifier.ca(&other, shown).unwrap_err();
            Foreign::ended(&std::io::Error::other(error))
        };
        assert_eq!(told(&[]), Some(Foreign::NoCa));
        assert_eq!(told(std::slice::from_ref(&other)), Some(Foreign::Token));
    }
}
