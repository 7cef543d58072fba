//! The time by which a node judges certificates. A Pi has no clock that runs without power: after a boot its system
//! clock may show 1970 or any other time.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;

/// Seconds since 1970 at which this agent was built.
const BUILD_SECONDS: &str = env!("MARCO_BUILD_SECONDS");

/// The last time told by an authenticated controller, within the validity of the certificate that it accepted or
/// issued, plus the time since. Before the first one: the latest of the agent's build, the remembered time, and the
/// beginnings of its certificates' validity. Never the system's clock.
///
/// A later word corrects an earlier one, forwards and backwards, also to before the build. The controller judges this
/// node's certificate by its own clock, so a node that insists on another time locks itself out.
#[derive(Debug)]
pub struct TlsTime {
    began: Instant,
    /// The time at `began`, microseconds since 1970.
    floor: Mutex<i64>,
}

impl Default for TlsTime {
    fn default() -> Self {
        Self::starting_at(BUILD_SECONDS.parse::<i64>().unwrap_or(0).saturating_mul(1_000_000))
    }
}

impl TlsTime {
    /// A time that begins at `floor`, microseconds since 1970.
    pub fn starting_at(floor: i64) -> Self {
        Self { began: Instant::now(), floor: Mutex::new(floor) }
    }

    /// Takes a time that has certainly passed, microseconds since 1970. An earlier one changes nothing.
    pub fn advance(&self, known: i64) {
        let elapsed = self.elapsed();
        let mut floor = self.floor.lock().unwrap_or_else(PoisonError::into_inner);
        *floor = (*floor).max(known.saturating_sub(elapsed));
    }

    /// Sets the present time, microseconds since 1970, forwards or backwards.
    pub fn set(&self, now: i64) {
        let elapsed = self.elapsed();
        *self.floor.lock().unwrap_or_else(PoisonError::into_inner) = now.saturating_sub(elapsed);
    }

    /// The present time, microseconds since 1970.
    pub fn now_micros(&self) -> i64 {
        let floor = *self.floor.lock().unwrap_or_else(PoisonError::into_inner);
        floor.saturating_add(self.elapsed())
    }

    /// The present time as a date.
    pub fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(self.now_micros()).unwrap_or(DateTime::UNIX_EPOCH)
    }

    fn elapsed(&self) -> i64 {
        // `Instant` is monotonic: a step of the system's clock changes nothing here.
        i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        let micros = u64::try_from(self.now_micros()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_micros(micros)))
    }
}
