//! Join tokens. The text is `mj1.ID.SECRET.PIN`: `mj1` names this form; ID is the token's id in the API (`joinTokens/ID`,
//! letters, digits and hyphens); SECRET is 256 random bits and PIN the SHA-256 of the CA's SubjectPublicKeyInfo, both in
//! base64url without padding. Only the secret's SHA-256 is stored. The pin lets a node know the right controller before
//! it trusts anything.

use marco_proto::names::JoinTokenId;

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

impl JoinToken {
    /// A new token with a random id and secret.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn mint(ca_pin: [u8; 32]) -> Result<Self, getrandom::Error> {
        todo!("{ca_pin:?}")
    }

    /// Reads a token's text.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str) -> Result<Self, InvalidToken> {
        todo!("{}", text.len())
    }

    /// The text, secret included: shown once, never logged.
    pub fn reveal(&self) -> String {
        todo!()
    }

    /// SHA-256 of the secret, lower-case hexadecimal: what the store keeps.
    pub fn secret_sha256(&self) -> String {
        todo!()
    }
}
