//! Who the node is: a key that is made here and never leaves, a certificate for it, and the CA that both sides trust.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::discovery::CaHint;
use crate::durable;

mod enroll;
mod join;
mod time;
mod tls;
mod token;

pub use enroll::{Enrollment, enroll};
pub use join::{JoinError, JoinFile};
pub use time::TlsTime;
pub use tls::Purpose;
pub use token::{InvalidToken, JoinToken};

const KEY_FILE: &str = "node.key";
const CERTIFICATE_FILE: &str = "node.crt";
const CA_FILE: &str = "ca.crt";
/// When a controller last told the time, microseconds since 1970.
const TIME_FILE: &str = "time";
const SECRET_MODE: u32 = 0o600;
const PUBLIC_MODE: u32 = 0o644;
/// The remembered time is written again when it has moved on this far.
const REMEMBER_EVERY_MICROS: i64 = 60 * 60 * 1_000_000;

/// The board, as enrolment and session describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Board {
    /// From the device tree.
    pub model: String,
    /// The revision code, hexadecimal.
    pub revision: String,
    /// The serial number, 16 hexadecimal digits.
    pub serial: String,
    /// MAC addresses.
    pub macs: Vec<String>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// `pi1` to `pi5`, or empty when unknown.
    pub family: String,
}

impl Board {
    /// As it goes over the wire.
    pub(crate) fn to_wire(&self) -> marco_proto::v1::Board {
        marco_proto::v1::Board {
            model: self.model.clone(),
            revision: self.revision.clone(),
            serial: self.serial.clone(),
            mac_addresses: self.macs.clone(),
            memory_bytes: self.memory_bytes,
            family: self.family.clone(),
        }
    }
}

/// The node has no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A key or certificate makes no sense.
    #[error("{what} cannot be used: {why}")]
    Invalid {
        /// Which one.
        what: String,
        /// Why.
        why: String,
    },
    /// The controller could not be reached, or is not the right one.
    #[error("cannot connect to {address}: {why}")]
    Connect {
        /// Which address.
        address: String,
        /// Why, with causes.
        why: String,
        /// True when somebody answered and proved to be of another CA.
        foreign: bool,
    },
    /// The controller said no.
    #[error("the controller refuses: {message}")]
    Refused {
        /// What it said.
        message: String,
        /// Whether asking again may help.
        retryable: bool,
        /// Whether the wish itself is wrong, for example the name: nothing but another wish helps.
        permanent: bool,
    },
    /// There is nothing to enrol with.
    #[error(
        "this node is not enrolled and has no join token: give --token-file, --token - or MARCO_TOKEN, or put \
         marco/join.toml on the boot partition"
    )]
    NoToken,
}

impl IdentityError {
    fn invalid(what: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::Invalid { what: what.into(), why: why.to_string() }
    }

    fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether no time and no network heals it: the node asks for what cannot be, or at a controller of another CA.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Connect { foreign, .. } => *foreign,
            Self::Refused { permanent, .. } => *permanent,
            Self::Io { .. } | Self::Invalid { .. } | Self::NoToken => false,
        }
    }

    /// Whether the same thing, tried again, may go well.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::Refused { retryable, .. } => *retryable,
            Self::Io { .. } | Self::Invalid { .. } | Self::NoToken => false,
        }
    }
}

/// The present certificate and what is made of it.
struct Credentials {
    certificate_pem: String,
    leaf: CertificateDer<'static>,
    tls: Arc<ClientConfig>,
    ca: CaHint,
    /// Validity, microseconds since 1970.
    not_before: i64,
    not_after: i64,
}

/// The identity of an enrolled node.
pub struct Identity {
    directory: PathBuf,
    node: String,
    time: Arc<TlsTime>,
    credentials: RwLock<Credentials>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the identity in `directory`; none when the node has not been enrolled.
    pub fn load(directory: &Path, time: Arc<TlsTime>) -> Result<Option<Self>, IdentityError> {
        let Some(certificate) = read(&directory.join(CERTIFICATE_FILE))? else { return Ok(None) };
        let credentials = credentials(directory, certificate, &time)?;
        let node = tls::common_name(&credentials.leaf)?;
        if let Some(told) = read(&directory.join(TIME_FILE))?.and_then(|text| text.trim().parse().ok()) {
            time.advance(told);
        }
        Ok(Some(Self { directory: directory.to_owned(), node, time, credentials: RwLock::new(credentials) }))
    }

    /// The node's id, as its certificate says.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The time by which certificates are judged.
    pub fn time(&self) -> &Arc<TlsTime> {
        &self.time
    }

    /// By what answers of controllers of the same CA are known.
    pub fn ca(&self) -> CaHint {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner).ca.clone()
    }

    /// Takes the time that an authenticated controller told, microseconds since 1970, and remembers it for the next
    /// boot.
    pub fn learn_time(&self, told: i64) {
        self.time.advance(told);
        let path = self.directory.join(TIME_FILE);
        let remembered: Option<i64> = read(&path).ok().flatten().and_then(|text| text.trim().parse().ok());
        if remembered.is_none_or(|before| told.saturating_sub(before) > REMEMBER_EVERY_MICROS) {
            let written = durable::replace(&path, format!("{told}\n").as_bytes(), PUBLIC_MODE);
            if let Err(error) = written {
                tracing::warn!(error = %error, "time not remembered");
            }
        }
    }

    /// Opens a connection to the controller at `address` (host:port), whose certificate must name
    /// `controller.marco.internal` under the stored CA, whatever address that is.
    pub async fn connect(&self, address: &str, purpose: Purpose) -> Result<Channel, IdentityError> {
        let tls = self.credentials.read().unwrap_or_else(PoisonError::into_inner).tls.clone();
        tls::connect(address, tls, purpose).await
    }

    /// When the certificate should be renewed, from now: at half its life, spread over a tenth of it.
    fn renewal_in(&self) -> Duration {
        let (from, to) = {
            let credentials = self.credentials.read().unwrap_or_else(PoisonError::into_inner);
            (credentials.not_before, credentials.not_after)
        };
        let life = to.saturating_sub(from);
        let due = from.saturating_add(life / 2);
        let wait = u64::try_from(due.saturating_sub(self.time.now_micros())).unwrap_or(0);
        let spread = u64::try_from(life / 10).unwrap_or(0);
        Duration::from_micros(wait).saturating_add(if wait == 0 {
            Duration::ZERO
        } else {
            crate::backoff::full_jitter(Duration::from_micros(spread))
        })
    }

    /// Keeps the certificate fresh until `stop`. `listeners` tells the enrolment listeners, host:port, in order.
    pub async fn keep_fresh(&self, listeners: impl Fn() -> Vec<String>, stop: &CancellationToken) {
        /// Long waits are cut up: a suspended machine's monotonic clock may have stood still.
        const LOOK_AGAIN: Duration = Duration::from_secs(60 * 60);
        /// The longest pause between two tries.
        const MAX_PAUSE: Duration = Duration::from_secs(60 * 60);
        let mut tries: u32 = 0;
        let mut due = self.renewal_in();
        loop {
            let slice = due.min(LOOK_AGAIN);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(slice) => {}
            }
            due = due.saturating_sub(slice);
            if !due.is_zero() {
                // The controller may have told a later time since.
                due = due.min(self.renewal_in());
                continue;
            }
            match self.renew(&listeners()).await {
                Ok(()) => {
                    tries = 0;
                    tracing::info!(node = %self.node, "certificate renewed");
                    due = self.renewal_in().max(Duration::from_secs(1));
                }
                Err(error) => {
                    tries = tries.saturating_add(1);
                    let ceiling = Duration::from_secs(5).saturating_mul(1_u32.checked_shl(tries.min(16)).unwrap_or(1));
                    due = crate::backoff::full_jitter(ceiling.min(MAX_PAUSE)).max(Duration::from_secs(1));
                    tracing::warn!(node = %self.node, error = %error, "certificate not renewed");
                }
            }
        }
    }

    /// Renews the certificate at the first listener that answers.
    pub async fn renew(&self, listeners: &[String]) -> Result<(), IdentityError> {
        let certificate = self.credentials.read().unwrap_or_else(PoisonError::into_inner).certificate_pem.clone();
        let key = read_needed(&self.directory.join(KEY_FILE))?;
        let ca = read_needed(&self.directory.join(CA_FILE))?;
        let fresh = enroll::renew(listeners, &certificate, &key, &ca, &self.time).await?;
        // It must be for the same key, from the same CA and for the same node before it takes the old one's place.
        let credentials = credentials(&self.directory, fresh.clone(), &self.time)?;
        let node = tls::common_name(&credentials.leaf)?;
        if node != self.node {
            return Err(IdentityError::invalid("the new certificate", format!("it is for the node {node}")));
        }
        let path = self.directory.join(CERTIFICATE_FILE);
        durable::replace(&path, fresh.as_bytes(), PUBLIC_MODE).map_err(IdentityError::io("write", &path))?;
        *self.credentials.write().unwrap_or_else(PoisonError::into_inner) = credentials;
        Ok(())
    }
}

/// Checks a certificate against key and CA in `directory`, and makes what connections need of them.
fn credentials(directory: &Path, certificate_pem: String, time: &Arc<TlsTime>) -> Result<Credentials, IdentityError> {
    let ca_pem = read_needed(&directory.join(CA_FILE))?;
    let key_pem = read_needed(&directory.join(KEY_FILE))?;
    let invalid = |what: &str| {
        let what = directory.join(what).display().to_string();
        move |error: rustls::pki_types::pem::Error| IdentityError::invalid(what, error)
    };
    let leaf = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(invalid(CERTIFICATE_FILE))?;
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(invalid(CA_FILE))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(invalid(KEY_FILE))?;
    let (not_before, not_after) = tls::validity(&leaf)?;
    time.advance(not_before);
    time.advance(tls::validity(&ca)?.0);
    tls::check_issued(&leaf, &ca, time)?;
    let hint = CaHint::of(&tls::spki_sha256(&ca)?);
    let tls = tls::node_config(leaf.clone(), key, ca, time)?;
    Ok(Credentials { certificate_pem, leaf, tls, ca: hint, not_before, not_after })
}

fn read(path: &Path) -> Result<Option<String>, IdentityError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(IdentityError::io("read", path)(error)),
    }
}

fn read_needed(path: &Path) -> Result<String, IdentityError> {
    std::fs::read_to_string(path).map_err(IdentityError::io("read", path))
}

/// The pin of a CA, as tokens carry it.
#[cfg(test)]
pub(crate) fn pin_of(ca: &CertificateDer<'_>) -> [u8; 32] {
    tls::spki_sha256(ca).unwrap()
}

#[cfg(test)]
mod tests;
