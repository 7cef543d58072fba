//! The moments of power cuts: random ones, and the start of each phase.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use integration_tests::machine::Machine;
use integration_tests::machine::lab::{Watch, text};
use integration_tests::wait::seconds;
use serde_json::Value;

/// Timeout of an update with all its boots, on an emulated processor shared with others.
pub(super) const UPDATE: Duration = seconds(600);
/// Interval between two looks at the console; the shortest phases take a few hundred milliseconds.
const LOOK: Duration = Duration::from_millis(20);
/// States in which the machine has not begun or has finished.
const NOT_THE_MACHINES: [&str; 3] = ["PENDING", "ASSIGNED", "SUCCEEDED"];
/// Markers of the installer's log line at the start of each phase; the phase's name follows the second.
const INSTALLING: (&str, &str) = (": installing execution=", "phase=\"");

/// The moment of a power cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Moment {
    /// As soon as the controller reports this state or phase.
    Heard(String),
    /// As soon as the installer logs on its console that it begins this phase.
    Said(String),
    /// This long after the operation was created.
    After(Duration),
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Heard(phase) | Self::Said(phase) => write!(f, "{phase}"),
            Self::After(time) => write!(f, "{:.1} s", time.as_secs_f64()),
        }
    }
}

/// The phases so far, in order. A phase that comes again, such as writing boot files, gets a number.
#[derive(Debug, Default)]
pub(super) struct Phases(Vec<String>);

impl Phases {
    fn hear(&mut self, phase: &str) {
        let is_same = |known: &String| known.split(" (").next() == Some(phase);
        if phase.is_empty() || self.0.last().is_some_and(is_same) {
            return;
        }
        let before = self.0.iter().filter(|known| is_same(known)).count();
        self.0.push(if before == 0 { phase.to_owned() } else { format!("{phase} ({})", before + 1) });
    }

    fn last(&self) -> &str {
        self.0.last().map(String::as_str).unwrap_or_default()
    }

    /// The starts of all phases of an undisturbed update: those that the controller reports, and those that only the
    /// console shows because they pass too fast.
    pub(super) async fn boundaries(mut watch: Watch, machine: &Machine, begun_with: usize) -> Result<Vec<Moment>> {
        let mut heard = Self::default();
        while let Some(message) = watch.next().await? {
            heard.hear(&phase(&message));
        }
        let said = said(machine, begun_with)?;
        // The controller gets progress at most once a second, so it misses short phases.
        let not_heard = said.0.into_iter().filter(|phase| !heard.0.contains(phase)).map(Moment::Said);
        let heard = heard.0.iter().filter(|phase| !NOT_THE_MACHINES.contains(&phase.as_str()));
        let heard = heard.cloned().map(Moment::Heard);
        Ok(heard.chain(not_heard).collect())
    }
}

impl Moment {
    /// The same moment for a machine that has become faster since it was measured.
    pub(super) fn sooner(self) -> Self {
        match self {
            Self::After(time) => Self::After(time / 2),
            Self::Heard(_) | Self::Said(_) => self,
        }
    }

    /// Waits for the moment. Returns the phase reached then. `None`: the update ended before, because it was faster, or
    /// because the controller never heard of the phase (states shorter than a report are skipped). `begun_with`:
    /// number of the machine's starts before the update.
    pub(super) async fn reach(&self, mut watch: Watch, machine: &Machine, begun_with: usize) -> Result<Option<String>> {
        let (begun, update) = (Instant::now(), machine.board().patience(UPDATE));
        let mut phases = Phases::default();
        loop {
            let limit = match self {
                Self::Heard(_) => update.saturating_sub(begun.elapsed()),
                Self::Said(_) => LOOK,
                Self::After(time) => time.saturating_sub(begun.elapsed()),
            };
            // A timeout may drop a half-read message. Nothing is read after it: each arm below returns.
            let message = match self {
                Self::Said(wanted) => {
                    tokio::time::sleep(limit).await;
                    if said(machine, begun_with)?.0.contains(wanted) {
                        return Ok(Some(format!("start of {wanted}")));
                    }
                    if begun.elapsed() < update {
                        continue;
                    }
                    None
                }
                _ => match tokio::time::timeout(limit, watch.next()).await {
                    Ok(message) => message?,
                    Err(_) => None,
                },
            };
            if let Some(message) = &message {
                phases.hear(&phase(message));
            }
            match (self, message) {
                (Self::Heard(wanted), Some(_)) if phases.last() == wanted => {
                    return Ok(Some(format!("start of {wanted}")));
                }
                (_, Some(_)) => {}
                (Self::After(time), None) if begun.elapsed() >= *time => {
                    return Ok(Some(format!("{:.1} s, {}", begun.elapsed().as_secs_f64(), phases.last())));
                }
                (_, None) if begun.elapsed() < update => return Ok(None),
                (_, None) => bail!("the moment did not come: {phases:?}"),
            }
        }
    }
}

/// The phases that the installer has logged, in the starts from number `from` on.
fn said(machine: &Machine, from: usize) -> Result<Phases> {
    let mut phases = Phases::default();
    for start in machine.starts().iter().skip(from) {
        let console = std::fs::read(&start.console)?;
        for line in String::from_utf8_lossy(&console).lines().filter(|line| line.contains(INSTALLING.0)) {
            // The last line may be incomplete while the installer writes it.
            let phase = line.split_once(INSTALLING.1).and_then(|(_, rest)| rest.split_once('"'));
            phases.hear(phase.map(|(phase, _)| phase).unwrap_or_default());
        }
    }
    Ok(phases)
}

/// The phase of the only execution, or its state if it is not running or has no phase.
fn phase(message: &Value) -> String {
    let get = |name: &str| text(message, &format!("executions.0.{name}")).unwrap_or_default().to_owned();
    let (state, phase) = (get("state").trim_start_matches("STATE_").to_owned(), get("phase"));
    // A phase is of interest only while the execution runs; otherwise the state says more.
    if phase.is_empty() || state != "RUNNING" { state } else { phase }
}

/// SplitMix64 (Steele, Lea, Flood 2014), reproducible by its seed.
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 up to, but not including, 1.
    pub(super) fn fraction(&mut self) -> f64 {
        // The upper 32 bits: an f64 holds each of these numbers exactly.
        f64::from(u32::try_from(self.next() >> 32).unwrap_or_default()) / (f64::from(u32::MAX) + 1.0)
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other =
                usize::try_from(self.next() % (u64::try_from(last).unwrap_or_default() + 1)).unwrap_or_default();
            items.swap(last, other);
        }
    }
}
