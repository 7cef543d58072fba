//! How many calls one caller has open at a time, whatever it calls: what it does not read is kept for it, and what it sends
//! by halves too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Caller;
use super::roles::Role;

/// Open calls of one person, service or other controller: dashboards watch, scripts run in parallel.
pub const OF_A_PERSON: usize = 128;
/// Open calls of one node besides its session.
pub const OF_A_NODE: usize = 16;
/// Calls of one caller whose message is being received, at most 1 MiB each.
pub const RECEIVING: usize = 8;
/// Further calls of one caller that wait for one of these to end.
pub const WAITING: usize = 512;
/// How long such a call waits.
const PATIENCE: Duration = Duration::from_secs(20);

/// The calls of all callers.
#[derive(Debug, Default)]
pub(super) struct Callers {
    known: Mutex<HashMap<(Role, String), Weak<Quota>>>,
}

/// The calls of one caller.
#[derive(Debug)]
struct Quota {
    open: Arc<Semaphore>,
    receiving: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Callers {
    fn quota(&self, caller: &Caller) -> Arc<Quota> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (caller.role, caller.name.clone());
        if let Some(quota) = known.get(&key).and_then(Weak::upgrade) {
            return quota;
        }
        // Callers without an open call are forgotten when the map would grow.
        if known.len() == known.capacity() {
            known.retain(|_, quota| quota.strong_count() > 0);
        }
        let open = if caller.role == Role::Node { OF_A_NODE } else { OF_A_PERSON };
        let quota = Arc::new(Quota {
            open: Arc::new(Semaphore::new(open)),
            receiving: Arc::new(Semaphore::new(RECEIVING)),
            waiting: Arc::new(Semaphore::new(open + WAITING)),
        });
        known.insert(key, Arc::downgrade(&quota));
        quota
    }

    /// Begins a call; `None`: the caller has too many open and none of them ended in time.
    pub(super) async fn begin(&self, caller: &Caller) -> Option<OpenCall> {
        let quota = self.quota(caller);
        let waiting = Arc::clone(&quota.waiting).try_acquire_owned().ok()?;
        let open = tokio::time::timeout(PATIENCE, Arc::clone(&quota.open).acquire_owned()).await.ok()?.ok()?;
        Some(OpenCall { quota, _waiting: waiting, _open: open })
    }
}

/// An open call, until this is dropped.
#[derive(Debug)]
pub(super) struct OpenCall {
    quota: Arc<Quota>,
    _waiting: OwnedSemaphorePermit,
    _open: OwnedSemaphorePermit,
}

impl OpenCall {
    /// Waits until the call's message may be received. Dropping the wait loses nothing.
    pub(super) async fn receiving(&self) -> Option<OwnedSemaphorePermit> {
        // `None`: never, because nobody closes it.
        Arc::clone(&self.quota.receiving).acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt as _;

    use super::{Callers, OF_A_NODE, RECEIVING, WAITING};
    use crate::identity::roles::Role;
    use crate::identity::{Caller, Pass};
    use crate::store::Scope;

    fn caller(role: Role, name: &str) -> Caller {
        Caller {
            name: name.to_owned(),
            role,
            node: None,
            from: "127.0.0.1:1".parse().unwrap(),
            serial: String::new(),
            api_token: None,
            pass: Arc::new(Pass::new(Scope::everything())),
        }
    }

    #[tokio::test]
    async fn one_caller_takes_no_call_of_another() {
        let callers = Callers::default();
        let (greedy, other) = (caller(Role::Node, "greedy"), caller(Role::Node, "other"));
        let mut open = Vec::new();
        for _ in 0..OF_A_NODE {
            open.push(callers.begin(&greedy).await.unwrap());
        }
        let mut waiting: Vec<_> = (0..WAITING).map(|_| Box::pin(callers.begin(&greedy))).collect();
        assert!(waiting.iter_mut().all(|wait| wait.now_or_never().is_none()));
        assert!(callers.begin(&greedy).await.is_none(), "one that waits too many is refused at once");
        callers.begin(&other).await.unwrap();
        open.pop();
        assert!(waiting.first_mut().unwrap().now_or_never().is_some());
    }

    #[tokio::test]
    async fn half_sent_messages_are_few_and_callers_are_forgotten() {
        let callers = Callers::default();
        for number in 0..1000 {
            drop(callers.begin(&caller(Role::Viewer, &number.to_string())).await);
        }
        assert!(callers.known.lock().unwrap().len() < 1000);
        let admin = caller(Role::Admin, "admin");
        let call = callers.begin(&admin).await.unwrap();
        let mut halves = Vec::new();
        for _ in 0..RECEIVING {
            halves.push(call.receiving().await.unwrap());
        }
        assert!(call.receiving().now_or_never().is_none());
    }
}
