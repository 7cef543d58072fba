//! Limits of one caller's calls, over all methods: answers that it does not read and messages that it sends by halves
//! are kept in memory. Before the caller is known, its look-ups in the database are limited: the database's connections
//! are shared by all.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Caller;
use super::roles::Role;

/// Open calls of one person, service or other controller: dashboards watch, scripts run in parallel.
pub const OF_A_PERSON: usize = 128;
/// Open calls of one node, without its session.
pub const OF_A_NODE: usize = 16;
/// Calls of one caller whose message is being received, at most 1 MiB each.
pub const RECEIVING: usize = 8;
/// Further calls of one caller that wait for one of these to end.
pub const WAITING: usize = 512;
/// Time for which such a call waits.
const PATIENCE: Duration = Duration::from_secs(20);
/// Look-ups of one credential in the database at a time. One HTTP/2 connection opens a hundred calls at once, and all
/// that wait for the database would be before the next caller's.
pub const LOOKUPS: usize = 2;

/// Values by key; each lives while it is in use.
#[derive(Debug)]
struct InUse<K, V>(Mutex<HashMap<K, Weak<V>>>);

impl<K, V> Default for InUse<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V> InUse<K, V> {
    fn of(&self, key: K, new: impl FnOnce() -> V) -> Arc<V> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = known.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        // Unused values are removed when the map would grow; that is rare enough to walk the whole map.
        if known.len() == known.capacity() {
            known.retain(|_, value| value.strong_count() > 0);
        }
        let value = Arc::new(new());
        known.insert(key, Arc::downgrade(&value));
        value
    }
}

/// Quotas and look-ups of all callers.
#[derive(Debug, Default)]
pub(super) struct Callers {
    known: InUse<(Role, String), Quota>,
    lookups: InUse<Credential, Semaphore>,
}

/// A caller's key before it is looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Credential {
    /// A certificate of the CA, by its serial number.
    Certificate(String),
    /// A token, which may be invalid, by the address that shows it. Its text is no key: guesses differ each time.
    TokenFrom(IpAddr),
}

/// The quotas of one caller.
#[derive(Debug)]
struct Quota {
    open: Arc<Semaphore>,
    receiving: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Callers {
    fn quota(&self, caller: &Caller) -> Arc<Quota> {
        let open = if caller.role == Role::Node { OF_A_NODE } else { OF_A_PERSON };
        // Not by credential: a user with several certificates is one caller.
        self.known.of((caller.role, caller.name.clone()), || Quota {
            open: Arc::new(Semaphore::new(open)),
            receiving: Arc::new(Semaphore::new(RECEIVING)),
            // The open calls hold a place here too, so this bounds the memory of the queue.
            waiting: Arc::new(Semaphore::new(open + WAITING)),
        })
    }

    /// Waits for a turn to look this credential up; the turn ends when the answer is dropped. Dropping the wait loses
    /// nothing.
    pub(super) async fn lookup(&self, credential: Credential) -> Option<OwnedSemaphorePermit> {
        // Never `None`: the semaphore is not closed.
        self.lookups.of(credential, || Semaphore::new(LOOKUPS)).acquire_owned().await.ok()
    }

    /// Begins a call; `None`: the caller has too many open calls, and none of them ended in time.
    pub(super) async fn begin(&self, caller: &Caller) -> Option<OpenCall> {
        let quota = self.quota(caller);
        // Refused at once beyond the queue; only within it does a call wait.
        let waiting = Arc::clone(&quota.waiting).try_acquire_owned().ok()?;
        let open = tokio::time::timeout(PATIENCE, Arc::clone(&quota.open).acquire_owned()).await.ok()?.ok()?;
        Some(OpenCall { quota, _waiting: waiting, _open: open })
    }
}

/// An open call; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct OpenCall {
    quota: Arc<Quota>,
    _waiting: OwnedSemaphorePermit,
    _open: OwnedSemaphorePermit,
}

impl OpenCall {
    /// Waits until the call's message may be received. Dropping the wait loses nothing.
    pub(super) async fn receiving(&self) -> Option<OwnedSemaphorePermit> {
        // Never `None`: the semaphore is not closed.
        Arc::clone(&self.quota.receiving).acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt as _;

    use super::{Callers, Credential, LOOKUPS, OF_A_NODE, RECEIVING, WAITING};
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
    async fn one_credential_is_looked_up_few_times_at_once_whoever_else_is() {
        let callers = Callers::default();
        let certificate = |serial: &str| Credential::Certificate(serial.to_owned());
        let greedy: Vec<Credential> = vec![certificate("01"), Credential::TokenFrom("192.0.2.1".parse().unwrap())];
        let mut held = Vec::new();
        for credential in &greedy {
            for _ in 0..LOOKUPS {
                held.push(callers.lookup(credential.clone()).await.unwrap());
            }
            assert!(callers.lookup(credential.clone()).now_or_never().is_none(), "{credential:?}");
        }
        for other in [certificate("02"), Credential::TokenFrom("192.0.2.2".parse().unwrap())] {
            assert!(callers.lookup(other).now_or_never().is_some());
        }
        held.clear();
        assert!(greedy.into_iter().all(|credential| callers.lookup(credential).now_or_never().is_some()));
    }

    #[tokio::test]
    async fn half_sent_messages_are_few_and_callers_are_forgotten() {
        let callers = Callers::default();
        for number in 0..1000 {
            drop(callers.begin(&caller(Role::Viewer, &number.to_string())).await);
        }
        assert!(callers.known.0.lock().unwrap().len() < 1000);
        let admin = caller(Role::Admin, "admin");
        let call = callers.begin(&admin).await.unwrap();
        let mut halves = Vec::new();
        for _ in 0..RECEIVING {
            halves.push(call.receiving().await.unwrap());
        }
        assert!(call.receiving().now_or_never().is_none());
    }
}
