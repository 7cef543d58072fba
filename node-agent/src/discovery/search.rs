//! Asks the network for controllers: mDNS first, MarcoPolo after it.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::address::Address;
use super::{marcopolo, mdns};
use crate::cause::chain;

/// Time for mDNS: two questions, a second apart, and the answers to the last one.
const WINDOW: Duration = Duration::from_secs(2);
/// Time for other answers after the first one.
const SETTLE: Duration = Duration::from_millis(300);
/// Most answers that are kept. A network with more is hostile or very large, and each search keeps a random choice.
const MOST: usize = 64;
/// Answers that wait for the searcher.
const QUEUE: usize = 16;
/// Age up to which an agent takes another agent's result instead of asking.
const STALE: Duration = Duration::from_secs(10);

/// The first 16 hexadecimal digits of a CA's pin, as a controller claims them. Not a proof: any sender can claim them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaHint(String);

impl CaHint {
    const DIGITS: usize = 16;

    /// Hint of a pin: the SHA-256 of the CA's SubjectPublicKeyInfo.
    pub fn of(pin: &[u8; 32]) -> Self {
        Self(hex::encode(pin).chars().take(Self::DIGITS).collect())
    }

    /// Reads the hint of an answer. `None`: not a hint.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let sound = text.len() == Self::DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        sound.then(|| Self(text.to_ascii_lowercase()))
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Addresses in the order in which to try them; at least one.
    pub(super) addresses: Vec<IpAddr>,
    /// Port of its API.
    pub(super) api: u16,
    /// Port of its enrolment listener.
    pub(super) enroll: u16,
    /// CA that it claims. `None`: it claims none.
    pub(super) ca: Option<CaHint>,
    /// Name that it claims. A later answer of the same name replaces this one.
    pub(super) name: String,
}

impl Found {
    /// Its APIs, host:port.
    pub(super) fn apis(&self) -> impl Iterator<Item = String> {
        self.addresses.iter().map(|ip| Address::found(*ip, self.api).api())
    }

    /// Its enrolment listeners, host:port.
    pub(super) fn listeners(&self) -> impl Iterator<Item = String> {
        self.addresses.iter().map(|ip| Address::found(*ip, self.enroll).api())
    }

    /// The address to try first.
    pub fn address(&self) -> Option<IpAddr> {
        self.addresses.first().copied()
    }
}

/// The answers, one for each name.
#[derive(Default)]
struct Answers {
    kept: Vec<Found>,
    /// Answers with a name that was not kept when they came.
    seen: usize,
}

impl Answers {
    fn take(&mut self, found: Found) {
        if let Some(known) = self.kept.iter_mut().find(|known| known.name == found.name) {
            *known = found;
            return;
        }
        self.seen = self.seen.saturating_add(1);
        if self.kept.len() < MOST {
            self.kept.push(found);
            return;
        }
        // Reservoir sampling: each answer stays with the same chance. If every late answer replaced another one, a flood of
        // forged answers would push the real one out almost for certain.
        let place = usize::try_from(getrandom::u32().unwrap_or_default()).unwrap_or_default() % self.seen;
        if let Some(other) = self.kept.get_mut(place) {
            *other = found;
        }
    }
}

/// Asks both ways at once, to the end. Returns all answers.
pub async fn survey() -> Vec<Found> {
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let asking = async {
        tokio::join!(report("mDNS", mdns::ask(&sender, WINDOW)), report("MarcoPolo", marcopolo::ask(&sender, false)));
        drop(sender);
    };
    let mut answers = Answers::default();
    let listening = async {
        while let Some(found) = receiver.recv().await {
            answers.take(found);
        }
    };
    tokio::join!(asking, listening);
    let mut found = answers.kept;
    // A controller on this machine answers too. Its loopback address means nothing to other machines.
    let elsewhere = |found: &Found| found.address().is_some_and(|ip| !ip.is_loopback());
    if found.iter().any(elsewhere) {
        found.retain(elsewhere);
    }
    found
}

/// Asks both ways at once and returns the first answer.
pub async fn first() -> Option<Found> {
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let asking = async {
        tokio::join!(report("mDNS", mdns::ask(&sender, WINDOW)), report("MarcoPolo", marcopolo::ask(&sender, false)));
        drop(sender);
    };
    // Later answers are dropped.
    tokio::select! {
        biased;
        found = receiver.recv() => found,
        () = asking => receiver.try_recv().ok(),
    }
}

/// A method that does not work on this machine is logged and counts as no answer.
async fn report(way: &str, asking: impl Future<Output = Result<(), impl std::error::Error>>) {
    if let Err(error) = asking.await {
        tracing::info!(error = %chain(&error), "{way} cannot ask for controllers");
    }
}

/// Asks the network on behalf of all agents of this process, and keeps the result.
#[derive(Debug, Default)]
pub struct Searcher {
    state: Mutex<State>,
    /// Held during a search.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    found: Vec<Found>,
    /// Number of searches so far.
    times: u64,
    /// Time of the last search.
    last: Option<Instant>,
    /// True if the last result has led to a controller since.
    worked: bool,
}

impl Searcher {
    /// Result of the last search that had one.
    pub(super) fn latest(&self) -> Vec<Found> {
        self.lock().found.clone()
    }

    /// Records that the last result led to a controller. The next search need not be thorough.
    pub(super) fn worked(&self) {
        self.lock().worked = true;
    }

    /// Searches, unless another agent did after search `seen`. Returns the number of the search whose result is there
    /// now.
    pub(super) async fn look(&self, seen: u64, ca: &CaHint) -> u64 {
        // There can be no answer. The agent's next try comes sooner than the end of a search.
        if !is_connected() {
            return seen;
        }
        // One search for all virtual Pis of a process: a thousand at once would flood the network.
        let _asking = self.asking.lock().await;
        let thorough = {
            let state = self.lock();
            let fresh = state.last.is_some_and(|last| last.elapsed() < STALE);
            if state.times > seen && fresh {
                return state.times;
            }
            // The last result did not help: another controller may be hidden behind the first that answered.
            state.times > 0 && !state.worked
        };
        let found = ask(thorough, ca).await;
        let mut state = self.lock();
        state.times += 1;
        state.last = Some(Instant::now());
        state.worked = false;
        tracing::info!(
            thorough,
            found = found.iter().flat_map(Found::apis).collect::<Vec<_>>().join(" "),
            "the network was asked for controllers"
        );
        // A network that is down for a moment does not invalidate the last result.
        if !found.is_empty() {
            state.found = found;
        }
        state.times
    }

    /// A searcher that found these addresses.
    #[cfg(test)]
    pub(super) fn with(addresses: Vec<IpAddr>) -> Self {
        let found = Found { addresses, api: 1, enroll: 2, ca: None, name: String::new() };
        let state = State { found: vec![found], ..State::default() };
        Self { state: Mutex::new(state), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// True if this machine has an address at which others can reach it, or if that is unknown.
fn is_connected() -> bool {
    let reaches = |interface: &if_addrs::Interface| {
        // Each interface that is up gives itself an IPv6 link-local address, long before the network is usable.
        let given_to_itself = interface.addr.ip().is_ipv6() && interface.is_link_local();
        interface.is_oper_up() && !interface.is_loopback() && !given_to_itself
    };
    if_addrs::get_if_addrs().map_or(true, |interfaces| interfaces.iter().any(reaches))
}

/// Asks by mDNS, then by MarcoPolo if there was no answer or all answers are wanted. Controllers that claim our CA come
/// first, those that claim another are left out.
async fn ask(thorough: bool, ca: &CaHint) -> Vec<Found> {
    let mut answers = Answers::default();
    let ours = |found: &Found| found.ca.as_ref().is_none_or(|said| said == ca);
    collect(&mut answers, if thorough { WINDOW } else { SETTLE }, ours, async |sender| {
        report("mDNS", mdns::ask(&sender, WINDOW)).await;
    })
    .await;
    if thorough || answers.kept.is_empty() {
        // Long enough for MarcoPolo's six rounds of a second in two groups.
        let all = WINDOW * 5;
        collect(&mut answers, all, ours, async |sender| {
            report("MarcoPolo", marcopolo::ask(&sender, thorough)).await;
        })
        .await;
    }
    let mut found = answers.kept;
    // An answer by MarcoPolo claims no CA. It may be our controller, but is tried last.
    found.sort_by_key(|found| found.ca.is_none());
    found
}

/// Takes answers until the search ends, or for `settle` after the first.
async fn collect(
    answers: &mut Answers,
    settle: Duration,
    wanted: impl Fn(&Found) -> bool,
    asking: impl AsyncFnOnce(mpsc::Sender<Found>),
) {
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let listening = async {
        let mut end = None;
        loop {
            let next = match end {
                None => receiver.recv().await,
                Some(end) => tokio::time::timeout_at(end, receiver.recv()).await.unwrap_or_default(),
            };
            let Some(found) = next else { return };
            if wanted(&found) {
                answers.take(found);
                end.get_or_insert_with(|| Instant::now() + settle);
            }
        }
    };
    tokio::pin!(listening);
    // A search that lasts longer than the listening is dropped.
    tokio::select! {
        () = &mut listening => {}
        () = asking(sender) => listening.await,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Answers, CaHint, Found, MOST, collect};

    fn found(name: &str, ca: Option<&str>) -> Found {
        let addresses = vec!["10.0.0.1".parse().unwrap()];
        Found { addresses, api: 1, enroll: 2, ca: ca.and_then(CaHint::parse), name: name.to_owned() }
    }

    #[test]
    fn a_hint_is_the_beginning_of_the_pin() {
        let hint = CaHint::of(&[0xAB; 32]);
        assert_eq!(CaHint::parse("ABABABABABABABAB").unwrap(), hint);
        for text in ["", "ababababababababab", "abababababababa", "abababababababag"] {
            assert_eq!(CaHint::parse(text), None, "{text}");
        }
    }

    #[test]
    fn many_answers_are_bounded_and_each_has_a_chance() {
        let mut answers = Answers::default();
        for number in 0..10_000 {
            answers.take(found(&number.to_string(), None));
        }
        assert_eq!(answers.kept.len(), MOST);
        assert!(answers.kept.iter().any(|found| found.name.parse::<usize>().unwrap() > 5_000));
        assert!(answers.kept.iter().all(|found| found.apis().eq(["10.0.0.1:1"])));
    }

    #[test]
    fn early_answer_has_the_chance_of_a_late_one() {
        let mut early = 0;
        for _ in 0..200 {
            let mut answers = Answers::default();
            for number in 0..10 * MOST {
                answers.take(found(&number.to_string(), None));
            }
            early += answers.kept.iter().filter(|found| found.name.parse::<usize>().unwrap() < MOST).count();
        }
        // A tenth of 200 times MOST is 1,280 with MOST at 64; six standard deviations are about 200.
        let expected = 20 * MOST;
        assert!(early.abs_diff(expected) < expected / 5, "{early} of {expected}");
    }

    #[tokio::test]
    async fn who_asks_on_is_not_waited_for_when_somebody_answered() {
        let wanted = |found: &Found| found.ca.is_none();
        let names = |answers: Answers| answers.kept.into_iter().map(|found| found.name).collect::<Vec<_>>();
        let mut answers = Answers::default();
        collect(&mut answers, Duration::from_millis(50), wanted, async |sender| {
            for (name, ca) in [("foreign", Some("abababababababab")), ("one", None), ("one", None), ("two", None)] {
                sender.send(found(name, ca)).await.unwrap();
            }
            std::future::pending().await
        })
        .await;
        assert_eq!(names(answers), ["one", "two"]);
        // Without an answer, until the search ends.
        let mut answers = Answers::default();
        collect(&mut answers, Duration::MAX, wanted, async |_| {}).await;
        assert_eq!(names(answers), [""; 0]);
    }
}
