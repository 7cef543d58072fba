//! Asks the network for controllers: mDNS first, MarcoPolo after it.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::address::Address;
use super::{marcopolo, mdns};
use crate::cause::chain;

/// How long mDNS may take: two questions, a second apart, and the answers to the last one.
const WINDOW: Duration = Duration::from_secs(2);
/// How long others may still answer when one has.
const SETTLE: Duration = Duration::from_millis(300);
/// Answers that are looked at. A network that gives more is hostile or very large; every search takes others of them.
const MOST: usize = 64;
/// Answers that wait to be looked at.
const QUEUE: usize = 16;
/// What was found so long ago is asked for again by an agent that begins.
const STALE: Duration = Duration::from_secs(10);

/// The first 16 hexadecimal digits of a CA's pin: what controllers say of theirs, and anybody may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaHint(String);

impl CaHint {
    const DIGITS: usize = 16;

    /// Of a pin: the SHA-256 of the CA's SubjectPublicKeyInfo.
    pub fn of(pin: &[u8; 32]) -> Self {
        Self(hex::encode(pin).chars().take(Self::DIGITS).collect())
    }

    /// As somebody says it; none when it makes no sense.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let sound = text.len() == Self::DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        sound.then(|| Self(text.to_ascii_lowercase()))
    }
}

/// Somebody who answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its addresses, the one to be tried first first; there is one at least.
    pub(super) addresses: Vec<IpAddr>,
    /// Port of its API.
    pub(super) api: u16,
    /// Port of its enrolment listener.
    pub(super) enroll: u16,
    /// Of which CA it says to be.
    pub(super) ca: Option<CaHint>,
    /// Who it says to be: another answer of the same one takes this one's place.
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

    /// The address to be tried first.
    pub fn address(&self) -> Option<IpAddr> {
        self.addresses.first().copied()
    }
}

/// Answers as they came, each answerer once.
#[derive(Default)]
struct Answers(Vec<Found>);

impl Answers {
    fn take(&mut self, found: Found) {
        if let Some(known) = self.0.iter_mut().find(|known| known.name == found.name) {
            *known = found;
        } else if self.0.len() < MOST {
            self.0.push(found);
        } else {
            // Of too many, each has the same chance to be among those that are kept.
            let place = usize::try_from(getrandom::u32().unwrap_or_default()).unwrap_or_default() % MOST;
            if let Some(other) = self.0.get_mut(place) {
                *other = found;
            }
        }
    }
}

/// Asks both ways at once, to the end: whoever answers, best first.
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
    let mut found = answers.0;
    // A controller of this very machine is heard here as well; that address means nothing to others.
    let elsewhere = |found: &Found| found.address().is_some_and(|ip| !ip.is_loopback());
    if found.iter().any(elsewhere) {
        found.retain(elsewhere);
    }
    found
}

/// Asks both ways at once, until somebody answers.
pub async fn first() -> Option<Found> {
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let asking = async {
        tokio::join!(report("mDNS", mdns::ask(&sender, WINDOW)), report("MarcoPolo", marcopolo::ask(&sender, false)));
        drop(sender);
    };
    // Whoever would have answered later is not wanted.
    tokio::select! {
        biased;
        found = receiver.recv() => found,
        () = asking => receiver.try_recv().ok(),
    }
}

/// A way that does not work here is not an answer.
async fn report(way: &str, asking: impl Future<Output = Result<(), impl std::error::Error>>) {
    if let Err(error) = asking.await {
        tracing::info!(error = %chain(&error), "{way} cannot ask for controllers");
    }
}

/// Asks the network for all agents of this process, and remembers the answers.
#[derive(Debug, Default)]
pub struct Searcher {
    state: Mutex<State>,
    /// Held while somebody asks.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    found: Vec<Found>,
    /// How often it was asked.
    times: u64,
    /// When.
    last: Option<Instant>,
    /// Whether what was found last has proved to be a controller since.
    worked: bool,
}

impl Searcher {
    /// What was found last.
    pub(super) fn latest(&self) -> Vec<Found> {
        self.lock().found.clone()
    }

    /// What was found proved to be good: the next search need not be thorough.
    pub(super) fn worked(&self) {
        self.lock().worked = true;
    }

    /// Asks, unless somebody else did after `seen`; answers the number of the search whose answers are there now.
    pub(super) async fn look(&self, seen: u64, ca: &CaHint) -> u64 {
        // Nobody can answer: whoever waits for the network tries again before a search would end.
        if !is_connected() {
            return seen;
        }
        let _asking = self.asking.lock().await;
        let thorough = {
            let state = self.lock();
            let fresh = state.last.is_some_and(|last| last.elapsed() < STALE);
            if state.times > seen && fresh {
                return state.times;
            }
            // What was found before did not help: somebody else may hide behind who answers first.
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
        // A network that is down for a moment does not make the old answers wrong.
        if !found.is_empty() {
            state.found = found;
        }
        state.times
    }

    /// One that found somebody at these addresses.
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

/// Whether this machine has an address by which others could reach it. Where that cannot be told, it may.
fn is_connected() -> bool {
    let reaches = |interface: &if_addrs::Interface| {
        // Every interface that is up gives itself one of IPv6, long before it is of use.
        let given_to_itself = interface.addr.ip().is_ipv6() && interface.is_link_local();
        interface.is_oper_up() && !interface.is_loopback() && !given_to_itself
    };
    if_addrs::get_if_addrs().map_or(true, |interfaces| interfaces.iter().any(reaches))
}

/// mDNS, then MarcoPolo if nobody answered or if all are to be heard. Who says to be of our CA comes first, who says to
/// be of another one is left out.
async fn ask(thorough: bool, ca: &CaHint) -> Vec<Found> {
    let mut answers = Answers::default();
    let ours = |found: &Found| found.ca.as_ref().is_none_or(|said| said == ca);
    collect(&mut answers, if thorough { WINDOW } else { SETTLE }, ours, async |sender| {
        report("mDNS", mdns::ask(&sender, WINDOW)).await;
    })
    .await;
    if thorough || answers.0.is_empty() {
        let all = WINDOW * 5;
        collect(&mut answers, all, ours, async |sender| {
            report("MarcoPolo", marcopolo::ask(&sender, thorough)).await;
        })
        .await;
    }
    let mut found = answers.0;
    found.sort_by_key(|found| found.ca.is_none());
    found
}

/// Takes answers until the asking ends, or for `settle` after the first.
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
    // Whoever asks longer than it is listened to is not needed any more.
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
        assert_eq!(answers.0.len(), MOST);
        assert!(answers.0.iter().any(|found| found.name.parse::<usize>().unwrap() > 5_000));
        assert!(answers.0.iter().all(|found| found.apis().eq(["10.0.0.1:1"])));
    }

    #[tokio::test]
    async fn who_asks_on_is_not_waited_for_when_somebody_answered() {
        let wanted = |found: &Found| found.ca.is_none();
        let names = |answers: Answers| answers.0.into_iter().map(|found| found.name).collect::<Vec<_>>();
        let mut answers = Answers::default();
        collect(&mut answers, Duration::from_millis(50), wanted, async |sender| {
            for (name, ca) in [("foreign", Some("abababababababab")), ("one", None), ("one", None), ("two", None)] {
                sender.send(found(name, ca)).await.unwrap();
            }
            std::future::pending().await
        })
        .await;
        assert_eq!(names(answers), ["one", "two"]);
        // And when nobody did, until the asking ends.
        let mut answers = Answers::default();
        collect(&mut answers, Duration::MAX, wanted, async |_| {}).await;
        assert_eq!(names(answers), [""; 0]);
    }
}
