//! The power of a virtual Pi: boots, the running agent, shutdowns and power cuts.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::firmware::{self, Boot, Outcome, Partitions};
use super::log::{Event, Line};
use super::state::{After, Going, Power, State, Up};
use super::{VirtualPi, tree};
use crate::system::{System, SystemError};

/// Interval at which the trigger files `power-on` and `power-cut` are looked for.
const POLL: Duration = Duration::from_millis(150);
/// Pause of the service manager before it starts an agent again that ended by itself.
const RESTART: Duration = Duration::from_secs(1);
/// Time for an agent to end by itself when the simulation ends or the machine goes down.
const GRACE: Duration = Duration::from_secs(5);
/// Number of failed boots in a row after which the Pi stays off, as an operator would unplug it.
const DEAD_BOOTS: u32 = 10;

/// Reason that a wait ended.
enum Woken {
    /// The time is over, or the power state has changed.
    Done,
    /// The power was cut; the state has changed.
    Cut,
    /// The simulation ends.
    Stopped,
}

impl VirtualPi {
    /// Drives the Pi until `stop`: boots, starts `agent` (again a second after it returned), drops it when the machine
    /// goes down, and boots again. The agent's token is its SIGTERM. It is cancelled when the machine goes down and on
    /// `stop`, and the agent gets five seconds to return. On `stop` the Pi stays as it is, and the next process
    /// continues under the same boot id.
    ///
    /// The file `hang` holds a machine that goes down: with `agent` in it before the agent is told to end, otherwise
    /// after that, until the file is gone or the power is cut.
    ///
    /// # Errors
    /// The Pi's folder cannot be read or written.
    pub async fn power<F>(self: Arc<Self>, agent: F, stop: CancellationToken) -> Result<(), SystemError>
    where
        F: Fn(Arc<dyn System>, CancellationToken) -> BoxFuture<'static, ()> + Send,
    {
        // A process that was killed between a commit and its line of the log left the line to this one.
        self.ensure_logged(&self.state())?;
        loop {
            let power = self.state().power;
            let woken = match power.clone() {
                Power::Off => self.off(&stop).await?,
                Power::Booting { tryboot, after } => self.boot(power, tryboot, after, &stop).await?,
                Power::On(_) => self.on(power, &agent, &stop).await?,
                Power::GoingDown { going, .. } => self.going_down(power, going, &stop).await?,
            };
            if matches!(woken, Woken::Stopped) {
                return Ok(());
            }
        }
    }

    async fn off(&self, stop: &CancellationToken) -> Result<Woken, SystemError> {
        loop {
            // A power cut does nothing to a machine that is off. The trigger is removed so that it does not cut a later
            // boot.
            take(&self.dir.join("power-cut"))?;
            if take(&self.dir.join("power-on"))? {
                self.advance(|_| Some(State::first()))?;
                return Ok(Woken::Done);
            }
            tokio::select! {
                // Dropping a sleep loses nothing.
                () = sleep(POLL) => {}
                () = stop.cancelled() => return Ok(Woken::Stopped),
            }
        }
    }

    async fn boot(
        &self,
        power: Power,
        tryboot: bool,
        after: After,
        stop: &CancellationToken,
    ) -> Result<Woken, SystemError> {
        match self.wait(&power, Some(self.options.boot_time), stop).await? {
            Woken::Done => {}
            woken => return Ok(woken),
        }
        // A boot clears `/run`, and with it an announced shutdown.
        let schedule = self.schedule();
        schedule.clear().map_err(SystemError::io("remove", schedule.file))?;
        self.told.store(false, Ordering::Release);
        let card = self.card();
        let partitions = Partitions { recovery: &card.recovery, boot: &card.boot };
        let outcome = firmware::boot(&firmware::PI_4, partitions, tryboot);
        let mut halts = false;
        let outcome = match outcome {
            Outcome::Booted(boot) if !is_installer(&boot) => match tree::cannot_come_up(&card.root, &boot, &self.id) {
                Some(reason) => {
                    halts = !tree::restarts_after_panic(&boot);
                    Outcome::Dead(reason)
                }
                None => match tree::hangs(&card.root, &boot) {
                    Some(hang) => {
                        halts = !hang.is_reset;
                        Outcome::Dead(format!("its {} hangs", hang.at))
                    }
                    None => Outcome::Booted(boot),
                },
            },
            Outcome::Booted(boot) if boot.initramfs.is_empty() => {
                Outcome::Dead("the installer has no initramfs".into())
            }
            outcome => outcome,
        };
        match outcome {
            Outcome::Booted(boot) => {
                let up = Up {
                    boot_id: new_boot_id()?,
                    partition: boot.partition,
                    tryboot: boot.tryboot,
                    installer: Some(is_installer(&boot)),
                };
                tracing::info!(node = %self.id, boot_id = %up.boot_id, partition = up.partition, "virtual Pi booted");
                let mut line = Line::new(&up.boot_id, Event::Boot, "");
                line.after = after.as_str().to_owned();
                line.partition = Some(boot.partition);
                line.tryboot = boot.tryboot;
                line.mixed = boot.mixed.iter().map(|mixed| format!("{mixed:?}")).collect();
                self.advance(|_| Some(State { power: Power::On(up), dead: 0, line: Some(line) }))?;
            }
            Outcome::Dead(reason) => {
                tracing::warn!(node = %self.id, error = %reason, halts, "virtual Pi did not come up");
                self.advance(|state| {
                    let dead = state.dead + 1;
                    let again = Power::Booting { tryboot: false, after: After::Watchdog };
                    // A halted kernel waits for an operator, and so does a board after too many failed boots.
                    let power = if dead < DEAD_BOOTS && !halts { again } else { Power::Off };
                    Some(State { power, dead, line: None })
                })?;
            }
        }
        Ok(Woken::Done)
    }

    async fn on<F>(self: &Arc<Self>, power: Power, agent: &F, stop: &CancellationToken) -> Result<Woken, SystemError>
    where
        F: Fn(Arc<dyn System>, CancellationToken) -> BoxFuture<'static, ()> + Send,
    {
        let system: Arc<dyn System> = Arc::<Self>::clone(self);
        let terminate = stop.child_token();
        let mut running = JoinSet::new();
        running.spawn(agent(Arc::clone(&system), terminate.clone()));
        let woken = {
            let mut down = std::pin::pin!(self.wait(&power, None, stop));
            loop {
                tokio::select! {
                    // Polled again after the other arm won: `down` outlives the loop.
                    woken = &mut down => break woken?,
                    // A lost result is of a finished task, which is not needed.
                    Some(ended) = running.join_next() => {
                        if let Err(error) = ended {
                            tracing::error!(node = %self.id, error = %error, "agent of the virtual Pi crashed");
                        }
                        // systemd restarts an agent that ended, whatever its exit status.
                        let again = agent(Arc::clone(&system), terminate.clone());
                        running.spawn(async move {
                            sleep(RESTART).await;
                            again.await;
                        });
                    }
                }
            }
        };
        let now = self.state().power;
        let woken = match woken {
            Woken::Done if matches!(now, Power::GoingDown { .. }) => {
                self.end_agent(&now, &mut running, &terminate, stop).await?
            }
            Woken::Stopped => {
                // Returned or out of time: the agent is dropped below.
                let _ = tokio::time::timeout(GRACE, running.join_next()).await;
                woken
            }
            Woken::Done | Woken::Cut => woken,
        };
        running.shutdown().await;
        Ok(woken)
    }

    /// Tells the agent to end, as a machine that goes down sends SIGTERM to its services.
    async fn end_agent(
        &self,
        going_down: &Power,
        running: &mut JoinSet<()>,
        terminate: &CancellationToken,
        stop: &CancellationToken,
    ) -> Result<Woken, SystemError> {
        match self.hang(going_down, true, stop).await? {
            Woken::Done => {}
            woken => return Ok(woken),
        }
        terminate.cancel();
        tokio::select! {
            // The caller drops the agent, returned or not.
            _ = running.join_next() => Ok(Woken::Done),
            woken = self.wait(going_down, Some(GRACE), stop) => woken,
        }
    }

    /// Waits while the file `hang` holds the machine, with its agent or without it.
    async fn hang(&self, going_down: &Power, with_agent: bool, stop: &CancellationToken) -> Result<Woken, SystemError> {
        loop {
            let held = std::fs::read_to_string(self.dir.join("hang"));
            if !held.is_ok_and(|what| (what.trim() == "agent") == with_agent) {
                return Ok(Woken::Done);
            }
            match self.wait(going_down, Some(POLL), stop).await? {
                Woken::Done if self.state().power == *going_down => {}
                woken => return Ok(woken),
            }
        }
    }

    async fn going_down(&self, power: Power, going: Going, stop: &CancellationToken) -> Result<Woken, SystemError> {
        match self.hang(&power, false, stop).await? {
            Woken::Done => {}
            woken => return Ok(woken),
        }
        let woken = self.wait(&power, Some(self.options.shutdown_time), stop).await?;
        if matches!(woken, Woken::Done) {
            self.advance(|state| {
                let power = match going {
                    Going::Off => Power::Off,
                    Going::Reboot => Power::Booting { tryboot: false, after: After::Command },
                    Going::TryBoot => Power::Booting { tryboot: true, after: After::Command },
                };
                Some(State { power, ..state.clone() })
            })?;
        }
        Ok(woken)
    }

    /// Waits for the time to pass, a change of the power state, a power cut, or the end of the simulation.
    async fn wait(
        &self,
        before: &Power,
        time: Option<Duration>,
        stop: &CancellationToken,
    ) -> Result<Woken, SystemError> {
        let mut changed = self.changed.subscribe();
        let end = time.map(|time| Instant::now() + time);
        loop {
            if take(&self.dir.join("power-cut"))? {
                self.cut()?;
                return Ok(Woken::Cut);
            }
            if self.state().power != *before {
                return Ok(Woken::Done);
            }
            let now = Instant::now();
            if end.is_some_and(|end| end <= now) {
                return Ok(Woken::Done);
            }
            let poll = now + POLL;
            tokio::select! {
                // Cancel-safe: each round checks every condition again.
                () = sleep_until(end.map_or(poll, |end| end.min(poll))) => {}
                _ = changed.changed() => {}
                () = stop.cancelled() => return Ok(Woken::Stopped),
            }
        }
    }

    /// Cuts the power. The trial flag is lost: it lives in a register that does not outlive the power.
    fn cut(&self) -> Result<(), SystemError> {
        self.advance(|state| {
            let line = match &state.power {
                Power::On(up) | Power::GoingDown { up, .. } => Some(Line::new(&up.boot_id, Event::PowerCut, "")),
                Power::Off | Power::Booting { .. } => None,
            };
            let power = Power::Booting { tryboot: false, after: After::PowerCut };
            Some(State { power, dead: state.dead, line })
        })
    }
}

/// An installer's set lies under a prefix of the first partition. A stock card has its system in that partition's root.
fn is_installer(boot: &Boot) -> bool {
    boot.partition == 1 && !boot.prefix.is_empty()
}

/// Removes a trigger file. True if it was there.
fn take(trigger: &Path) -> Result<bool, SystemError> {
    match std::fs::remove_file(trigger) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(SystemError::io("remove", trigger)(error)),
    }
}

fn new_boot_id() -> Result<String, SystemError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| SystemError::Invalid(format!("no random numbers: {error}")))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid().to_string())
}
