//! Finds controllers: named, remembered, or found by asking the network. A found one is a hint: the agent continues
//! only with a controller that proves in TLS to be of the CA it knows, so a wrong answer only costs time.

mod address;
mod marcopolo;
mod mdns;
mod search;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use address::{Address, InvalidAddress};
pub use search::{CaHint, Found, Searcher, first, survey};

/// Method of finding controllers.
#[derive(Debug)]
pub enum Discovery {
    /// An operator named them.
    Fixed(Vec<Address>),
    /// Some may be known, and the network is asked for others.
    Search(Search),
}

/// The known controllers, and the searcher that asks for more.
#[derive(Debug)]
pub struct Search {
    known: Vec<Address>,
    fallback: Vec<Address>,
    searcher: Arc<Searcher>,
    /// Number of the searcher's last search whose result this agent took.
    seen: AtomicU64,
}

impl Search {
    /// Tries `known` before the controllers that are found, and `fallback` after them.
    pub fn new(known: Vec<Address>, fallback: Vec<Address>, searcher: Arc<Searcher>) -> Self {
        Self { known, fallback, searcher, seen: AtomicU64::new(0) }
    }
}

impl Discovery {
    /// Known APIs, host:port, in the order in which to try them.
    pub fn known(&self) -> Vec<String> {
        let (Self::Fixed(known) | Self::Search(Search { known, .. })) = self;
        known.iter().map(Address::api).collect()
    }

    /// APIs that were found, then the fallback, host:port.
    fn hints(&self) -> Vec<String> {
        let Self::Search(search) = self else { return Vec::new() };
        let found = search.searcher.latest();
        let found = found.iter().flat_map(Found::apis);
        found.chain(search.fallback.iter().map(Address::api)).collect()
    }

    /// Enrolment listeners of the controllers that were found, then of the fallback, host:port.
    pub fn listeners(&self) -> Vec<String> {
        let Self::Search(search) = self else { return Vec::new() };
        let found = search.searcher.latest();
        let found = found.iter().flat_map(Found::listeners);
        found.chain(search.fallback.iter().map(Address::enroll_beside)).collect()
    }

    /// True if the agent may ask the network.
    pub fn searches(&self) -> bool {
        matches!(self, Self::Search(_))
    }

    /// Asks the network, or takes the result of another agent of this process that asked since. Takes a few seconds.
    /// Leaves out controllers that claim another CA.
    pub async fn look(&self, ca: &CaHint) {
        if let Self::Search(search) = self {
            let seen = search.searcher.look(search.seen.load(Ordering::Relaxed), ca).await;
            search.seen.store(seen, Ordering::Relaxed);
        }
    }

    /// Records that the last result led to a controller.
    pub fn worked(&self) {
        if let Self::Search(search) = self {
            search.searcher.worked();
        }
    }
}

/// Most controllers that are remembered of those that a controller names.
const MOST_TOLD: usize = 16;

/// Controller addresses, given and learned. The given ones are tried first, in their order, then the learned ones.
#[derive(Debug)]
pub struct Controllers {
    given: Discovery,
    told: Mutex<Vec<String>>,
    /// File that keeps the learned addresses over a restart. `None`: they are not kept.
    file: Option<PathBuf>,
}

impl Controllers {
    /// Only the given controllers.
    pub fn given(given: Discovery) -> Self {
        Self { given, told: Mutex::default(), file: None }
    }

    /// The given controllers, and those that this file remembers. An invalid file counts as missing.
    pub fn remembered(given: Discovery, file: PathBuf) -> Self {
        let told: Vec<String> =
            crate::durable::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { given, told: Mutex::new(usable(&told)), file: Some(file) }
    }

    /// API addresses, host:port, in the order in which to try them.
    pub fn in_order(&self) -> Vec<String> {
        unique(self.given.known().into_iter().chain(self.lock().clone()).chain(self.given.hints()))
    }

    /// Addresses of enrolment listeners, host:port: the named ones first, then those of the controllers.
    pub fn listeners(&self, named: &[String]) -> Vec<String> {
        let beside = |api: String| api.parse::<Address>().ok().map(|api| api.enroll_beside());
        let told: Vec<String> = self.lock().iter().cloned().filter_map(beside).collect();
        unique(named.iter().cloned().chain(told).chain(self.given.listeners()))
    }

    /// True if an operator named them. Then the network is not asked.
    pub fn are_named(&self) -> bool {
        !self.given.searches()
    }

    /// Asks the network for controllers, if they are found that way.
    pub async fn look_again(&self, ca: &CaHint) {
        self.given.look(ca).await;
    }

    /// Takes the list of live controllers that the controller at `address` sent. An empty list changes nothing: that
    /// controller does not know its own address. A found controller is remembered too, so that a restart needs no
    /// search.
    pub fn learn(&self, address: &str, live: &[String]) {
        self.given.worked();
        let mut live = usable(live);
        if live.is_empty() {
            live.clone_from(&self.lock());
        }
        // A named address is known anyway. A found one would be lost at a restart.
        if self.given.searches() && !live.iter().any(|known| known == address) {
            live.insert(0, address.to_owned());
            live.truncate(MOST_TOLD);
        }
        if live.is_empty() || *self.lock() == live {
            return;
        }
        self.lock().clone_from(&live);
        let Some(file) = &self.file else { return };
        let written = serde_json::to_vec(&live)
            .map_err(std::io::Error::from)
            .and_then(|contents| crate::durable::replace(file, &contents, 0o644));
        // Best effort: after a restart the network is asked again.
        if let Err(error) = written {
            tracing::warn!(error = %error, "the live controllers are not remembered");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes repetitions. The first occurrence counts.
fn unique(addresses: impl Iterator<Item = String>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for address in addresses {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// The valid addresses, as host:port, at most [`MOST_TOLD`].
fn usable(texts: &[String]) -> Vec<String> {
    let addresses = texts.iter().filter_map(|text| text.parse::<Address>().ok());
    addresses.map(|address| address.api()).take(MOST_TOLD).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Controllers, Discovery, Search, Searcher};

    #[test]
    fn what_is_found_comes_after_what_is_known_and_is_remembered_when_it_worked() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("live.json");
        let controllers = |searcher| {
            let (known, fallback) = (vec!["known".parse().unwrap()], vec!["last:9".parse().unwrap()]);
            let search = Search::new(known, fallback, Arc::new(searcher));
            Controllers::remembered(Discovery::Search(search), file.clone())
        };
        let found = controllers(Searcher::with(vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]));
        assert_eq!(found.in_order(), ["known:1346", "10.0.0.1:1", "[fd00::1]:1", "last:9"]);
        assert_eq!(found.listeners(&["named:3".to_owned()]), ["named:3", "10.0.0.1:2", "[fd00::1]:2", "last:1347"]);
        // An empty list: the controller does not know its own address.
        found.learn("[fd00::1]:1", &[]);
        assert_eq!(found.in_order(), ["known:1346", "[fd00::1]:1", "10.0.0.1:1", "last:9"]);
        let later = controllers(Searcher::default());
        assert_eq!(later.in_order(), ["known:1346", "[fd00::1]:1", "last:9"]);
        assert_eq!(later.listeners(&[]), ["[fd00::1]:1347", "last:1347"]);
    }

    #[test]
    fn the_given_controllers_come_first_and_the_told_ones_are_remembered() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let given = || Discovery::Fixed(vec!["a".parse().unwrap(), "b:1".parse().unwrap()]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("live.json");
        let controllers = Controllers::remembered(given(), file.clone());
        assert_eq!(controllers.in_order(), ["a:1346", "b:1"]);
        controllers.learn("b:1", &texts(&["c:2", "b:1", "no address", "d"]));
        assert_eq!(controllers.in_order(), ["a:1346", "b:1", "c:2", "d:1346"]);
        controllers.learn("b:1", &[]);
        let again = Controllers::remembered(given(), file.clone());
        assert_eq!(again.in_order(), ["a:1346", "b:1", "c:2", "d:1346"]);
        again.learn("b:1", &texts(&["e:3"]));
        assert_eq!(Controllers::remembered(given(), file.clone()).in_order(), ["a:1346", "b:1", "e:3"]);
        // A torn file must not keep the node from its given controllers.
        std::fs::write(&file, "{").unwrap();
        assert_eq!(Controllers::remembered(given(), file).in_order(), ["a:1346", "b:1"]);
    }
}
