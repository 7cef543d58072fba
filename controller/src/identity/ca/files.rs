//! The files of the PKI: the CA's key in the data directory, certificates and other keys in the folder for operators.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::CONTROLLER_TLS_NAME;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::super::roles::Role;
use super::{Ca, PkiError};

/// Remaining validity at which the controller's certificate is issued again.
const RENEW_BEFORE: TimeDelta = TimeDelta::days(30);
/// Mode of keys: for the controller's user alone.
const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// The CA with the controller's own certificate.
pub struct Pki {
    /// The authority, which does not change while the process runs.
    pub ca: Arc<Ca>,
    /// True if this start minted the CA.
    pub minted: bool,
    certs_dir: PathBuf,
    names: BTreeSet<String>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Pki {
    /// Loads the CA and the controller's certificate. If there is no CA, it mints one, with a certificate for an admin.
    /// The controller's certificate is issued again if it lacks a name, is not valid yet, or has 30 days left.
    ///
    /// # Errors
    /// Returns an error if only one half of the CA is there, if a file is unusable, or if the clock cannot be right.
    pub fn open(
        data_dir: &Path,
        certs_dir: &Path,
        names: &[String],
        now: DateTime<Utc>,
        built: DateTime<Utc>,
    ) -> Result<Self, PkiError> {
        let key_path = data_dir.join("pki").join("ca.key");
        let certificate_path = certs_dir.join("ca.crt");
        let (key_there, certificate_there) = (exists(&key_path)?, exists(&certificate_path)?);
        let (ca, minted) = match (key_there, certificate_there) {
            (false, false) => (mint(&key_path, &certificate_path, now, built)?, true),
            // Minting over the remaining half would cut off every node that trusts it.
            (true, false) => return Err(PkiError::HalfThere { found: key_path, missing: certificate_path }),
            (false, true) => return Err(PkiError::HalfThere { found: certificate_path, missing: key_path }),
            (true, true) => {
                let ca = Ca::load(&read(&certificate_path)?, &read(&key_path)?, built)
                    .map_err(|what| PkiError::Unusable { path: certificate_path, what })?;
                // Checked even if nothing has to be signed now: with a wrong clock, peers with the right time would be
                // refused.
                ca.check_clock(now)?;
                (ca, false)
            }
        };
        let names = all_names(names);
        let kept = if minted { None } else { load_controller(&ca, certs_dir, &names, now)? };
        let (certificate, key) = match kept {
            Some(kept) => kept,
            None => issue_controller(&ca, certs_dir, &names, now)?,
        };
        if minted {
            let (admin, admin_key) = ca.issue_user("admin", Role::Admin, now)?;
            // Only with a new CA: a later start must not bring back an admin who was revoked.
            write(&certs_dir.join("admin.key"), &admin_key, SECRET)?;
            write(&certs_dir.join("admin.crt"), &admin.pem, PUBLIC)?;
        }
        Ok(Self { ca: Arc::new(ca), minted, certs_dir: certs_dir.to_owned(), names, certificate, key })
    }

    /// Issues the controller's certificate again if it is due, by the rules of [`Pki::open`]; true if it did.
    ///
    /// # Errors
    /// Returns an error if it cannot be issued or written.
    pub fn refresh(&mut self, now: DateTime<Utc>) -> Result<bool, PkiError> {
        if serves(&self.ca, &self.certificate, &self.names, now) {
            return Ok(false);
        }
        (self.certificate, self.key) = issue_controller(&self.ca, &self.certs_dir, &self.names, now)?;
        Ok(true)
    }

    /// Loads the controller's certificate and key if their files have changed; true if it did. A pair that does not
    /// match, as while the two files are being written, is no error; it is checked again.
    ///
    /// # Errors
    /// Returns an error if the files do not hold a certificate of this CA with every name and enough validity left.
    pub fn reload(&mut self, now: DateTime<Utc>) -> Result<bool, PkiError> {
        let (certificate_path, key_path) =
            (self.certs_dir.join("controller.crt"), self.certs_dir.join("controller.key"));
        if !exists(&certificate_path)? || !exists(&key_path)? {
            return Ok(false);
        }
        let unusable = |what: String| PkiError::Unusable { path: certificate_path.clone(), what };
        let (certificate, key) = parse(&read(&certificate_path)?, &read(&key_path)?).map_err(&unusable)?;
        // SIGHUP also comes when nothing has changed.
        if certificate == self.certificate {
            return Ok(false);
        }
        if !belongs(&certificate, &key) {
            return Ok(false);
        }
        if !serves(&self.ca, &certificate, &self.names, now) {
            let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
            return Err(unusable(format!(
                "it is not issued by the CA in ca.crt, or is not valid yet, or has less than 30 days left, or lacks one of \
                 the names {}; the one before is still presented",
                names.join(", ")
            )));
        }
        (self.certificate, self.key) = (certificate, key);
        Ok(true)
    }

    /// Modification times of the files of the controller's certificate; `None`: unknown.
    pub fn written(&self) -> [Option<std::time::SystemTime>; 2] {
        ["controller.crt", "controller.key"]
            .map(|name| fs::metadata(self.certs_dir.join(name)).and_then(|file| file.modified()).ok())
    }

    /// The controller's certificate, DER.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The controller's key.
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

/// Names in every controller's certificate: fixed ones, the host's, and those asked for.
fn all_names(asked: &[String]) -> BTreeSet<String> {
    let host = gethostname::gethostname().to_string_lossy().to_ascii_lowercase();
    let mut names: BTreeSet<String> =
        [CONTROLLER_TLS_NAME, "localhost", "127.0.0.1", "::1"].into_iter().map(str::to_owned).collect();
    if !host.is_empty() && !host.contains(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '-')) {
        names.insert(format!("{}.local", host.split('.').next().unwrap_or(&host)));
        names.insert(host);
    }
    // One spelling each: addresses have several, and names do not differ by case.
    names.extend(
        asked.iter().map(|name| {
            name.parse::<IpAddr>().map_or_else(|_| name.to_ascii_lowercase(), |address| address.to_string())
        }),
    );
    names
}

fn mint(key_path: &Path, certificate_path: &Path, now: DateTime<Utc>, built: DateTime<Utc>) -> Result<Ca, PkiError> {
    let (ca, key) = Ca::mint(now, built)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PkiError::File { action: "make the folder", path, source }
    };
    if let Some(folder) = key_path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed(folder))?;
    }
    if let Some(folder) = certificate_path.parent().filter(|folder| !folder.is_dir()) {
        fs::create_dir_all(folder).map_err(failed(folder))?;
        // Certificates are public; keys have modes of their own.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).map_err(failed(folder))?;
    }
    write(key_path, &key, SECRET)?;
    write(certificate_path, ca.certificate_pem(), PUBLIC)?;
    Ok(ca)
}

type Pair = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// The controller's certificate and key from their files; `None`: missing, or they must be issued again.
fn load_controller(
    ca: &Ca,
    certs_dir: &Path,
    names: &BTreeSet<String>,
    now: DateTime<Utc>,
) -> Result<Option<Pair>, PkiError> {
    let (certificate_path, key_path) = (certs_dir.join("controller.crt"), certs_dir.join("controller.key"));
    if !exists(&certificate_path)? || !exists(&key_path)? {
        return Ok(None);
    }
    let pair = parse(&read(&certificate_path)?, &read(&key_path)?)
        .map_err(|what| PkiError::Unusable { path: certificate_path, what })?;
    Ok(Some(pair).filter(|(certificate, key)| serves(ca, certificate, names, now) && belongs(certificate, key)))
}

fn issue_controller(ca: &Ca, certs_dir: &Path, names: &BTreeSet<String>, now: DateTime<Utc>) -> Result<Pair, PkiError> {
    let names: Vec<String> = names.iter().cloned().collect();
    let (issued, key) = ca.issue_controller(&names, now)?;
    let path = certs_dir.join("controller.crt");
    // Certificate and key are two files. A crash between the writes leaves a pair that does not match, which the next
    // start replaces.
    write(&certs_dir.join("controller.key"), &key, SECRET)?;
    write(&path, &issued.pem, PUBLIC)?;
    parse(&issued.pem, &key).map_err(|what| PkiError::Unusable { path, what })
}

fn parse(certificate: &str, key: &str) -> Result<Pair, String> {
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())
        .map_err(|err| format!("no certificate can be read from it ({err})"))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|err| format!("no key can be read from the file beside it ({err})"))?;
    Ok((certificate, key))
}

/// True if a certificate is of this CA, has every name, is valid, and has enough validity left. One that is not valid
/// yet was issued while the clock was ahead; clients with the right time refuse it.
fn serves(ca: &Ca, certificate: &CertificateDer<'_>, names: &BTreeSet<String>, now: DateTime<Utc>) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
    let Ok((_, authority)) = X509Certificate::from_der(ca.certificate_der()) else { return false };
    if parsed.verify_signature(Some(authority.public_key())).is_err() {
        return false;
    }
    let validity = parsed.validity();
    if now.timestamp() < validity.not_before.timestamp()
        || crate::calendar::later(now, RENEW_BEFORE).timestamp() >= validity.not_after.timestamp()
    {
        return false;
    }
    let Ok(Some(alternatives)) = parsed.subject_alternative_name() else { return false };
    let has: BTreeSet<String> = alternatives.value.general_names.iter().filter_map(text).collect();
    names.is_subset(&has)
}

/// True if the key belongs to the certificate.
fn belongs(certificate: &CertificateDer<'_>, key: &PrivateKeyDer<'_>) -> bool {
    use rcgen::PublicKeyData as _;
    let key = rcgen::KeyPair::try_from(key);
    let parsed = X509Certificate::from_der(certificate);
    matches!((key, parsed), (Ok(key), Ok((_, parsed))) if parsed.public_key().raw == key.subject_public_key_info())
}

fn text(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

fn exists(path: &Path) -> Result<bool, PkiError> {
    path.try_exists().map_err(|source| PkiError::File { action: "look for", path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { action: "read", path: path.to_owned(), source })
}

/// Writes a file atomically, with its mode from the first moment.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let temporary = path.with_extension("tmp");
    let attempt = || -> io::Result<()> {
        // A leftover of a crash would make `create_new` fail; opening it instead would keep its mode.
        match fs::remove_file(&temporary) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        // The process's umask would remove the rights of group and others.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // Without it the rename may be lost in a power cut.
        match path.parent() {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    attempt().map_err(|source| PkiError::File { action: "write", path: path.to_owned(), source })
}
