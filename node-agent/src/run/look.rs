//! Periodic looks at the machine, for the controller to show.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::health::{self, Ailment, Health};
use crate::identity::Identity;
use crate::job::Labels;
use crate::system::{Refusal, System};

/// Interval of the looks: cables are pulled, and power supplies become weak.
const LOOK_AGAIN: Duration = Duration::from_secs(5 * 60);

/// The parts that a look needs.
pub(super) struct Look {
    pub(super) system: Arc<dyn System>,
    pub(super) health: Arc<Health>,
    pub(super) identity: Arc<Identity>,
    /// `Some` once a controller was heard, and with it the time.
    pub(super) labels: watch::Receiver<Option<Labels>>,
}

impl Look {
    /// Looks at disk, power, settings and clock, and notes what ails the node.
    pub(super) fn at_health(&self) {
        let found = self.system.conditions();
        for ailment in [Ailment::Disk, Ailment::UnderVoltage, Ailment::Settings] {
            let message = found.iter().find(|found| found.ailment == ailment).map(|found| found.message.clone());
            self.health.set(ailment, message);
        }
        // Before a controller was heard, the agent's time is only a lower bound, and proves no clock wrong.
        let clock = self.system.clock().filter(|_| self.labels.borrow().is_some());
        let wrong = clock.and_then(|clock| health::wrong_clock(clock, self.identity.time().now()));
        self.health.set(Ailment::Clock, wrong);
    }

    /// Pends until another look is due: after the interval, or when a controller was heard for the first time.
    async fn again(&mut self) {
        let heard = self.labels.borrow().is_some();
        let first = async {
            if heard || self.labels.wait_for(Option::is_some).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        // Cancel-safe: neither wait holds anything.
        tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            () = first => {}
        }
    }
}

/// Looks again and again, until `stop`: at the node's ailments, and whether it would take an update.
pub(super) async fn keep_looking(mut look: Look, refusal: &watch::Sender<Option<Refusal>>, stop: &CancellationToken) {
    loop {
        // Cancel-safe: a look changes nothing.
        let now = tokio::select! {
            () = stop.cancelled() => return,
            now = async {
                look.again().await;
                look.at_health();
                look.system.preflight_update().await.err()
            } => now,
        };
        // Each change becomes a message to the controller.
        refusal.send_if_modified(|told| {
            let changed = *told != now;
            *told = now;
            changed
        });
    }
}
