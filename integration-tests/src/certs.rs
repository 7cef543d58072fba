//! Certificates that a test needs and the controller has no command for: other roles, and nodes made by hand.

use std::path::Path;

use anyhow::{Context as _, Result};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, PublicKeyData as _, SigningKey as _};
use sha2::{Digest as _, Sha256};

use crate::client::Credentials;

/// Issues a certificate for a user in a role, as the controller's CA would, and answers its credentials.
///
/// The subject is the one that the controller writes: the user's name as CN, the role as OU.
pub fn issue(ca_certificate: &Path, ca_key: &Path, user: &str, role: &str) -> Result<Credentials> {
    let ca = std::fs::read_to_string(ca_certificate).context("the CA's certificate")?;
    let key = std::fs::read_to_string(ca_key).context("the CA's key")?;
    let issuer = Issuer::from_ca_cert_pem(&ca, KeyPair::from_pem(&key)?)?;
    sign(&issuer, &ca, user, role)
}

/// Credentials of the same shape, but from a CA that nobody knows.
pub fn stranger(ca: &str, user: &str, role: &str) -> Result<Credentials> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = Issuer::new(params, key);
    sign(&issuer, ca, user, role)
}

/// A certificate of the controller's CA that expired years ago.
pub fn expired(ca_certificate: &Path, ca_key: &Path, user: &str, role: &str) -> Result<Credentials> {
    let ca = std::fs::read_to_string(ca_certificate).context("the CA's certificate")?;
    let key = std::fs::read_to_string(ca_key).context("the CA's key")?;
    let issuer = Issuer::from_ca_cert_pem(&ca, KeyPair::from_pem(&key)?)?;
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2021, 1, 1));
    sign_with(params, &issuer, &ca, user, role)
}

fn sign(issuer: &Issuer<'_, KeyPair>, ca: &str, user: &str, role: &str) -> Result<Credentials> {
    sign_with(CertificateParams::default(), issuer, ca, user, role)
}

fn sign_with(
    mut params: CertificateParams,
    issuer: &Issuer<'_, KeyPair>,
    ca: &str,
    user: &str,
    role: &str,
) -> Result<Credentials> {
    let key = KeyPair::generate()?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, user);
    params.distinguished_name.push(DnType::OrganizationalUnitName, role);
    params.insert_extended_key_usage(ExtendedKeyUsagePurpose::ClientAuth);
    let certificate = params.signed_by(&key, issuer)?;
    Ok(Credentials { ca: ca.to_owned(), identity: Some((certificate.pem(), key.serialize_pem())) })
}

/// A node's key that signs requests.
#[derive(Debug)]
pub struct NodeKey(KeyPair);

/// A certificate signing request: as PEM, and its DER signed.
#[derive(Debug)]
pub struct SigningRequest {
    /// PKCS#10, PEM.
    pub pem: String,
    /// ECDSA P-256 with SHA-256 over the DER, ASN.1.
    pub signature: Vec<u8>,
}

impl NodeKey {
    /// A fresh key.
    pub fn generate() -> Result<Self> {
        Ok(Self(KeyPair::generate()?))
    }

    /// A key that a node has written.
    pub fn read(path: &Path) -> Result<Self> {
        let pem = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self(KeyPair::from_pem(&pem)?))
    }

    /// A request to certify `subject`, signed over by `signer`, which is the old key when a certificate is renewed.
    pub fn request(&self, signer: &Self) -> Result<SigningRequest> {
        let request = CertificateParams::default().serialize_request(&self.0)?;
        Ok(SigningRequest { pem: request.pem()?, signature: signer.0.sign(request.der())? })
    }

    /// SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal: its fingerprint.
    pub fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(self.0.subject_public_key_info()))
    }

    /// The key, PEM.
    pub fn pem(&self) -> String {
        self.0.serialize_pem()
    }
}
