//! Identity of the node: a key that is made here and never leaves, a certificate for it, and the CA that both sides
//! trust.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::Channel;

use crate::discovery::CaHint;
use crate::durable;

mod enroll;
mod join;
mod keys;
mod pace;
mod renewal;
mod time;
mod tls;
mod token;
mod watched;

pub use enroll::{Enrollment, enroll};
pub use join::{JoinError, JoinFile};
use keys::Pair;
pub use renewal::KeyPolicy;
pub use time::TlsTime;
pub use tls::Purpose;
pub use token::{InvalidToken, JoinToken};
use watched::{Refusals, Told};

const KEY_FILE: &str = "node.key";
const CERTIFICATE_FILE: &str = "node.crt";
const CA_FILE: &str = "ca.crt";
/// File with the last time that a controller told, microseconds since 1970.
const TIME_FILE: &str = "time";
const SECRET_MODE: u32 = 0o600;
const PUBLIC_MODE: u32 = 0o644;
/// Step in which the remembered time is written again: certificates do not need minutes, and the card is spared.
const REMEMBER_EVERY_MICROS: i64 = 60 * 60 * 1_000_000;

/// The board as described in enrolment and session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Board {
    /// Model from the device tree. Empty: unknown.
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
    /// The board in the wire format.
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
        /// The operation that failed, as a verb: `read`, `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A key or certificate is invalid.
    #[error("{what} cannot be used: {why}")]
    Invalid {
        /// The invalid thing.
        what: String,
        /// The reason.
        why: String,
    },
    /// The controller could not be reached, or proved to be another one.
    #[error("cannot connect to {address}: {why}")]
    Connect {
        /// Address, host:port. Empty: no address is known.
        address: String,
        /// The reason, with its causes.
        why: String,
        /// True if the other side answered and proved to be of another CA.
        foreign: bool,
    },
    /// The controller refused the request.
    #[error("the controller refuses: {message}")]
    Refused {
        /// The controller's message.
        message: String,
        /// True if a retry may succeed.
        retryable: bool,
        /// True if the request itself is wrong, its name for example. Only another request can succeed.
        permanent: bool,
    },
    /// The node has neither an identity nor a join token.
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

    /// True if neither time nor network can help: the request is impossible, or the controller is of another CA.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Connect { foreign, .. } => *foreign,
            Self::Refused { permanent, .. } => *permanent,
            Self::Io { .. } | Self::Invalid { .. } | Self::NoToken => false,
        }
    }

    /// True if the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::Refused { retryable, .. } => *retryable,
            Self::Io { .. } | Self::Invalid { .. } | Self::NoToken => false,
        }
    }
}

/// A certificate and its derived values.
struct Credentials {
    pair: Pair,
    leaf: CertificateDer<'static>,
    tls: Arc<ClientConfig>,
    ca: CaHint,
    /// Validity, microseconds since 1970.
    not_before: i64,
    not_after: i64,
}

/// The certificate that the node shows now, and the one that it can show instead.
struct Held {
    present: Credentials,
    /// The previous or the next pair, until the next one was used.
    other: Option<Credentials>,
}

/// The identity of an enrolled node.
pub struct Identity {
    directory: PathBuf,
    node: String,
    time: Arc<TlsTime>,
    held: RwLock<Held>,
    /// Refusals of certificates because of the time.
    refusals: Arc<Refusals>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the identity in `directory`. `None`: the node is not enrolled.
    pub fn load(directory: &Path, time: Arc<TlsTime>) -> Result<Option<Self>, IdentityError> {
        let mut usable = Vec::new();
        // The next pair comes first. If it is damaged, the pair before still opens sessions.
        for pair in keys::pairs(directory)? {
            let is_next = pair.is_next;
            match credentials(directory, pair, &time) {
                Ok(found) => usable.push(found),
                Err(error) if is_next => tracing::warn!(error = %error, "next certificate not usable"),
                Err(error) if usable.is_empty() => return Err(error),
                Err(error) => tracing::warn!(error = %error, "certificate before the next one not usable"),
            }
        }
        let mut usable = usable.into_iter();
        let Some(present) = usable.next() else { return Ok(None) };
        let node = tls::common_name(&present.leaf)?;
        if let Some(told) = read(&directory.join(TIME_FILE))?.and_then(|text| text.trim().parse::<i64>().ok()) {
            // The file may hold a wrong controller's future: never past the certificate's end.
            time.advance(told.min(present.not_after));
        }
        let held = RwLock::new(Held { present, other: usable.next() });
        Ok(Some(Self { directory: directory.to_owned(), node, time, held, refusals: Arc::default() }))
    }

    /// The node's id, from its certificate.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The time by which certificates are judged.
    pub fn time(&self) -> &Arc<TlsTime> {
        &self.time
    }

    fn held(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn held_mut(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hint by which answers of controllers of the same CA are recognised.
    pub fn ca(&self) -> CaHint {
        self.held().present.ca.clone()
    }

    /// Takes the time told by a controller that accepted this node's certificate, microseconds since 1970, and
    /// remembers it for the next boot. By that controller's clock the certificate is valid, so a time outside its
    /// validity is not believed.
    pub fn learn_time(&self, told: i64) {
        let told = {
            let held = self.held();
            told.clamp(held.present.not_before, held.present.not_after)
        };
        self.believe(told);
    }

    /// Takes a time that an authenticated controller vouched for, and remembers it.
    fn believe(&self, now: i64) {
        self.time.set(now);
        let path = self.directory.join(TIME_FILE);
        let remembered: Option<i64> = read(&path).ok().flatten().and_then(|text| text.trim().parse().ok());
        if remembered.is_none_or(|before| now.saturating_sub(before).abs() > REMEMBER_EVERY_MICROS) {
            let written = durable::replace(&path, format!("{now}\n").as_bytes(), PUBLIC_MODE);
            if let Err(error) = written {
                tracing::warn!(error = %error, "time not remembered");
            }
        }
    }

    /// Opens a connection to the controller at `address` (host:port). Its certificate must name
    /// `controller.marco.internal` under the stored CA, whatever that address is.
    pub async fn connect(&self, address: &str, purpose: Purpose) -> Result<Channel, IdentityError> {
        let (tls, shown) = {
            let held = self.held();
            (held.present.tls.clone(), held.present.leaf.clone())
        };
        let told = Told { refusals: Arc::clone(&self.refusals), shown };
        tls::connect(address, tls, purpose, Some(told)).await
    }
}

/// Checks a certificate against its key and the CA in `directory`, and derives the values for connections.
fn credentials(directory: &Path, pair: Pair, time: &Arc<TlsTime>) -> Result<Credentials, IdentityError> {
    let ca_pem = read_needed(&directory.join(CA_FILE))?;
    let invalid = |what: &str| {
        let what = directory.join(what).display().to_string();
        move |error: rustls::pki_types::pem::Error| IdentityError::invalid(what, error)
    };
    let leaf = CertificateDer::from_pem_slice(pair.certificate.as_bytes()).map_err(invalid(CERTIFICATE_FILE))?;
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(invalid(CA_FILE))?;
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(invalid(KEY_FILE))?;
    let (not_before, not_after) = tls::validity(&leaf)?;
    tls::check_issued(&leaf, &ca, time)?;
    // Only a date that the CA signed proves that a time has passed.
    time.advance(not_before);
    time.advance(tls::validity(&ca)?.0);
    let hint = CaHint::of(&tls::spki_sha256(&ca)?);
    let tls = tls::node_config(leaf.clone(), key, ca, time)?;
    Ok(Credentials { pair, leaf, tls, ca: hint, not_before, not_after })
}

fn read(path: &Path) -> Result<Option<String>, IdentityError> {
    match durable::read_text(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(IdentityError::io("read", path)(error)),
    }
}

fn read_needed(path: &Path) -> Result<String, IdentityError> {
    durable::read_text(path).map_err(IdentityError::io("read", path))
}

/// The pin of a CA, as in tokens.
#[cfg(test)]
pub(crate) fn pin_of(ca: &CertificateDer<'_>) -> [u8; 32] {
    tls::spki_sha256(ca).unwrap()
}

#[cfg(test)]
mod tests;
