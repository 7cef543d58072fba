//! Join tokens. The text is `mj1.ID.SECRET.PIN`: `mj1` names this form; ID is the token's id in the API
//! (`joinTokens/ID`, lower-case letters and digits); SECRET is 256 random bits and PIN the SHA-256 of the CA's
//! SubjectPublicKeyInfo, both in base64url without padding. Only the secret's SHA-256 is stored. The pin lets a node
//! know the right controller before it trusts anything.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use marco_proto::names::JoinTokenId;
use sha2::{Digest as _, Sha256};

const FORM: &str = "mj1";

/// A token with its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Its public id.
    pub id: JoinTokenId,
    secret: [u8; 32],
    /// SHA-256 of the CA's SubjectPublicKeyInfo.
    pub ca_pin: [u8; 32],
}

/// Not a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: it must read mj1.ID.SECRET.PIN")]
pub struct InvalidToken;

/// A token cannot be minted.
#[derive(Debug, thiserror::Error)]
#[error("the system gives no random numbers")]
pub struct NoRandomNumbers(#[from] getrandom::Error);

impl JoinToken {
    /// A new token with a random id and secret.
    ///
    /// # Errors
    /// Returns an error if the system has no random numbers.
    pub fn mint(ca_pin: [u8; 32]) -> Result<Self, NoRandomNumbers> {
        let (mut id, mut secret) = ([0; 5], [0; 32]);
        getrandom::fill(&mut id)?;
        getrandom::fill(&mut secret)?;
        #[expect(clippy::expect_used, reason = "ten hexadecimal digits are an id")]
        let id = JoinTokenId::parse(&hex::encode(id)).expect("hexadecimal digits are an id");
        Ok(Self { id, secret, ca_pin })
    }

    /// Reads a token's text; white space around it is ignored.
    ///
    /// # Errors
    /// Returns an error if the text is no token.
    pub fn parse(text: &str) -> Result<Self, InvalidToken> {
        let mut parts = text.trim().split('.');
        let mut next = || parts.next().ok_or(InvalidToken);
        let (form, id, secret, pin) = (next()?, next()?, next()?, next()?);
        // `JoinTokenId::parse` also accepts a full name, which has no place in a token.
        if form != FORM || parts.next().is_some() || id.contains('/') {
            return Err(InvalidToken);
        }
        Ok(Self {
            id: JoinTokenId::parse(id).map_err(|_| InvalidToken)?,
            secret: decode(secret)?,
            ca_pin: decode(pin)?,
        })
    }

    /// The text, secret included: shown once, never logged.
    pub fn reveal(&self) -> String {
        format!("{FORM}.{}.{}.{}", self.id, URL_SAFE_NO_PAD.encode(self.secret), URL_SAFE_NO_PAD.encode(self.ca_pin))
    }

    /// SHA-256 of the secret, lower-case hexadecimal, for the store. A secret of 256 random bits needs no salt.
    pub fn secret_sha256(&self) -> String {
        hex::encode(Sha256::digest(self.secret))
    }
}

// Written by hand: a derived `Debug` would print the secret.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).finish_non_exhaustive()
    }
}

fn decode(text: &str) -> Result<[u8; 32], InvalidToken> {
    URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(InvalidToken)
}

#[cfg(test)]
mod tests {
    use super::JoinToken;

    #[test]
    fn a_token_is_read_back_from_its_text() {
        let token = JoinToken::mint([7; 32]).unwrap();
        assert_eq!(JoinToken::parse(&format!(" {}\n", token.reveal())).unwrap(), token);
        assert_eq!(token.secret_sha256().len(), 64);
    }

    #[test]
    fn no_two_tokens_are_alike_and_none_shows_its_secret() {
        let (one, two) = (JoinToken::mint([7; 32]).unwrap(), JoinToken::mint([7; 32]).unwrap());
        assert_ne!(one.secret_sha256(), two.secret_sha256());
        assert_ne!(one.id, two.id);
        let secret = one.reveal().split('.').nth(2).unwrap().to_owned();
        assert!(!format!("{one:?}").contains(&secret));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let good = JoinToken::mint([7; 32]).unwrap().reveal();
        for bad in [
            "",
            "mj1",
            "mj1.a.b.c",
            &good.replacen("mj1", "mj2", 1),
            &format!("{good}.x"),
            good.trim_end_matches(char::is_alphanumeric),
        ] {
            assert!(JoinToken::parse(bad).is_err(), "{bad}");
        }
    }
}
