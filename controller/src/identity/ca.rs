//! The certificate authority, and the files that `serve` makes on its first start.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::roles::Role;

/// Why the PKI cannot be used or a certificate not be issued.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Only one half of the CA is there.
    #[error("found {found} but not {missing}: a CA needs both; restore the missing one, or remove the other to mint a new CA, which every node must then join anew")]
    HalfThere {
        /// The half that exists.
        found: PathBuf,
        /// The other one.
        missing: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `read`, `write` ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is unusable: {what}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A certificate cannot be made.
    #[error("cannot issue a certificate")]
    Issue(#[from] rcgen::Error),
    /// The system has no random numbers.
    #[error("the system gives no random numbers")]
    Random(#[from] getrandom::Error),
    /// A time is outside what a certificate can say.
    #[error("the time {0} cannot stand in a certificate")]
    Time(DateTime<Utc>),
}

/// What is wrong with what a node sent.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not a usable signing request.
    #[error("the certificate request is unusable: {0}")]
    Request(String),
    /// Not a certificate of this CA, or not a node's, or expired too long ago.
    #[error("the old certificate is not acceptable: {0}")]
    Certificate(&'static str),
    /// The signature over the signing request is not by the old certificate's key.
    #[error("the signature over the certificate request does not match the old certificate's key")]
    Signature,
    /// The certificate could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// An issued leaf certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// PEM.
    pub pem: String,
    /// Serial number, 32 lower-case hexadecimal digits.
    pub serial: String,
    /// SHA-256 of the SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
    /// Valid from (backdated).
    pub not_before: DateTime<Utc>,
    /// Valid until.
    pub not_after: DateTime<Utc>,
}

/// A node that asked for a new certificate and proved to hold the key of its old one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenewalProof {
    /// The node, from the old certificate.
    pub node: NodeId,
    /// The old certificate's serial number, lower-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the old certificate's SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
}

/// The certificate authority.
pub struct Ca {
    _todo: (),
}

impl Ca {
    /// The CA's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        todo!()
    }

    /// SHA-256 of the CA's SubjectPublicKeyInfo: the pin in join tokens.
    pub fn spki_sha256(&self) -> [u8; 32] {
        todo!()
    }

    /// The key of a signing request: SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal. The request's
    /// signature is verified, and its key must be P-256.
    ///
    /// # Errors
    /// When the request is unusable.
    pub fn key_of_request(csr_pem: &str) -> Result<String, RequestError> {
        todo!("{csr_pem}")
    }

    /// A certificate for a node, for 30 days. Of the request only the public key is used.
    ///
    /// # Errors
    /// When the request is unusable.
    pub fn issue_node(&self, csr_pem: &str, node: &NodeId, now: DateTime<Utc>) -> Result<Issued, RequestError> {
        todo!("{csr_pem} {node} {now}")
    }

    /// A certificate and a new key for a person or a service, for a year. The second value is the key, PEM.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn issue_user(&self, name: &str, role: Role, now: DateTime<Utc>) -> Result<(Issued, String), PkiError> {
        todo!("{name} {role} {now}")
    }

    /// Checks a node's request for renewal: the old certificate (of this CA, expired at most 400 days ago) and the
    /// signature over the DER of the signing request by its key.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify_renewal(
        &self,
        certificate_pem: &str,
        csr_pem: &str,
        signature: &[u8],
        now: DateTime<Utc>,
    ) -> Result<RenewalProof, RequestError> {
        todo!("{certificate_pem} {csr_pem} {signature:?} {now}")
    }
}

/// The CA with the controller's own certificate.
pub struct Pki {
    /// The authority.
    pub ca: Ca,
    /// True when the CA was minted by this start.
    pub minted: bool,
}

impl Pki {
    /// Loads the CA and the controller's certificate, or mints them when there is nothing yet, with a certificate for an
    /// admin. The controller's certificate is issued again when it lacks a name or has 30 days left.
    ///
    /// # Errors
    /// When only one of the CA's halves is there, or a file is unusable.
    pub fn open(data_dir: &Path, certs_dir: &Path, names: &[String], now: DateTime<Utc>) -> Result<Self, PkiError> {
        todo!("{data_dir:?} {certs_dir:?} {names:?} {now}")
    }

    /// Issues the controller's certificate again when it is due, as [`Pki::open`] does; true when it did.
    ///
    /// # Errors
    /// When it cannot be issued or written.
    pub fn refresh(&mut self, now: DateTime<Utc>) -> Result<bool, PkiError> {
        todo!("{now}")
    }

    /// The addresses that every controller certificate carries besides its names.
    pub fn addresses() -> [IpAddr; 2] {
        [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]
    }
}
