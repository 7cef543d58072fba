//! Certificates that the controller has no command for: other roles, expired ones, and nodes made by hand.

use std::path::Path;

use anyhow::{Context as _, Result};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, PublicKeyData as _, SigningKey as _};
use sha2::{Digest as _, Sha256};

use crate::client::Credentials;

/// Issues a user's certificate in a role, signed by the controller's CA, and returns its credentials.
///
/// The subject has the controller's format: CN is the user's name, OU the role.
pub fn issue(ca_certificate: &Path, ca_key: &Path, user: &str, role: &str) -> Result<Credentials> {
    let ca = std::fs::read_to_string(ca_certificate).context("the CA's certificate")?;
    let key = std::fs::read_to_string(ca_key).context("the CA's key")?;
    let issuer = Issuer::from_ca_cert_pem(&ca, KeyPair::from_pem(&key)?)?;
    sign(&issuer, &ca, user, role)
}

/// Credentials of the same shape, signed by an unknown CA. `ca`: the real CA, so that the client trusts the controller.
pub fn stranger(ca: &str, user: &str, role: &str) -> Result<Credentials> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    // A CA in all respects but one: nobody trusts it.
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = Issuer::new(params, key);
    sign(&issuer, ca, user, role)
}

/// Credentials signed by the controller's CA that expired in 2021.
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
    // rcgen puts a name of its own there by default.
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, user);
    params.distinguished_name.push(DnType::OrganizationalUnitName, role);
    params.insert_extended_key_usage(ExtendedKeyUsagePurpose::ClientAuth);
    let certificate = params.signed_by(&key, issuer)?;
    Ok(Credentials { ca: ca.to_owned(), identity: Some((certificate.pem(), key.serialize_pem())) })
}

/// A node's key pair, to sign certificate requests.
#[derive(Debug)]
pub struct NodeKey(KeyPair);

/// A certificate signing request, with a signature over its DER.
#[derive(Debug)]
pub struct SigningRequest {
    /// PKCS#10, PEM.
    pub pem: String,
    /// ECDSA P-256 with SHA-256 over the DER, ASN.1. The signer is the old key if a certificate is renewed.
    pub signature: Vec<u8>,
}

impl NodeKey {
    /// Generates a fresh key.
    pub fn generate() -> Result<Self> {
        Ok(Self(KeyPair::generate()?))
    }

    /// Reads a key that a node has written (PEM).
    pub fn read(path: &Path) -> Result<Self> {
        let pem = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self(KeyPair::from_pem(&pem)?))
    }

    /// A key in PEM.
    pub fn parse(pem: &str) -> Result<Self> {
        Ok(Self(KeyPair::from_pem(pem)?))
    }

    /// A certificate request for `self`, signed over by `signer`: the old key for a renewal, otherwise `self`.
    pub fn request(&self, signer: &Self) -> Result<SigningRequest> {
        let request = CertificateParams::default().serialize_request(&self.0)?;
        Ok(SigningRequest { pem: request.pem()?, signature: signer.0.sign(request.der())? })
    }

    /// The key's fingerprint: SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal.
    pub fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(self.0.subject_public_key_info()))
    }

    /// The private key, PEM.
    pub fn pem(&self) -> String {
        self.0.serialize_pem()
    }
}
