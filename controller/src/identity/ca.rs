//! The certificate authority, and the files that `serve` creates on its first start.

mod files;
mod request;
mod window;

use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Datelike as _, TimeDelta, Utc};
use marco_proto::names::{CONTROLLER_TLS_NAME, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SerialNumber, SubjectPublicKeyInfo, date_time_ymd,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::roles::Role;
use crate::calendar::{earlier, later};
pub use files::Pki;
use window::Window;
pub use window::WrongClock;

/// Validity of the CA's certificate: longer than the life of the cards that carry it.
const CA_LIFE: TimeDelta = TimeDelta::days(3650);
/// Validity of the certificates of the controller and of users.
const YEAR: TimeDelta = TimeDelta::days(365);
/// Validity of a node's certificate, which is renewed at half of it.
const NODE_LIFE: TimeDelta = TimeDelta::days(30);
/// Validity for one call to another controller, which may take a while to accept it.
const PEER_LIFE: TimeDelta = TimeDelta::hours(1);
/// Time by which certificates are backdated, for clocks that are behind.
const BACKDATED: TimeDelta = TimeDelta::hours(24);

/// Errors of the PKI.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Only one half of the CA is there.
    #[error(
        "found {found} but not {missing}: a CA needs both. Restore the missing one from a backup; if the certificates \
         are somebody else's, name a folder for this controller's own with --certs DIR"
    )]
    HalfThere {
        /// The half that exists.
        found: PathBuf,
        /// The missing half.
        missing: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// The verb: `read`, `write` ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file has the wrong content.
    #[error("{} is unusable: {what}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Its defect.
        what: String,
    },
    /// A certificate cannot be made.
    #[error("cannot issue a certificate")]
    Issue(#[from] rcgen::Error),
    /// The system has no random numbers.
    #[error("the system gives no random numbers")]
    Random(#[from] getrandom::Error),
    /// A time cannot be written in a certificate.
    #[error("the time {0} cannot stand in a certificate")]
    Time(DateTime<Utc>),
    /// Certificates issued at this time would be valid for nobody.
    #[error(transparent)]
    Clock(#[from] WrongClock),
}

/// Errors in a node's request.
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
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    spki_sha256: [u8; 32],
    signs: Window,
}

impl Ca {
    /// A new authority; the second value is its key, PEM.
    fn mint(now: DateTime<Utc>, built: DateTime<Utc>) -> Result<(Self, String), PkiError> {
        // A CA of 1970 would be expired at once, and every card with its pin would be useless.
        Window::before_ca(built).check(now)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let key_pem = key.serialize_pem();
        let (serial, text) = random_serial()?;
        let mut params = CertificateParams::default();
        // Each authority has a name of its own, because some programs compare names only.
        params.distinguished_name = rcgen::DistinguishedName::new();
        let tag: String = text.chars().rev().take(8).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Marco Bootstrap CA {tag}"));
        params.serial_number = Some(serial);
        valid(&mut params, earlier(now, BACKDATED), later(now, CA_LIFE))?;
        // Leaves only: no authority below this one.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        let pem = certificate.pem();
        let spki_sha256 = Sha256::digest(key.subject_public_key_info()).into();
        let ca = Self {
            signs: Window::of(certificate.der(), built),
            certificate: certificate.der().clone(),
            certificate_pem: pem,
            issuer: Issuer::new(params, key),
            spki_sha256,
        };
        Ok((ca, key_pem))
    }

    /// Loads an authority; `built` is the time at which this program was built. The error says what is wrong.
    pub(crate) fn load(certificate_pem: &str, key_pem: &str, built: DateTime<Utc>) -> Result<Self, String> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|err| format!("no certificate can be read from it ({err})"))?;
        let key = KeyPair::from_pem(key_pem).map_err(|err| format!("no key can be read ({err})"))?;
        let spki = key.subject_public_key_info();
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|err| format!("it is malformed ({err})"))?;
        // Otherwise every certificate that it issues fails at the clients, far from the cause.
        if parsed.public_key().raw != spki {
            return Err("its key is not the CA's key".to_owned());
        }
        // A leaf would sign certificates that every verifier refuses.
        if !parsed.is_ca() {
            return Err("it is no CA's certificate".to_owned());
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|err| format!("it is unusable ({err})"))?;
        Ok(Self {
            issuer,
            certificate_pem: certificate_pem.to_owned(),
            spki_sha256: Sha256::digest(&spki).into(),
            signs: Window::of(&certificate, built),
            certificate: certificate.clone().into_owned(),
        })
    }

    /// The CA's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The CA's certificate, DER.
    pub fn certificate_der(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// End of the validity of the CA's certificate; `None`: it cannot be read.
    pub fn expire_time(&self) -> Option<DateTime<Utc>> {
        window::validity(&self.certificate).map(|(_, until)| until)
    }

    /// Checks that the clock can be right. While it cannot, nothing is signed.
    ///
    /// # Errors
    /// Returns an error if the clock cannot be right.
    pub fn check_clock(&self, now: DateTime<Utc>) -> Result<(), WrongClock> {
        self.signs.check(now)
    }

    /// SHA-256 of the CA's SubjectPublicKeyInfo: the pin in join tokens.
    pub fn spki_sha256(&self) -> [u8; 32] {
        self.spki_sha256
    }

    /// The key of a signing request: SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal. The request's
    /// signature is verified, and its key must be P-256.
    ///
    /// # Errors
    /// Returns an error if the request is unusable.
    pub fn key_of_request(csr_pem: &str) -> Result<String, RequestError> {
        let spki = request::public_key(&request_der(csr_pem)?)?;
        Ok(hex::encode(Sha256::digest(spki)))
    }

    /// A certificate for a node, for 30 days. Of the request only the public key is used.
    ///
    /// # Errors
    /// Returns an error if the request is unusable.
    pub fn issue_node(&self, csr_pem: &str, node: &NodeId, now: DateTime<Utc>) -> Result<Issued, RequestError> {
        let spki = request::public_key(&request_der(csr_pem)?)?;
        // The caller's name and role are the controller's to give: a request could claim any.
        let key = SubjectPublicKeyInfo::from_der(&spki).map_err(PkiError::from)?;
        Ok(self.issue(client(node.as_str(), Role::Node), &key, NODE_LIFE, now)?)
    }

    /// A certificate for a person or a service that keeps its own key. Of the request only the public key is used.
    ///
    /// # Errors
    /// Returns an error if the request is unusable.
    pub fn certify_user(
        &self,
        csr_pem: &str,
        name: &str,
        role: Role,
        life: TimeDelta,
        now: DateTime<Utc>,
    ) -> Result<Issued, RequestError> {
        let spki = request::public_key(&request_der(csr_pem)?)?;
        let key = SubjectPublicKeyInfo::from_der(&spki).map_err(PkiError::from)?;
        Ok(self.issue(client(name, role), &key, life, now)?)
    }

    /// A certificate and a new key for a person or a service, for a year. The second value is the key, PEM.
    ///
    /// # Errors
    /// Returns an error if it cannot be made.
    pub fn issue_user(&self, name: &str, role: Role, now: DateTime<Utc>) -> Result<(Issued, String), PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        Ok((self.issue(client(name, role), &key, YEAR, now)?, key.serialize_pem()))
    }

    /// A certificate and a new key with which this controller calls another one, for an hour. The second value is the
    /// key, PEM.
    ///
    /// # Errors
    /// Returns an error if it cannot be made.
    pub fn issue_peer(&self, now: DateTime<Utc>) -> Result<(Issued, String), PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        Ok((self.issue(client(CONTROLLER_TLS_NAME, Role::Controller), &key, PEER_LIFE, now)?, key.serialize_pem()))
    }

    /// A certificate and a new key for the controller. The second value is the key, PEM.
    fn issue_controller(&self, names: &[String], now: DateTime<Utc>) -> Result<(Issued, String), PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        // rcgen turns names that are IP addresses into address entries.
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, CONTROLLER_TLS_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        Ok((self.issue(params, &key, YEAR, now)?, key.serialize_pem()))
    }

    /// Checks a node's request for renewal: the old certificate (of this CA, expired at most 400 days ago) and the
    /// signature over the DER of the signing request by its key.
    ///
    /// # Errors
    /// Returns the first defect.
    pub fn verify_renewal(
        &self,
        certificate_pem: &str,
        csr_pem: &str,
        signature: &[u8],
        now: DateTime<Utc>,
    ) -> Result<RenewalProof, RequestError> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|_| RequestError::Certificate("it is no PEM certificate"))?;
        request::verify_renewal(&self.certificate, &certificate, &request_der(csr_pem)?, signature, now)
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        key: &impl PublicKeyData,
        life: TimeDelta,
        now: DateTime<Utc>,
    ) -> Result<Issued, PkiError> {
        self.check_clock(now)?;
        let (serial_number, serial) = random_serial()?;
        // Certificates hold whole seconds, and the record must show the same times.
        let (not_before, not_after) = (whole_seconds(earlier(now, BACKDATED))?, whole_seconds(later(now, life))?);
        params.serial_number = Some(serial_number);
        valid(&mut params, not_before, not_after)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key_sha256 = hex::encode(Sha256::digest(key.subject_public_key_info()));
        let pem = params.signed_by(key, &self.issuer)?.pem();
        Ok(Issued { pem, serial, key_sha256, not_before, not_after })
    }
}

/// Parameters of a client's certificate: the common name is its name, the organizational unit its role.
fn client(name: &str, role: Role) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationalUnitName, role.as_str());
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn request_der(csr_pem: &str) -> Result<CertificateSigningRequestDer<'static>, RequestError> {
    CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
        .map_err(|_| RequestError::Request("it is no PEM certificate request".to_owned()))
}

/// A serial number of 126 random bits. The first byte is 0x40 to 0x7f: positive, and always 16 bytes and 32 digits
/// long.
fn random_serial() -> Result<(SerialNumber, String), PkiError> {
    let mut bytes = [0_u8; 16];
    // Random and not counted: several controllers issue certificates without asking each other.
    getrandom::fill(&mut bytes)?;
    let [first, ..] = &mut bytes;
    *first = (*first & 0x3f) | 0x40;
    Ok((SerialNumber::from_slice(&bytes), hex::encode(bytes)))
}

fn whole_seconds(at: DateTime<Utc>) -> Result<DateTime<Utc>, PkiError> {
    DateTime::from_timestamp(at.timestamp(), 0).ok_or(PkiError::Time(at))
}

/// Sets a validity. A certificate can hold times from 1970 to 9999.
fn valid(params: &mut CertificateParams, from: DateTime<Utc>, until: DateTime<Utc>) -> Result<(), PkiError> {
    let time = |at: DateTime<Utc>| {
        let seconds = u64::try_from(at.timestamp()).ok().filter(|_| at.year() <= 9999).ok_or(PkiError::Time(at))?;
        Ok::<_, PkiError>(date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds))
    };
    (params.not_before, params.not_after) = (time(from)?, time(until)?);
    Ok(())
}

#[cfg(test)]
mod tests;
