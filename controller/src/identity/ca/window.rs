//! The times at which the CA signs. A machine without a real-time clock boots in 1970, or at the time when it was
//! switched off. Certificates of such a time have expired for everyone with the right time.

use chrono::{DateTime, SecondsFormat, Utc};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::BACKDATED;
use crate::calendar::earlier;

/// The controller's clock shows an impossible time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the controller's clock is wrong: it says {}, but {why}. Set it (`timedatectl set-ntp true` and a time server that \
     this machine reaches, or `date -s`); no certificate is signed until then",
    text(*now)
)]
pub struct WrongClock {
    now: DateTime<Utc>,
    why: String,
}

/// The time span in which the CA signs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// Build time of this program.
    built: DateTime<Utc>,
    /// Validity of the CA's certificate; `None`: there is no CA yet.
    ca: Option<(DateTime<Utc>, DateTime<Utc>)>,
}

impl Window {
    /// The span for a CA that is about to be minted.
    pub(super) fn before_ca(built: DateTime<Utc>) -> Self {
        Self { built, ca: None }
    }

    /// The span for a CA, by its certificate.
    pub(super) fn of(certificate: &CertificateDer<'_>, built: DateTime<Utc>) -> Self {
        Self { built, ca: validity(certificate) }
    }

    /// Checks that certificates of this time would be valid for a client with the right time.
    ///
    /// A clock that is behind by less than certificates are backdated does no harm. Neither the CA nor the build proves
    /// more: the times of both come from some clock.
    pub(super) fn check(&self, now: DateTime<Utc>) -> Result<(), WrongClock> {
        let wrong = |why: String| Err(WrongClock { now, why });
        if now < earlier(self.built, BACKDATED) {
            return wrong(format!("this program was built at {}", text(self.built)));
        }
        match self.ca {
            // Its certificate is backdated already.
            Some((from, _)) if now < from => wrong(format!(
                "the CA's certificate (ca.crt) is valid from {} only. If the clock is right, the CA was made while it was \
                 ahead: this controller needs another CA, and every node a join token of it",
                text(from)
            )),
            Some((_, until)) if now > until => wrong(format!(
                "the CA's certificate (ca.crt) expired at {}. If the clock is right, this controller needs another CA, and \
                 every node a join token of it",
                text(until)
            )),
            _ => Ok(()),
        }
    }
}

/// Start and end of a certificate's validity.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let time = |time: x509_parser::time::ASN1Time| DateTime::from_timestamp(time.timestamp(), 0);
    Some((time(parsed.validity().not_before)?, time(parsed.validity().not_after)?))
}

fn text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}
