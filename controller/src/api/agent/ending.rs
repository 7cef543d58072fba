//! The end of a session, and the messages of a node that are not reports: Leaving and NotHeld.

use marco_proto::names::ExecutionId;
use marco_proto::v1;

use super::{END_AGAIN, Ended, Session, store_down};
use crate::api::convert;
use crate::api::status::ApiError;
use crate::identity::peer_log::{cut, of_peer};
use crate::sessions::End;
use crate::store::StoreError;

impl Session {
    /// Stores that the session has ended, and tries without limit while the store is away. Otherwise the node would
    /// count as connected forever, and its power-off would never be proved.
    pub(super) async fn end(&self) {
        loop {
            match self.store_end().await {
                Ok(_) => return,
                Err(StoreError::Unavailable(_)) if !self.context.stop.is_cancelled() => {}
                Err(error) => {
                    let why = crate::chain(&error);
                    of_peer!(warn, &self.node, error = %cut(&why), "the end of a session was not stored");
                    return;
                }
            }
            // `stop` only wakes: the loop makes one last try, and then gives up.
            tokio::select! {
                () = self.context.stop.cancelled() => {}
                () = tokio::time::sleep(END_AGAIN) => {}
            }
        }
    }

    /// Stores the last words before the end, because they count only under the session in which the agent said them.
    async fn store_end(&self) -> Result<bool, StoreError> {
        let now = self.context.clock.now();
        if let Some(execution) = self.leaving.get()
            && self.context.store.say_goodbye(execution, self.epoch, now).await?
        {
            of_peer!(info, &self.node, %execution, "the node powers off");
        }
        self.context.store.end_session(&self.node, self.epoch, now).await
    }

    /// Notes that the agent ends because its machine powers off.
    pub(super) fn leave(&self, leaving: &v1::Leaving) -> Result<(), Ended> {
        if self.held {
            return Ok(());
        }
        let execution = self.own("leaving.execution", &leaving.execution)?;
        // A repeated Leaving changes nothing: the first one counts.
        let _ = self.leaving.set(execution);
        Ok(())
    }

    /// Stores that the node's journal does not hold an execution.
    pub(super) async fn not_held(&self, answer: v1::NotHeld) -> Result<(), Ended> {
        if self.held {
            return Ok(());
        }
        let execution = self.own("not_held.execution", &answer.execution)?;
        let busy_with = match answer.busy_with {
            None => None,
            Some(report) => Some(convert::report(report, &self.node).map_err(|error| Ended::Refused(error.into()))?),
        };
        let now = self.context.clock.now();
        of_peer!(warn, &self.node, %execution, busy = busy_with.is_some(), "the node does not hold an execution");
        match self.context.store.not_held(&execution, busy_with.as_ref(), self.epoch, now).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Ended::ByUs(End::Lost)),
            // Not kept: the dispatcher asks the node again.
            Err(StoreError::Unavailable(_)) => Ok(()),
            Err(error) => Err(store_down(error)),
        }
    }

    /// Parses the name of an execution. Refuses those of other nodes.
    fn own(&self, field: &str, name: &str) -> Result<ExecutionId, Ended> {
        let execution = ExecutionId::parse(name)
            .map_err(|error| Ended::Refused(ApiError::invalid(field, error.to_string()).into()))?;
        if execution.node != self.node {
            return Err(Ended::Refused(ApiError::invalid(field, "is not an execution of this node").into()));
        }
        Ok(execution)
    }
}
