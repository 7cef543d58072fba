//! Join tokens: `mj1.ID.SECRET.PIN`. ID is public, SECRET is 256 bits, PIN is the SHA-256 of the CA's
//! SubjectPublicKeyInfo, the last two in base64url without padding.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use marco_proto::names::JoinTokenId;

use crate::discovery::CaHint;

/// A join token. Its text is a secret, and is neither printed nor logged.
#[derive(Clone)]
pub struct JoinToken {
    text: String,
    id: JoinTokenId,
    pin: [u8; 32],
}

/// The text is not a join token. The error does not repeat it: it may be a token with a typing error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: one reads mj1.ID.SECRET.PIN")]
pub struct InvalidToken;

impl JoinToken {
    /// Parses a token. White space around it is ignored.
    pub fn parse(text: &str) -> Result<Self, InvalidToken> {
        let text = text.trim();
        let mut parts = text.split('.');
        let (Some("mj1"), Some(id), Some(secret), Some(pin), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidToken);
        };
        let bits = |part: &str| -> Result<[u8; 32], InvalidToken> {
            URL_SAFE_NO_PAD.decode(part).map_err(|_| InvalidToken)?.try_into().map_err(|_| InvalidToken)
        };
        bits(secret)?;
        let id = JoinTokenId::parse(id).map_err(|_| InvalidToken)?;
        Ok(Self { text: text.to_owned(), id, pin: bits(pin)? })
    }

    /// The whole text, with the secret.
    pub(super) fn reveal(&self) -> &str {
        &self.text
    }

    /// Hint by which answers of controllers of that CA are recognised.
    pub fn ca(&self) -> CaHint {
        CaHint::of(&self.pin)
    }

    /// SHA-256 of the SubjectPublicKeyInfo of the CA that made the token.
    pub(super) fn pin(&self) -> [u8; 32] {
        self.pin
    }
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id.as_str()).finish_non_exhaustive()
    }
}
