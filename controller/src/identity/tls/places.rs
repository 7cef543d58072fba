//! The places of a listener's connections. A connection without an accepted credential is a stranger's: these are few
//! and short-lived, and the oldest gives way to a newcomer. An accepted one counts for its caller, and each caller has
//! a bounded number.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::incoming::MAX_HANDSHAKES;
use crate::identity::peer_log::of_peer;
use crate::identity::rate::source;
use crate::identity::roles::Role;

/// Connections of strangers to one listener: a room of Pis that enrols at once, and as many attackers.
pub const STRANGERS: usize = 256;
/// Lifetime of a connection on which no credential was accepted.
pub const STRANGER_AGE: Duration = Duration::from_secs(10);
/// Calls at a time on such a connection. More are refused with `REFUSED_STREAM`.
pub const STRANGER_STREAMS: u32 = 4;
/// Bytes of a call on such a connection: two PEM files and a token have less than half of it.
pub const STRANGER_MESSAGE: usize = 64 << 10;
/// Time for the last answer on a connection whose credential was refused.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);
/// Connections of one node to one listener: a session, a download, and those of an earlier boot that have not timed out
/// yet.
pub const OF_A_NODE: usize = 8;
/// Connections of one person, service or other controller to one listener: scripts run in parallel.
pub const OF_A_PERSON: usize = 128;
/// Fewest connections of a kind, even if the system grants very few files.
const LEAST: usize = 16;

/// Most connections of a listener, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Handshakes at a time.
    pub handshakes: usize,
    /// Connections of strangers.
    pub strangers: usize,
    /// Connections of strangers from one address.
    pub strangers_of_one: usize,
    /// Connections of nodes.
    pub nodes: usize,
    /// Connections of people, services and other controllers.
    pub people: usize,
}

impl Limits {
    /// Divides the files that the system grants this process. Three listeners take at most nine tenths, so that the
    /// store and downloads get the rest.
    pub fn of_files(files: usize) -> Self {
        let strangers = (files / 16).clamp(LEAST, STRANGERS);
        Self {
            // A thousand silent connections at once are sent away in one wave where a shell grants 20,000 files.
            handshakes: (files / 16).clamp(LEAST, MAX_HANDSHAKES),
            strangers,
            strangers_of_one: strangers / 2,
            nodes: (files / 32 * 11).max(LEAST),
            people: (files / 16).max(LEAST),
        }
    }

    /// Divides them for the file mirror, which has a file open for each connection that it serves.
    pub fn of_mirror(files: usize) -> Self {
        let places = mirror_places(files);
        Self { nodes: places, people: places, ..Self::of_files(files) }
    }
}

/// Downloads of the mirror at a time. Each has a connection and a file open.
pub const MIRROR_PLACES: usize = 512;

/// The mirror's share of the files that the system grants this process.
pub fn mirror_places(files: usize) -> usize {
    (files / 32).clamp(LEAST, MIRROR_PLACES)
}

/// The connections of one listener.
#[derive(Debug)]
pub struct Places {
    limits: Limits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// Connections whose certificate is being looked up. They count among the handshakes.
    arriving: HashMap<u64, (IpAddr, CancellationToken)>,
    /// By number, and so with the oldest first.
    strangers: BTreeMap<u64, (IpAddr, CancellationToken)>,
    addresses: HashMap<IpAddr, BTreeSet<u64>>,
    callers: HashMap<(Kind, String), BTreeMap<u64, CancellationToken>>,
    nodes: usize,
    people: usize,
}

/// The kind of a caller, by which it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Node,
    Person,
}

impl Taken {
    fn remove_unknown(&mut self, number: u64) -> Option<CancellationToken> {
        let arriving = self.arriving.remove(&number).map(|(_, end)| end);
        arriving.or_else(|| self.remove_stranger(number))
    }

    fn remove_stranger(&mut self, number: u64) -> Option<CancellationToken> {
        let (address, end) = self.strangers.remove(&number)?;
        if let Some(numbers) = self.addresses.get_mut(&address) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.addresses.remove(&address);
            }
        }
        Some(end)
    }

    fn count(&mut self, kind: Kind) -> &mut usize {
        match kind {
            Kind::Node => &mut self.nodes,
            Kind::Person => &mut self.people,
        }
    }

    fn connections_of(&self, caller: &(Kind, String)) -> usize {
        self.callers.get(caller).map_or(0, BTreeMap::len)
    }

    /// The caller of this kind with the most connections.
    fn greediest(&self, kind: Kind) -> Option<(Kind, String)> {
        let of_kind = self.callers.iter().filter(|(caller, _)| caller.0 == kind);
        of_kind.max_by_key(|(_, connections)| connections.len()).map(|(caller, _)| caller.clone())
    }

    fn end_oldest_of(&mut self, caller: &(Kind, String)) {
        let oldest = self.callers.get(caller).and_then(|connections| connections.keys().next().copied());
        if let Some(end) = oldest.and_then(|oldest| self.remove_of(caller, oldest)) {
            end.cancel();
        }
    }

    fn remove_of(&mut self, caller: &(Kind, String), number: u64) -> Option<CancellationToken> {
        let connections = self.callers.get_mut(caller)?;
        let end = connections.remove(&number)?;
        if connections.is_empty() {
            self.callers.remove(caller);
        }
        let count = self.count(caller.0);
        *count = count.saturating_sub(1);
        Some(end)
    }
}

impl Places {
    /// Places for these limits; all are free.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, taken: Mutex::default() })
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of a connection that ends its handshake. It is not a stranger's yet: among the strangers a crowd from
    /// the same address would push an operator out while the certificate is looked up.
    pub(super) fn arrive(self: &Arc<Self>, address: IpAddr) -> Place {
        let (address, end) = (source(address), CancellationToken::new());
        let mut taken = self.taken();
        let number = taken.next;
        taken.next += 1;
        taken.arriving.insert(number, (address, end.clone()));
        Place::new(number, end, Some(Arc::clone(self)))
    }

    /// Moves the place to the strangers, unless its credential was accepted meanwhile. At a limit the oldest stranger
    /// gives way: of this address, otherwise of all.
    fn enter(&self, number: u64) {
        let mut taken = self.taken();
        let Some((address, end)) = taken.arriving.remove(&number) else { return };
        let own = taken.addresses.get(&address);
        let oldest = match own {
            // The own address goes first, so that a crowd behind one address pushes out only itself.
            Some(own) if own.len() >= self.limits.strangers_of_one => own.first().copied(),
            _ if taken.strangers.len() >= self.limits.strangers => taken.strangers.keys().next().copied(),
            _ => None,
        };
        if let Some(old) = oldest.and_then(|oldest| taken.remove_stranger(oldest)) {
            old.cancel();
        }
        taken.strangers.insert(number, (address, end));
        taken.addresses.entry(address).or_default().insert(number);
    }

    /// Counts a stranger's connection for its caller from now on. At the caller's limit its oldest connection gives way. At
    /// the limit of the kind the oldest connection of the caller with the most gives way, so that one greedy caller shuts
    /// nobody out; the new connection does where no caller has two more than this one.
    fn accept(&self, number: u64, caller: &(Kind, String)) {
        let mut taken = self.taken();
        // Absent: it gave way a moment ago.
        let Some(end) = taken.remove_unknown(number) else { return };
        let (most, of_one) = match caller.0 {
            Kind::Node => (self.limits.nodes, OF_A_NODE),
            Kind::Person => (self.limits.people, OF_A_PERSON),
        };
        // The oldest gives way, because a node that lost power leaves connections behind that look alive.
        if taken.connections_of(caller) >= of_one {
            taken.end_oldest_of(caller);
        }
        if *taken.count(caller.0) >= most {
            // With one more as the bound, two callers would take turns in ending each other's connections.
            let fair = taken.connections_of(caller) + 1;
            match taken.greediest(caller.0).filter(|greediest| taken.connections_of(greediest) > fair) {
                Some(greediest) => taken.end_oldest_of(&greediest),
                None => {
                    // Logging takes a lock of its own.
                    drop(taken);
                    of_peer!(warn, caller.1.as_str(), most, kind = ?caller.0, "a connection was closed: too many of its kind");
                    end.cancel();
                    return;
                }
            }
        }
        *taken.count(caller.0) += 1;
        taken.callers.entry(caller.clone()).or_default().insert(number, end);
    }
}

/// The place of one connection; dropping it frees the place.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    places: Option<Arc<Places>>,
    end: CancellationToken,
    accepted: AtomicBool,
    refused: AtomicBool,
    caller: Mutex<Option<(Kind, String)>>,
    calls: AtomicUsize,
}

impl Place {
    /// The place of a connection that no listener counts.
    pub(super) fn detached() -> Self {
        Self::new(0, CancellationToken::new(), None)
    }

    fn new(number: u64, end: CancellationToken, places: Option<Arc<Places>>) -> Self {
        Self {
            number,
            places,
            end,
            accepted: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            caller: Mutex::new(None),
            calls: AtomicUsize::new(0),
        }
    }

    /// Ends the look-up of the certificate, if there is one.
    pub(super) fn enter(&self) {
        if let Some(places) = &self.places {
            places.enter(self.number);
        }
    }

    pub(super) fn is_accepted(&self) -> bool {
        self.accepted.load(Ordering::Acquire)
    }

    /// Accepts a credential of this caller. Only the first one counts: a proxy may pass on calls of several.
    pub(super) fn accept(&self, role: Role, name: &str) {
        if self.accepted.swap(true, Ordering::AcqRel) {
            return;
        }
        let caller = (if role == Role::Node { Kind::Node } else { Kind::Person }, name.to_owned());
        if let Some(places) = &self.places {
            // Before it is counted, so that dropping the place always finds the entry.
            *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(caller.clone());
            places.accept(self.number, &caller);
        }
    }

    pub(super) fn refuse(&self) {
        self.refused.store(true, Ordering::Release);
    }

    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }

    /// Resolves when the connection must give way.
    pub(super) fn gives_way(&self) -> WaitForCancellationFutureOwned {
        self.end.clone().cancelled_owned()
    }

    /// Counts a call of a stranger; false: it has as many as allowed.
    pub(super) fn begin_call(&self) -> bool {
        let most = usize::try_from(STRANGER_STREAMS).unwrap_or(usize::MAX);
        self.calls
            // In one step: calls of one connection run on several threads.
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |calls| (calls < most).then_some(calls + 1))
            .is_ok()
    }

    pub(super) fn end_call(&self) {
        self.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(places) = &self.places else { return };
        let mut taken = places.taken();
        // It may be in any of the lists, depending on how far the connection came.
        taken.remove_unknown(self.number);
        if let Some(caller) = self.caller.get_mut().unwrap_or_else(PoisonError::into_inner) {
            taken.remove_of(caller, self.number);
        }
    }
}

#[cfg(test)]
mod tests;
