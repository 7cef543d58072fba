//! A CA with certificates for a controller and an operator, in the layout of `marco-controller serve`.

use std::path::{Path, PathBuf};

use marco_proto::names::CONTROLLER_TLS_NAME;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

/// A temporary folder of certificates.
pub(crate) struct Certificates {
    folder: TempDir,
    /// PEM of the CA.
    pub(crate) ca: String,
    /// PEM of the controller's certificate and key.
    pub(crate) controller: (String, String),
}

impl Certificates {
    pub(crate) fn mint() -> Self {
        let folder = TempDir::new().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let leaf = |names: Vec<String>| {
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &ca).unwrap();
            (certificate.pem(), key.serialize_pem())
        };
        let controller = leaf(vec![CONTROLLER_TLS_NAME.to_owned()]);
        let admin = leaf(vec!["admin".to_owned()]);
        write(folder.path(), "ca.crt", &ca.pem());
        write(folder.path(), "admin.crt", &admin.0);
        write(folder.path(), "admin.key", &admin.1);
        Self { folder, ca: ca.pem(), controller }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }
}

fn write(folder: &Path, file: &str, text: &str) {
    std::fs::write(folder.join(file), text).unwrap();
}
