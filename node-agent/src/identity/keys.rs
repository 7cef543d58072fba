//! Key and certificate on the disk. Each renewal has a new key. `next.key` is stored before it is sent for signing, and
//! `next.crt` when it is signed. Both replace `node.key` and `node.crt` when a controller has accepted a session with
//! them. Until then the pair before is kept, so that neither a power cut nor a controller that lost its last commits
//! locks a node out.

use std::path::Path;

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::{CERTIFICATE_FILE, IdentityError, KEY_FILE, PUBLIC_MODE, SECRET_MODE, read, tls};
use crate::durable;

const NEXT_KEY_FILE: &str = "next.key";
const NEXT_CERTIFICATE_FILE: &str = "next.crt";

/// A certificate and its key, PEM.
#[derive(Clone)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) certificate: String,
    /// True until a controller has accepted it.
    pub(super) is_next: bool,
}

/// The stored pairs, newest first. Empty: the node is not enrolled. Completes a replacement that a power cut
/// interrupted.
pub(super) fn pairs(directory: &Path) -> Result<Vec<Pair>, IdentityError> {
    if read(&directory.join(CERTIFICATE_FILE))?.is_none() {
        return Ok(Vec::new());
    }
    let _held = hold(directory)?;
    let get = |name: &str| read(&directory.join(name));
    let next = match (get(NEXT_KEY_FILE)?, get(NEXT_CERTIFICATE_FILE)?) {
        (Some(key), Some(certificate)) => Some(Pair { key, certificate, is_next: true }),
        // Cut between the two renames of `promote`: the key was replaced, the certificate not yet.
        (None, Some(certificate)) => {
            if get(KEY_FILE)?.is_some_and(|key| fit(&key, &certificate)) {
                rename(directory, NEXT_CERTIFICATE_FILE, CERTIFICATE_FILE)?;
            }
            None
        }
        (_, None) => None,
    };
    let needed = |name: &str| super::read_needed(&directory.join(name));
    let pair = Pair { key: needed(KEY_FILE)?, certificate: needed(CERTIFICATE_FILE)?, is_next: false };
    Ok(next.into_iter().chain([pair]).collect())
}

/// The key for the next certificate. It stays the same until it has one.
pub(super) fn next_key(directory: &Path) -> Result<String, IdentityError> {
    key(directory, NEXT_KEY_FILE).map(|key| key.serialize_pem())
}

/// The node's first key. It is stored before it is used, so that a retry after a power cut asks for the same node.
pub(super) fn first_key(directory: &Path) -> Result<KeyPair, IdentityError> {
    key(directory, KEY_FILE)
}

fn key(directory: &Path, name: &str) -> Result<KeyPair, IdentityError> {
    let path = directory.join(name);
    if let Some(pem) = read(&path)? {
        match KeyPair::from_pem(&pem) {
            Ok(key) => return Ok(key),
            // A file that was never complete was never certified.
            Err(error) if name == NEXT_KEY_FILE => {
                tracing::warn!(error = %error, "next key not usable, making another")
            }
            Err(error) => return Err(IdentityError::invalid(path.display().to_string(), error)),
        }
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|error| IdentityError::invalid("a new key for the node", error))?;
    durable::replace(&path, key.serialize_pem().as_bytes(), SECRET_MODE).map_err(IdentityError::io("write", &path))?;
    Ok(key)
}

/// Stores the certificate of the next key beside the pair in use.
pub(super) fn keep_next(directory: &Path, certificate: &str) -> Result<(), IdentityError> {
    write(directory, NEXT_CERTIFICATE_FILE, certificate)
}

/// Replaces the certificate of a pair that keeps its key.
pub(super) fn keep_renewed(directory: &Path, pair: &Pair, certificate: &str) -> Result<(), IdentityError> {
    write(directory, if pair.is_next { NEXT_CERTIFICATE_FILE } else { CERTIFICATE_FILE }, certificate)
}

fn write(directory: &Path, name: &str, text: &str) -> Result<(), IdentityError> {
    let path = directory.join(name);
    durable::replace(&path, text.as_bytes(), PUBLIC_MODE).map_err(IdentityError::io("write", &path))
}

/// Replaces the pair in use by the next one. The old one has no value from then on.
pub(super) fn promote(directory: &Path) -> Result<(), IdentityError> {
    let _held = hold(directory)?;
    // Key first: `pairs` recognises this order after a cut, since `next.crt` fits `node.key` then.
    rename(directory, NEXT_KEY_FILE, KEY_FILE)?;
    rename(directory, NEXT_CERTIFICATE_FILE, CERTIFICATE_FILE)
}

/// Locks the directory, so that no copy of it mixes two pairs.
fn hold(directory: &Path) -> Result<std::fs::File, IdentityError> {
    durable::hold(directory).map_err(IdentityError::io("lock", directory))
}

fn rename(directory: &Path, from: &str, to: &str) -> Result<(), IdentityError> {
    let path = directory.join(to);
    durable::rename(&directory.join(from), &path).map_err(IdentityError::io("replace", &path))
}

fn fit(key: &str, certificate: &str) -> bool {
    let Ok(key) = KeyPair::from_pem(key) else { return false };
    let Ok(certificate) = CertificateDer::from_pem_slice(certificate.as_bytes()) else { return false };
    tls::spki(&certificate).is_ok_and(|found| found == key.subject_public_key_info())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::Pki;

    /// A directory with a node's pair, and the means to make the next one.
    struct Bench {
        dir: tempfile::TempDir,
        pki: Pki,
        first: String,
    }

    fn bench() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::new("2026-01-01T00:00:00Z", "2026-01-31T00:00:00Z");
        let first = first_key(dir.path()).unwrap();
        fs::write(dir.path().join(CERTIFICATE_FILE), certificate(&pki, &first)).unwrap();
        Bench { first: first.serialize_pem(), dir, pki }
    }

    fn certificate(pki: &Pki, key: &KeyPair) -> String {
        let request = rcgen::CertificateParams::default().serialize_request(key).unwrap();
        pki.issue(&request.pem().unwrap(), "pi-01")
    }

    /// Keys of the pairs, newest first. Each must fit its certificate.
    fn keys(bench: &Bench) -> Vec<String> {
        let pairs = pairs(bench.dir.path()).unwrap();
        assert!(pairs.iter().all(|pair| fit(&pair.key, &pair.certificate)));
        pairs.into_iter().map(|pair| pair.key).collect()
    }

    #[test]
    fn a_cut_at_any_step_of_a_renewal_leaves_a_pair() {
        let bench = bench();
        let path = bench.dir.path();
        let next = next_key(path).unwrap();
        // Not answered: the same key is sent again.
        assert_eq!(keys(&bench), std::slice::from_ref(&bench.first));
        assert_eq!(next_key(path).unwrap(), next);
        keep_next(path, &certificate(&bench.pki, &KeyPair::from_pem(&next).unwrap())).unwrap();
        assert_eq!(keys(&bench), [next.clone(), bench.first.clone()]);
        // A cut between the two renames.
        fs::rename(path.join(NEXT_KEY_FILE), path.join(KEY_FILE)).unwrap();
        assert_eq!(keys(&bench), std::slice::from_ref(&next));
        assert!(!path.join(NEXT_CERTIFICATE_FILE).exists());
        assert_eq!(keys(&bench), [next]);
    }

    #[test]
    fn the_next_pair_takes_the_place_of_the_one_before() {
        let bench = bench();
        let path = bench.dir.path();
        let next = next_key(path).unwrap();
        keep_next(path, &certificate(&bench.pki, &KeyPair::from_pem(&next).unwrap())).unwrap();
        promote(path).unwrap();
        assert_eq!(keys(&bench), std::slice::from_ref(&next));
        assert_ne!(next_key(path).unwrap(), next, "each renewal has a key of its own");
    }
}
