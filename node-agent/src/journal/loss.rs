//! A journal that was lost, or whose newest copy was. The node says so, since it may have done what the journal does not
//! hold.

use std::sync::PoisonError;

use serde::{Deserialize, Serialize};

use super::{Entry, Journal, JournalError, Needed};
use crate::health::Ailment;

/// A loss, as it is journalled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Loss {
    /// A sentence for operators.
    message: String,
    /// A controller has answered a Hello that said so.
    #[serde(default)]
    told: bool,
}

impl Loss {
    pub(super) fn new(message: String) -> Self {
        Self { message, told: false }
    }
}

impl Journal {
    pub(super) fn loss(&self) -> Option<Loss> {
        self.loss.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_loss(&self, loss: Option<Loss>) {
        self.health.set(Ailment::JournalLost, loss.as_ref().map(|loss| loss.message.clone()));
        *self.loss.lock().unwrap_or_else(PoisonError::into_inner) = loss;
    }

    /// Shows a loss of which the file tells, unless it is over: a controller knows of it, and nothing in the journal
    /// waits.
    pub(super) fn remember_loss(&self, loss: Option<Loss>) {
        self.set_loss(loss.filter(|loss| !(loss.told && self.entries().are_settled())));
    }

    /// True if the journal, or its newest copy, was lost, and no controller has answered a Hello that says so.
    pub fn is_lost(&self) -> bool {
        self.loss().is_some_and(|loss| !loss.told)
    }

    /// Notes that a controller has answered a Hello that says so. The node stays ill until a start at which everything
    /// in the journal is settled.
    pub async fn loss_told(&self) -> Result<(), JournalError> {
        let Some(loss) = self.loss() else { return Ok(()) };
        self.set_loss(Some(Loss { told: true, ..loss }));
        self.probe().await
    }

    /// Takes up, in the installer, a job that the running system left on the card; one that is known stays as it is. The
    /// running system left a journal with it, so a job that the journal lacks shows that the journal was lost.
    pub async fn adopt(&self, entry: Entry) -> Result<(), JournalError> {
        if self.entries().get(&entry.execution).is_some() {
            return Ok(());
        }
        if !self.is_lost() {
            tracing::error!(execution = %entry.execution, "installer's journal lost, job taken from install.json");
            self.set_loss(Some(Loss::new("the installer's journal was lost; it goes by install.json".to_owned())));
        }
        self.change(Needed::InMemory, |entries, _| {
            entries.0.push(Entry { torn: true, ..entry });
            Ok(())
        })
        .await
    }
}
