//! The controller's own certificate while it runs: presented as its files have it, and issued again before it expires.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

use super::ca::Pki;
use super::tls::Acceptor;
use crate::clock::Clock;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How long after a renewal that failed the next one is tried: soon enough for the 30 days that are left, and seldom
/// enough that a folder that cannot be written to does not fill the log.
const AGAIN: TimeDelta = TimeDelta::minutes(10);

/// Keeps the certificate.
pub struct Upkeep {
    pki: Pki,
    acceptors: [Acceptor; 3],
    /// When the files were written that were looked at last.
    written: [Option<SystemTime>; 2],
    /// When a renewal failed last, while none has worked since.
    failed: Option<DateTime<Utc>>,
}

impl Upkeep {
    /// Of what is presented now, to those who present it.
    pub fn new(pki: Pki, acceptors: [Acceptor; 3]) -> Self {
        let written = pki.written();
        Self { pki, acceptors, written, failed: None }
    }

    /// Looks at the files every few seconds, and at once on SIGHUP, until it is told to stop.
    pub async fn run(mut self, clock: Arc<dyn Clock>, mut hangup: Signal, stop: CancellationToken) {
        loop {
            // Every arm only wakes: what is to be done is read from the files and the clock.
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => false,
                Some(()) = hangup.recv() => true,
            };
            self.look(clock.now(), asked);
        }
    }

    /// Takes what the files have that is new, and issues the certificate again when it is due. Whoever asks for it is told
    /// also when all is as it was, and does not wait for the next attempt.
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
        if !asked && self.failed.is_some_and(|failed| (failed..failed + AGAIN).contains(&now)) {
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
        // What was written just now is ours.
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

    /// Of a controller that was made at [`start`] in this folder.
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
        // A clock in 1970 signs nothing: what is presented serves those whose clocks are right.
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

        // Nothing can be written over a folder.
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

        // Nobody who asks is made to wait.
        let due = due + TimeDelta::days(340);
        fs::create_dir(&in_the_way).unwrap();
        upkeep.look(due, false);
        fs::remove_dir(&in_the_way).unwrap();
        upkeep.look(due + TimeDelta::minutes(1), true);
        assert_ne!(presented(&upkeep), second);
    }
}
