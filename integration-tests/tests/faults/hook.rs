//! The hook into an agent's steps: it counts them, and does the faults of a plan at theirs.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{Error, Result, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use node_agent::step::{Hook, Kind, Step};
use tokio::sync::{mpsc, watch};

use crate::plan::{Event, Fault};

/// Largest write in place that no power cut tears: a sector.
const SECTOR: usize = 512;

/// Name of the point that counts all steps since the first fault. Some come only because of that fault.
pub(crate) const SINCE: &str = "any step since";

/// A step of an update: its name, and its number among those of that name, from 1.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Point {
    pub(crate) name: String,
    pub(crate) number: u32,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.name, self.number)
    }
}

/// The end of an agent's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// The process was killed.
    Kill,
    /// The machine lost its power.
    PowerCut,
}

#[derive(Default)]
struct Seen {
    counts: BTreeMap<String, u32>,
    order: Vec<Point>,
    bytes: BTreeMap<String, bool>,
    /// Faults that have not happened yet.
    to_come: Vec<(Point, Fault)>,
    /// Names of steps that fail from now on, with the error's number.
    failing: BTreeMap<String, (i32, Kind)>,
    next_read_fails: bool,
    happened: usize,
    /// Steps since the first fault.
    since: u32,
}

/// Records the steps of one virtual Pi.
pub(crate) struct Recorder {
    pi: PathBuf,
    seen: Mutex<Seen>,
    dead: watch::Sender<Option<Death>>,
    events: mpsc::UnboundedSender<Event>,
}

impl Recorder {
    pub(crate) fn new(pi: &Path, faults: Vec<(Point, Fault)>, events: mpsc::UnboundedSender<Event>) -> Self {
        let seen = Seen { to_come: faults, ..Seen::default() };
        Self { pi: pi.to_owned(), seen: Mutex::new(seen), dead: watch::Sender::new(None), events }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new process of the agent begins.
    pub(crate) fn revive(&self) {
        self.dead.send_replace(None);
    }

    /// Waits for the end of the present process.
    pub(crate) async fn death(&self) -> Death {
        let mut dead = self.dead.subscribe();
        match dead.wait_for(Option::is_some).await.map(|death| *death) {
            Ok(Some(death)) => death,
            _ => std::future::pending().await,
        }
    }

    /// The steps so far, in their order. True: one that writes bytes.
    pub(crate) fn points(&self) -> Vec<(Point, bool)> {
        let seen = self.seen();
        seen.order.iter().map(|point| (point.clone(), seen.bytes.get(&point.name) == Some(&true))).collect()
    }

    /// Number of steps so far, reads not counted.
    pub(crate) fn count(&self) -> usize {
        self.seen().order.len()
    }

    /// Number of steps so far by their names.
    pub(crate) fn counts(&self) -> BTreeMap<String, u32> {
        self.seen().counts.clone()
    }

    /// Number of faults that have happened.
    pub(crate) fn happened(&self) -> usize {
        self.seen().happened
    }

    /// True if the node's journal cannot be written from now on.
    pub(crate) fn keeps_no_journal(&self) -> bool {
        self.seen().failing.iter().any(|(name, (_, kind))| *kind == Kind::Change && name.ends_with("/journal.json"))
    }

    /// Words reach the controller again.
    pub(crate) fn heal_words(&self) {
        self.seen().failing.retain(|_, (_, kind)| *kind != Kind::Word);
    }

    /// Everything can be written and read again.
    pub(crate) fn heal(&self) {
        let mut seen = self.seen();
        seen.failing.clear();
        seen.to_come.clear();
        seen.next_read_fails = false;
    }

    fn die(&self, death: Death) -> ! {
        if death == Death::PowerCut {
            // Here, not in a task: this may be the task that would do it.
            drop(fs::write(self.pi.join("power-cut"), ""));
        }
        self.dead.send_replace(Some(death));
        unwind();
    }

    /// Leaves what a power cut during this write leaves.
    fn tear(&self, step: &Step<'_>) {
        let half = step.bytes.get(..step.bytes.len() / 2).unwrap_or_default();
        // p1 and p4 are FAT, which renames no file atomically.
        let fat = [self.pi.join("recovery"), self.pi.join("boot")].iter().any(|part| step.path.starts_with(part));
        let torn = match step.what {
            "write in place" if step.bytes.len() <= SECTOR => in_place(step.path, step.bytes),
            "write in place" => in_place(step.path, half.get(..half.len() / SECTOR * SECTOR).unwrap_or_default()),
            "append" => fs::OpenOptions::new().append(true).open(step.path).and_then(|mut file| file.write_all(half)),
            "replace" if !fat => {
                let name = step.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                fs::write(step.path.with_file_name(format!("{name}.new")), half)
            }
            _ => fs::write(step.path, half),
        };
        // A folder that is not there yet: then nothing was written.
        drop(torn);
    }
}

/// Ends the thread or task, as it would end with its process. Not `panic!`: nobody is to be told.
fn unwind() -> ! {
    std::panic::resume_unwind(Box::new("the agent was killed by a test"));
}

fn in_place(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    fs::OpenOptions::new().write(true).create(true).truncate(false).open(path)?.write_all_at(bytes, 0)
}

impl Hook for Recorder {
    fn at(&self, step: &Step<'_>) -> Result<()> {
        // Copied out: `die` locks it again.
        let dead = *self.dead.borrow();
        if dead.is_some() {
            unwind();
        }
        let mut seen = self.seen();
        if step.kind == Kind::Read {
            return if std::mem::take(&mut seen.next_read_fails) { Err(Error::from_raw_os_error(5)) } else { Ok(()) };
        }
        if step.what == "remove" && fs::symlink_metadata(step.path).is_err() {
            return Ok(());
        }
        let place = step.path.strip_prefix(&self.pi).unwrap_or(step.path).display().to_string();
        let name = format!("{} {place}", step.what);
        let number = seen.counts.entry(name.clone()).or_default();
        *number += 1;
        let point = Point { name, number: *number };
        seen.bytes.insert(point.name.clone(), !step.bytes.is_empty());
        seen.order.push(point.clone());
        seen.since += u32::from(seen.happened > 0);
        let since = Point { name: SINCE.to_owned(), number: seen.since };
        let is_due = |(at, _): &mut (Point, Fault)| *at == point || *at == since;
        let due: Vec<Fault> = seen.to_come.extract_if(.., is_due).map(|(_, fault)| fault).collect();
        seen.happened += due.len();
        let mut failed = seen.failing.get(&point.name).map(|(number, _)| *number);
        let mut death = None;
        for fault in due {
            match fault {
                Fault::Kill => death = Some((Death::Kill, false)),
                Fault::CutLost => death = Some((Death::PowerCut, false)),
                Fault::CutTorn => death = Some((Death::PowerCut, true)),
                Fault::FailsOnce(number) => failed = Some(number),
                Fault::FailsFromNow(number) => {
                    seen.failing.insert(point.name.clone(), (number, step.kind));
                    if step.kind == Kind::Word {
                        let _ = self.events.send(Event::WordsFail);
                    }
                    failed = Some(number);
                }
                Fault::NextReadFails => seen.next_read_fails = true,
                Fault::Outside(event) => {
                    if event.takes_the_power() {
                        death = Some((Death::PowerCut, false));
                    }
                    // The world may be over.
                    let _ = self.events.send(event);
                }
            }
        }
        drop(seen);
        if let Some((death, torn)) = death {
            if torn && !step.bytes.is_empty() {
                self.tear(step);
            }
            self.die(death);
        }
        failed.map_or(Ok(()), |number| Err(Error::from_raw_os_error(number)))
    }
}
