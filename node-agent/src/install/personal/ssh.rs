//! A fresh SSH host key for a node that had none: an image's own would be the same on every node.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{KeyPair, PKCS_ED25519, PublicKeyData as _};

/// The key's file name, where sshd looks for it (sshd_config(5), HostKey).
pub(super) const NAME: &str = "ssh_host_ed25519_key";
const KIND: &[u8] = b"ssh-ed25519";
/// In PKCS#8 the Ed25519 seed is an octet string of 32 bytes within an octet string (RFC 8410, section 7).
const SEED: [u8; 4] = [0x04, 0x22, 0x04, 0x20];
/// Block size of the cipher; unencrypted private keys are padded to it, too.
const BLOCK: usize = 8;
/// Characters of a line.
const LINE: usize = 70;

/// Makes a private key's file and its public key's, as `ssh-keygen -t ed25519 -N ""` does (PROTOCOL.key of OpenSSH);
/// `None`: there is no randomness.
pub(super) fn fresh(comment: &str) -> Option<(String, String)> {
    let pair = KeyPair::generate_for(&PKCS_ED25519).ok()?;
    let der = pair.serialized_der();
    let seed = der.windows(SEED.len()).position(|window| window == SEED)? + SEED.len();
    let (seed, public) = (der.get(seed..seed.checked_add(32)?)?, pair.der_bytes());

    let mut public_key = Vec::new();
    string(&mut public_key, KIND)?;
    string(&mut public_key, public)?;

    // Two equal check words, which only a wrong passphrase would make differ.
    let mut private = vec![0; 8];
    private.extend_from_slice(&public_key);
    string(&mut private, &[seed, public].concat())?;
    string(&mut private, comment.as_bytes())?;
    // The padding is 1, 2, 3, ...
    private.extend((1_u8..).take((BLOCK - private.len() % BLOCK) % BLOCK));

    let mut file = b"openssh-key-v1\0".to_vec();
    // Cipher, key derivation, and its options. sshd reads the key without a passphrase.
    for text in [b"none".as_slice(), b"none", b""] {
        string(&mut file, text)?;
    }
    file.extend_from_slice(&1_u32.to_be_bytes());
    string(&mut file, &public_key)?;
    string(&mut file, &private)?;

    let encoded = STANDARD.encode(file);
    let mut text = String::from("-----BEGIN OPENSSH PRIVATE KEY-----\n");
    for (at, character) in encoded.chars().enumerate() {
        if at > 0 && at % LINE == 0 {
            text.push('\n');
        }
        text.push(character);
    }
    text.push_str("\n-----END OPENSSH PRIVATE KEY-----\n");
    Some((text, format!("ssh-ed25519 {} {comment}\n", STANDARD.encode(public_key))))
}

/// A string as SSH writes it: its length, big-endian, and its bytes (RFC 4251, section 5).
fn string(to: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    to.extend_from_slice(&u32::try_from(bytes.len()).ok()?.to_be_bytes());
    to.extend_from_slice(bytes);
    Some(())
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    #[test]
    fn a_fresh_key_has_the_form_that_openssh_reads() {
        let (private, public) = super::fresh("root@pi-01").unwrap();
        let body: String = private.lines().filter(|line| !line.starts_with('-')).collect();
        let file = STANDARD.decode(body).unwrap();
        let public = STANDARD.decode(public.split(' ').nth(1).unwrap()).unwrap();
        // Magic, cipher, key derivation with its options, number of keys, public key, private part.
        let (head, rest) = file.split_at(15 + 8 + 8 + 4 + 4);
        assert!(head.starts_with(b"openssh-key-v1\0") && head.ends_with(&[0, 0, 0, 1]));
        assert_eq!(rest[..4], 51_u32.to_be_bytes());
        assert_eq!(rest[4..55], public);
        assert_eq!(usize::try_from(u32::from_be_bytes(rest[55..59].try_into().unwrap())).unwrap(), rest.len() - 59);
        assert_eq!((rest.len() - 59) % super::BLOCK, 0);
        assert_eq!(rest[59 + 8..59 + 8 + 51], public);
    }

    #[test]
    fn no_two_keys_are_the_same() {
        assert_ne!(super::fresh("").unwrap(), super::fresh("").unwrap());
    }
}
