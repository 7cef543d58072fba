//! Virtual time for one world: it stands still while anything works, and moves when everything waits.

use std::ffi::OsStr;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use chrono::TimeDelta;
use marco_controller::clock::ManualClock;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

/// Interval of looking for stillness, in real time.
const LOOK: Duration = Duration::from_micros(100);

/// Activity of a runtime.
#[derive(Default)]
struct Activity {
    waits: AtomicBool,
    /// Number of times that the runtime was woken.
    woken: AtomicU64,
    wanted: AtomicBool,
    still: Notify,
    over: AtomicBool,
}

impl Activity {
    /// Tells the waiter when everything has been still. Runs on a blocking thread of the runtime, which also keeps
    /// tokio from moving the time by itself.
    fn watch(&self) {
        let own = std::fs::read_link("/proc/thread-self").unwrap_or_default();
        let own = own.file_name().unwrap_or_default().to_owned();
        while !self.over.load(Ordering::Acquire) {
            #[expect(clippy::disallowed_methods, reason = "real time: the runtime's own stands still")]
            std::thread::sleep(LOOK);
            if !self.wanted.load(Ordering::Acquire) {
                continue;
            }
            let woken = self.woken.load(Ordering::Acquire);
            // Twice: a thread may have been woken by one that was looked at after it.
            let still = self.waits.load(Ordering::Acquire) && others_sleep(&own) && others_sleep(&own);
            if still && woken == self.woken.load(Ordering::Acquire) && self.waits.load(Ordering::Acquire) {
                self.wanted.store(false, Ordering::Release);
                self.still.notify_one();
            }
        }
    }
}

/// True if no other thread of this process runs, is about to, or waits for a disk. A process plays one world at a time,
/// so the threads of the database and of blocking work are this world's.
fn others_sleep(own: &OsStr) -> bool {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return false };
    threads.flatten().filter(|thread| thread.file_name() != own).all(|thread| {
        // `number (name) state ...`; a thread that has ended meanwhile has no file.
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['S', 'I', 'X', 'Z']))
    })
}

/// The time of one world: of its agents (tokio's) and of its controller.
pub(crate) struct VirtualTime {
    activity: Arc<Activity>,
    pub(crate) clock: Arc<ManualClock>,
    passed: Duration,
}

impl VirtualTime {
    /// Makes a runtime whose time is this one. All of the world must run in it.
    pub(crate) fn new(clock: Arc<ManualClock>) -> Result<(Runtime, Self)> {
        let activity = Arc::new(Activity::default());
        let (parks, unparks) = (Arc::clone(&activity), Arc::clone(&activity));
        let runtime = Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .on_thread_park(move || parks.waits.store(true, Ordering::Release))
            .on_thread_unpark(move || {
                unparks.waits.store(false, Ordering::Release);
                unparks.woken.fetch_add(1, Ordering::AcqRel);
            })
            .build()
            .context("a runtime")?;
        let watched = Arc::clone(&activity);
        runtime.spawn_blocking(move || watched.watch());
        Ok((runtime, Self { activity, clock, passed: Duration::ZERO }))
    }

    /// Virtual time since the beginning.
    pub(crate) fn passed(&self) -> Duration {
        self.passed
    }

    /// Waits until nothing works.
    pub(crate) async fn still(&self) {
        self.activity.wanted.store(true, Ordering::Release);
        self.activity.still.notified().await;
    }

    /// Lets time pass at once.
    pub(crate) async fn pass(&mut self, time: Duration) {
        self.passed += time;
        self.clock.advance(TimeDelta::from_std(time).unwrap_or_default());
        tokio::time::advance(time).await;
    }

    /// Waits for work that needs time to pass.
    pub(crate) async fn drive<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = self.still() => {}
            }
            self.pass(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for VirtualTime {
    fn drop(&mut self) {
        self.activity.over.store(true, Ordering::Release);
    }
}
