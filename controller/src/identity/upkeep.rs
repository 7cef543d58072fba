//! Upkeep of the controller's own certificate: it is loaded again when its files change, and issued again before it
//! expires.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

use super::ca::Pki;
use super::tls::Acceptor;
use crate::calendar::later;
use crate::clock::Clock;

/// Interval at which the files are checked.
const LOOK: Duration = Duration::from_secs(5);
/// Pause after a renewal that failed. It is short against the 30 days that are left, and long enough that a read-only
/// folder does not fill the log.
const AGAIN: TimeDelta = TimeDelta::minutes(10);

/// Keeps the certificate current.
pub struct Upkeep {
    pki: Pki,
    acceptors: [Acceptor; 3],
    /// Modification times of the files at the last check.
    written: [Option<SystemTime>; 2],
    /// Time of the last failed renewal; `None`: the last one succeeded, or there was none.
    failed: Option<DateTime<Utc>>,
}

impl Upkeep {
    /// Keeps this certificate, and presents it through these acceptors.
    pub fn new(pki: Pki, acceptors: [Acceptor; 3]) -> Self {
        let written = pki.written();
        Self { pki, acceptors, written, failed: None }
    }

    /// Checks the files every `LOOK`, and at once on SIGHUP, until `stop`.
    pub async fn run(mut self, clock: Arc<dyn Clock>, mut hangup: Signal, stop: CancellationToken) {
        loop {
            // Each arm only wakes the loop; the files and the clock tell what to do.
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => false,
                Some(()) = hangup.recv() => true,
            };
            self.look(clock.now(), asked);
        }
    }

    /// Loads changed files, and issues the certificate again when it is due. With `asked` (SIGHUP) the log also reports
    /// that nothing changed, and a failed renewal is tried again at once.
    fn look(&mut self, now: DateTime<Utc>, asked: bool) {
        let written = self.pki.written();
        if asked || written != self.written {
            match self.pki.reload(now) {
                Ok(true) => {
                    tracing::info!(
                        "the controller's certificate was changed, and the new one is presented from now on"
                    );
                    self.present();
                }
                Ok(false) if asked => tracing::info!("the controller's certificate is the one that is presented"),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(error = &*crate::chain(&error), "the controller's new certificate is not used")
                }
            }
            self.written = written;
        }
        // A clock that was set back leaves `failed` in the future; then the renewal is tried.
        if !asked && self.failed.is_some_and(|failed| (failed..later(failed, AGAIN)).contains(&now)) {
            return;
        }
        match self.pki.refresh(now) {
            Ok(renewed) => {
                self.failed = None;
                if renewed {
                    tracing::info!("the controller's certificate was issued again");
                    self.present();
                }
            }
            Err(error) => {
                tracing::error!(
                    error = &*crate::chain(&error),
                    again_in_minutes = AGAIN.num_minutes(),
                    "the controller's certificate could not be issued again"
                );
                self.failed = Some(now);
            }
        }
        // Our own write is not a change to load.
        self.written = self.pki.written();
    }

    fn present(&self) {
        for acceptor in &self.acceptors {
            if let Err(error) = acceptor.reload(&self.pki) {
                tracing::error!(error = &*crate::chain(&error), "the controller's new certificate cannot be presented");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use chrono::TimeZone as _;

    use super::*;
    use crate::clock::ManualClock;

    fn start() -> DateTime<Utc> {
        Utc.timestamp_opt(1_900_000_000, 0).unwrap()
    }

    /// For a controller that was created at [`start`] in this folder.
    fn upkeep(folder: &Path) -> Upkeep {
        let pki = Pki::open(&folder.join("data"), &folder.join("certs"), &[], start(), DateTime::UNIX_EPOCH).unwrap();
        let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(start()));
        let acceptors = [
            Acceptor::api(&pki, Arc::clone(&clock)).unwrap(),
            Acceptor::enrolment(&pki, Arc::clone(&clock)).unwrap(),
            Acceptor::mirror(&pki, clock).unwrap(),
        ];
        Upkeep::new(pki, acceptors)
    }

    fn presented(upkeep: &Upkeep) -> Vec<u8> {
        upkeep.pki.certificate().to_vec()
    }

    #[test]
    fn certificate_of_a_clock_that_was_ahead_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (start, mut upkeep) = (start(), upkeep(folder.path()));
        upkeep.look(start + TimeDelta::days(365), false);
        let ahead = presented(&upkeep);
        upkeep.look(start + TimeDelta::seconds(8), false);
        assert_ne!(presented(&upkeep), ahead, "operators refuse it for a year");
        let kept = presented(&upkeep);
        // A clock in 1970 signs nothing; the presented certificate still serves clients with the right time.
        upkeep.look(DateTime::UNIX_EPOCH, false);
        upkeep.look(start + TimeDelta::seconds(20), false);
        assert_eq!(presented(&upkeep), kept);
    }

    #[test]
    fn a_renewal_that_failed_is_tried_again_after_ten_minutes() {
        let folder = tempfile::tempdir().unwrap();
        let certs = folder.path().join("certs");
        let (start, mut upkeep) = (start(), upkeep(folder.path()));
        let first = presented(&upkeep);
        upkeep.look(start + TimeDelta::days(300), false);
        assert_eq!(presented(&upkeep), first, "it was issued again long before it is due");

        // A folder in the way of the temporary file makes the write fail.
        let due = start + TimeDelta::days(340);
        let in_the_way = certs.join("controller.tmp");
        fs::create_dir(&in_the_way).unwrap();
        upkeep.look(due, false);
        fs::remove_dir(&in_the_way).unwrap();
        upkeep.look(due + TimeDelta::minutes(9), false);
        assert_eq!(presented(&upkeep), first, "it was tried again at once");
        upkeep.look(due + TimeDelta::minutes(10), false);
        let second = presented(&upkeep);
        assert_ne!(second, first, "it was not tried again");

        // A SIGHUP does not wait for the next attempt.
        let due = due + TimeDelta::days(340);
        fs::create_dir(&in_the_way).unwrap();
        upkeep.look(due, false);
        fs::remove_dir(&in_the_way).unwrap();
        upkeep.look(due + TimeDelta::minutes(1), true);
        assert_ne!(presented(&upkeep), second);
    }
}
