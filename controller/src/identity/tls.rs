//! TLS of the listeners and towards other controllers, and the HTTP/2 limits. The acceptor is our own, because tonic's
//! offers neither reload nor a clock.

mod connection;
mod frames;
mod guard;
pub(crate) mod incoming;
mod peer;
pub mod places;
pub mod streams;

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use rustls::crypto::ring::{default_provider, sign};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::ca::Pki;
use crate::clock::Clock;
pub use connection::TlsConn;
use guard::Guard;
pub use guard::{Connection, Look};
pub use incoming::incoming;
pub use peer::{PeerError, dial};
use places::{Limits, Places, STRANGER_STREAMS};

/// Streams per connection: a console with watches and calls needs a dozen, an agent two.
pub(crate) const MAX_CONCURRENT_STREAMS: u32 = 128;
/// Bytes that a peer may send ahead, per stream and per connection: enough for a gigabit at 4 ms, and the most that an
/// idle or hostile peer can make the server hold.
const WINDOW: u32 = 512 << 10;
/// Largest frame that is taken, so that a message of 256 KiB is one frame.
const MAX_FRAME: u32 = 256 << 10;
/// Interval at which a silent peer is pinged: well below the time-outs of NAT, and rare enough for 10,000 nodes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Time for the answer to a ping. Together with the interval a dead peer is detected after half a minute.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams that a peer may reset before they were accepted (CVE-2023-44487, "rapid reset").
const MAX_PENDING_RESETS: usize = 20;
/// Streams that a peer may make this side reset with malformed frames; tonic's default is no limit.
const MAX_LOCAL_RESETS: usize = 64;
/// Largest list of headers of a request, in bytes: gRPC's metadata is small.
const MAX_HEADER_LIST: u32 = 16 << 10;

/// Time until the answer to a call begins; after it the call is given up. Otherwise a request that never comes whole
/// would be kept forever. Only fetching a large artifact from another controller takes minutes.
const CALL_TIMEOUT: Duration = Duration::from_secs(600);
/// The same for a call for enrolment. No client of that listener ever shows a credential that is accepted.
const ENROLMENT_CALL: Duration = Duration::from_secs(10);
/// Age at which an enrolment connection ends; a node enrols within seconds. Calls under way then get
/// [`ENROLMENT_GRACE`]. Together they are [`places::STRANGER_AGE`].
const ENROLMENT_AGE: Duration = Duration::from_secs(8);
/// See [`ENROLMENT_AGE`].
const ENROLMENT_GRACE: Duration = Duration::from_secs(2);
/// Bytes that a peer may send ahead for enrolment, per stream and per connection: the least that HTTP/2 allows.
const ENROLMENT_WINDOW: u32 = 65_535;
/// Largest frame for enrolment: the least that HTTP/2 allows.
const ENROLMENT_FRAME: u32 = 16 << 10;

/// Timeouts and HTTP/2 limits of a listener.
#[derive(Debug, Clone, Copy)]
struct Patience {
    ask: Duration,
    answer: Duration,
    call: Duration,
    /// Age at which a connection ends, and the grace for its calls; `None`: no limit.
    age: Option<(Duration, Duration)>,
    streams: u32,
    window: u32,
    frame: u32,
}

/// The API's listener: sessions last for months.
const API: Patience = Patience {
    ask: KEEPALIVE_INTERVAL,
    answer: KEEPALIVE_TIMEOUT,
    call: CALL_TIMEOUT,
    age: None,
    streams: MAX_CONCURRENT_STREAMS,
    window: WINDOW,
    frame: MAX_FRAME,
};
/// The enrolment listener: any host that reaches the port can hold connections.
const ENROLMENT: Patience = Patience {
    call: ENROLMENT_CALL,
    age: Some((ENROLMENT_AGE, ENROLMENT_GRACE)),
    streams: STRANGER_STREAMS,
    window: ENROLMENT_WINDOW,
    frame: ENROLMENT_FRAME,
    ..API
};

/// A client certificate that the CA issued, verified in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Common name of the subject.
    pub common_name: String,
    /// Organizational unit of the subject: the role's word.
    pub role: String,
    /// Serial number, lower-case hexadecimal, 32 digits for certificates of this CA.
    pub serial: String,
    /// SHA-256 of the SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
    /// Start of the validity.
    pub not_before: DateTime<Utc>,
    /// End of the validity.
    pub not_after: DateTime<Utc>,
}

impl PeerCertificate {
    /// Reads a certificate; `None`: it does not have exactly one common name and one unit.
    pub fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        Some(Self {
            common_name: common_name(&certificate)?.to_owned(),
            role: role_word(&certificate)?.to_owned(),
            serial: serial_hex(&certificate),
            key_sha256: hex::encode(Sha256::digest(certificate.public_key().raw)),
            not_before: DateTime::from_timestamp(certificate.validity().not_before.timestamp(), 0)?,
            not_after: DateTime::from_timestamp(certificate.validity().not_after.timestamp(), 0)?,
        })
    }
}

/// The subject's only common name.
pub(super) fn common_name<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    let mut names = certificate.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?;
    // With two names one check could read the first and another one the last.
    names.next().is_none().then_some(name)
}

/// The subject's only organizational unit.
pub(super) fn role_word<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    let mut units = certificate.subject().iter_organizational_unit();
    let unit = units.next()?.as_str().ok()?;
    units.next().is_none().then_some(unit)
}

/// The serial number, without the zero that DER puts before a high bit.
pub(super) fn serial_hex(certificate: &X509Certificate<'_>) -> String {
    let raw = certificate.raw_serial();
    hex::encode(raw.strip_prefix(&[0]).unwrap_or(raw))
}

/// The other end of a connection; an extension of tonic's requests.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Its address.
    pub addr: SocketAddr,
    /// Its certificate; `None`: it showed none.
    pub certificate: Option<Arc<PeerCertificate>>,
    /// The connection itself.
    pub connection: Arc<Connection>,
}

impl PeerInfo {
    /// The time since which the peer of a session is there: the start of its connection, or now if the connection had a
    /// session before.
    pub fn accept_session(&self) -> Instant {
        if self.connection.begin_session() { Instant::now() } else { self.connection.accepted() }
    }
}

/// The TLS of one kind of listener. Cheap to clone; [`Acceptor::reload`] changes all clones.
#[derive(Clone)]
pub struct Acceptor {
    tls: Arc<ServerConfig>,
    presented: Arc<Presented>,
    with_ca: bool,
    guard: Guard,
}

/// The purpose of an acceptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listener {
    Api,
    Enrolment,
    Mirror,
}

/// The certificate cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
#[error("the controller's certificate cannot be used for TLS")]
pub struct TlsError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl TlsError {
    fn new(source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Box::new(source))
    }
}

impl Acceptor {
    /// For the API: a client certificate is optional, and verified when shown.
    ///
    /// # Errors
    /// Returns an error if the certificate and its key do not match.
    pub fn api(pki: &Pki, clock: Arc<dyn Clock>) -> Result<Self, TlsError> {
        Self::new(pki, clock, Listener::Api)
    }

    /// For enrolment: no client certificate; the chain carries the CA, so that a node can compare it with its pin.
    ///
    /// # Errors
    /// Returns an error if the certificate and its key do not match.
    pub fn enrolment(pki: &Pki, clock: Arc<dyn Clock>) -> Result<Self, TlsError> {
        Self::new(pki, clock, Listener::Enrolment)
    }

    /// For the file mirror: a client certificate is required; TLS 1.2 too, and HTTP/1.1, for installers of the 2015
    /// system.
    ///
    /// # Errors
    /// Returns an error if the certificate and its key do not match.
    pub fn mirror(pki: &Pki, clock: Arc<dyn Clock>) -> Result<Self, TlsError> {
        Self::new(pki, clock, Listener::Mirror)
    }

    fn new(pki: &Pki, clock: Arc<dyn Clock>, listener: Listener) -> Result<Self, TlsError> {
        let provider = Arc::new(default_provider());
        let with_ca = listener == Listener::Enrolment;
        let presented = Arc::new(Presented(RwLock::new(certified(pki, with_ca)?)));
        // Installers of the 2015 system may not speak TLS 1.3; our own agents and tools do.
        let versions: &[_] = if listener == Listener::Mirror { &[&TLS13, &TLS12] } else { &[&TLS13] };
        let builder = ServerConfig::builder_with_details(Arc::clone(&provider), Arc::new(TlsTime(clock)))
            .with_protocol_versions(versions)
            .map_err(TlsError::new)?;
        let builder = if listener == Listener::Enrolment {
            builder.with_no_client_auth()
        } else {
            let mut roots = RootCertStore::empty();
            roots.add(pki.ca.certificate_der().clone()).map_err(TlsError::new)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            // The API also takes callers with an API token, who have no certificate.
            let verifier = if listener == Listener::Mirror { verifier } else { verifier.allow_unauthenticated() };
            builder.with_client_cert_verifier(verifier.build().map_err(TlsError::new)?)
        };
        let mut config = builder.with_cert_resolver(presented.clone());
        // Clients of the mirror speak HTTP/1.1 only.
        config.alpn_protocols = vec![if listener == Listener::Mirror { b"http/1.1".to_vec() } else { b"h2".to_vec() }];
        // No resumption: it would keep a revoked or expired certificate alive, and memory for each node.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let guard = Guard { places: Places::new(Limits::of_files(usize::MAX)), look: None };
        Ok(Self { tls: Arc::new(config), presented, with_ca, guard })
    }

    /// Limits the connections of this listener, and looks certificates up before the first call.
    pub fn guarded(mut self, limits: Limits, look: Option<Look>) -> Self {
        self.guard = Guard { places: Places::new(limits), look };
        self
    }

    /// Presents the controller's current certificate from now on.
    ///
    /// # Errors
    /// Returns an error if the certificate and its key do not match; the old certificate stays in use.
    pub fn reload(&self, pki: &Pki) -> Result<(), TlsError> {
        let certified = certified(pki, self.with_ca)?;
        *self.presented.0.write().unwrap_or_else(PoisonError::into_inner) = certified;
        Ok(())
    }
}

fn certified(pki: &Pki, with_ca: bool) -> Result<Arc<CertifiedKey>, TlsError> {
    let mut chain = vec![pki.certificate().clone()];
    if with_ca {
        chain.push(pki.ca.certificate_der().clone());
    }
    let key = sign::any_supported_type(&pki.key()).map_err(TlsError::new)?;
    // `CertifiedKey::new` does not compare them; each handshake would fail instead.
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(TlsError::new)?;
    Ok(Arc::new(certified))
}

/// The presented certificate. It does not depend on the name that the client asks for, because agents dial addresses.
struct Presented(RwLock<Arc<CertifiedKey>>);

impl fmt::Debug for Presented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Presented")
    }
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// The controller's clock, for rustls.
struct TlsTime(Arc<dyn Clock>);

impl fmt::Debug for TlsTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsTime")
    }
}

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.now().timestamp()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// The server for enrolment: like [`server_builder`]'s, but connections end.
pub fn enrolment_builder() -> tonic::transport::Server {
    builder(ENROLMENT)
}

/// tonic's server with every HTTP/2 limit set.
pub fn server_builder() -> tonic::transport::Server {
    builder(API)
}

fn builder(patience: Patience) -> tonic::transport::Server {
    let server = tonic::transport::Server::builder()
        .max_concurrent_streams(patience.streams)
        .initial_stream_window_size(patience.window)
        .initial_connection_window_size(patience.window)
        // An adaptive window would grow beyond the memory that is planned for a connection.
        .http2_adaptive_window(Some(false))
        .max_frame_size(patience.frame)
        .http2_keepalive_interval(Some(patience.ask))
        .http2_keepalive_timeout(Some(patience.answer))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(MAX_LOCAL_RESETS))
        .http2_max_header_list_size(MAX_HEADER_LIST)
        .timeout(patience.call)
        .accept_http1(false);
    match patience.age {
        Some((age, grace)) => server.max_connection_age(age).max_connection_age_grace(grace),
        None => server,
    }
}

#[cfg(test)]
mod tests;
