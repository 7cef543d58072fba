//! API tokens. The text is `ma1.SECRET`: `ma1` names this form, SECRET is 256 random bits in base64url without padding.
//! Only the secret's SHA-256 is stored.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use super::tokens::NoRandomNumbers;

const FORM: &str = "ma1.";

/// The secret of an API token.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiSecret([u8; 32]);

impl ApiSecret {
    /// A new random secret.
    ///
    /// # Errors
    /// Returns an error if the system has no random numbers.
    pub fn mint() -> Result<Self, NoRandomNumbers> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)?;
        Ok(Self(secret))
    }

    /// Reads a call's `authorization` metadata, `Bearer TOKEN`; `None`: another form.
    pub fn from_metadata(text: &str) -> Option<Self> {
        let (scheme, token) = text.trim().split_once(' ')?;
        let secret = token.trim().strip_prefix(FORM).filter(|_| scheme.eq_ignore_ascii_case("bearer"))?;
        Some(Self(URL_SAFE_NO_PAD.decode(secret).ok()?.try_into().ok()?))
    }

    /// The text, secret included: shown once, never logged.
    pub fn reveal(&self) -> String {
        format!("{FORM}{}", URL_SAFE_NO_PAD.encode(self.0))
    }

    /// SHA-256 of the secret, lower-case hexadecimal, for the store. A secret of 256 random bits needs no salt.
    pub fn sha256(&self) -> String {
        hex::encode(Sha256::digest(self.0))
    }
}

// Written by hand: a derived `Debug` would print the secret.
impl fmt::Debug for ApiSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiSecret")
    }
}

#[cfg(test)]
mod tests {
    use super::ApiSecret;

    #[test]
    fn a_token_is_read_back_from_the_metadata() {
        let secret = ApiSecret::mint().unwrap();
        for scheme in ["Bearer", "bearer"] {
            assert_eq!(ApiSecret::from_metadata(&format!("{scheme} {}", secret.reveal())), Some(secret.clone()));
        }
        let text = secret.reveal();
        for wrong in
            ["", "Bearer", "Bearer ", &text, &format!("Basic {text}"), &format!("Bearer {text}x"), "Bearer ma1."]
        {
            assert_eq!(ApiSecret::from_metadata(wrong), None, "{wrong}");
        }
        assert_eq!(format!("{secret:?}"), "ApiSecret");
        assert_ne!(secret, ApiSecret::mint().unwrap());
    }
}
