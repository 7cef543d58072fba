//! Faults, and their healing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use integration_tests::Fleet;
use integration_tests::ledger::Dice;
use integration_tests::postgres::Postgres;
use integration_tests::proxy::Direction;
use integration_tests::seconds;

use super::CONTROLLERS;

/// Kinds of faults. The first ones are injected in the order of `KINDS`, later ones at random, up to three at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Kill,
    Freeze,
    FreezeInTransaction,
    HostGone,
    BlackHoleUp,
    BlackHoleDown,
    Latency,
    AnswerToCommitLost,
    RowsLocked,
    ConnectionsTaken,
    ReadOnly,
    Restart,
    FailOver,
    ClockMinutes,
    ClockHour,
    SessionsCut,
    AgentsBlackHole,
    AgentsLatency,
    AgentsKilled,
}

pub(crate) const KINDS: [Kind; 19] = [
    Kind::AnswerToCommitLost,
    Kind::Kill,
    Kind::FreezeInTransaction,
    Kind::Latency,
    Kind::HostGone,
    Kind::RowsLocked,
    Kind::ClockMinutes,
    Kind::BlackHoleDown,
    Kind::ReadOnly,
    Kind::Freeze,
    Kind::SessionsCut,
    Kind::AgentsLatency,
    Kind::Restart,
    Kind::ConnectionsTaken,
    Kind::BlackHoleUp,
    Kind::AgentsKilled,
    Kind::ClockHour,
    Kind::AgentsBlackHole,
    Kind::FailOver,
];
/// Durations of a freeze: below all timeouts, beyond those of transactions and sessions, and beyond all of them.
const FREEZES: [Duration; 3] = [seconds(5), seconds(40), seconds(180)];

/// From each four minutes this long at their end is without faults of everybody, so that a healthy node can be told from
/// one that such a fault excuses.
const CALM: Duration = seconds(45);
const CALM_EVERY: Duration = seconds(240);
/// Answers to COMMIT that one fault loses.
const ANSWERS: usize = 3;

/// A fault that has not been healed yet.
struct Active {
    kind: Kind,
    controller: usize,
    until: Instant,
    /// Processes that hold locked rows or connections; killing them heals the fault.
    holders: Vec<tokio::process::Child>,
}

/// The fleet, its present faults, and the counts of past ones.
pub(crate) struct Chaos {
    fleet: Fleet,
    postgres: Postgres,
    /// The former primary after a fail-over; it ends with the run.
    retired: Vec<Postgres>,
    url: String,
    dice: Dice,
    active: Vec<Active>,
    injected: BTreeMap<Kind, usize>,
    /// Freezes that stopped a controller inside one of its transactions.
    inside: usize,
    /// Answers to COMMIT that were lost.
    lost: usize,
    begun: Instant,
    calm_since: Instant,
    /// Upper limit of a freeze, so that a short run has several faults.
    longest: Duration,
}

impl Chaos {
    pub(crate) fn new(fleet: Fleet, postgres: Postgres, url: String, dice: Dice, length: Duration) -> Self {
        Self {
            fleet,
            postgres,
            retired: Vec::new(),
            url,
            dice,
            active: Vec::new(),
            injected: BTreeMap::new(),
            inside: 0,
            lost: 0,
            begun: Instant::now(),
            calm_since: Instant::now(),
            longest: length / 3,
        }
    }

    fn freeze_time(&mut self) -> Duration {
        FREEZES.get(self.dice.below(FREEZES.len())).copied().unwrap_or_default().min(self.longest)
    }

    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    pub(crate) fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// True if for this time there was no fault that stops all controllers.
    pub(crate) fn has_been_calm_for(&self, time: Duration) -> bool {
        self.calm_since.elapsed() > time
    }

    /// A second of chaos: heals faults that are over, and injects a new one.
    pub(crate) async fn step(&mut self) -> Result<()> {
        let now = Instant::now();
        let (mut over, on): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.active).into_iter().partition(|fault| fault.until <= now);
        // The shared parts first: a controller cannot start without its database.
        over.sort_by_key(|fault| !is_of_everybody(fault.kind));
        self.active = on;
        for fault in over {
            self.heal(fault).await?;
        }
        if self.active.iter().any(|fault| is_of_everybody(fault.kind)) {
            self.calm_since = now;
        }
        let missing = KINDS.iter().copied().find(|kind| !self.injected.contains_key(kind));
        // Missing kinds come first, so that even a short run has every kind.
        if self.active.len() >= 3 || missing.is_none() && self.dice.below(3) > 0 {
            return Ok(());
        }
        let any = KINDS.get(self.dice.below(KINDS.len())).copied().unwrap_or(Kind::Kill);
        let kind = missing.unwrap_or(any);
        let controller = self.dice.below(CONTROLLERS);
        let busy: BTreeSet<usize> =
            self.active.iter().filter(|fault| is_of_one(fault.kind)).map(|fault| fault.controller).collect();
        // One controller always stays well, and no two faults of the shared parts overlap. There is only one standby to
        // fail over to.
        let at = Duration::from_secs(self.begun.elapsed().as_secs() % CALM_EVERY.as_secs());
        let impossible = is_of_everybody(kind) && at + CALM >= CALM_EVERY
            || is_of_one(kind) && (busy.contains(&controller) || busy.len() + 1 >= CONTROLLERS)
            || is_of_everybody(kind) && self.active.iter().any(|fault| is_of_everybody(fault.kind))
            || kind == Kind::FailOver && !self.retired.is_empty();
        if !impossible {
            *self.injected.entry(kind).or_default() += 1;
            self.inject(kind, controller).await.with_context(|| format!("{kind:?} of controller {controller}"))?;
        }
        Ok(())
    }

    async fn inject(&mut self, kind: Kind, controller: usize) -> Result<()> {
        let mut lasts = seconds(5);
        let mut holders = Vec::new();
        match kind {
            Kind::Kill => self.fleet.kill(controller).await?,
            Kind::Freeze => {
                lasts = self.freeze_time();
                self.fleet.freeze(controller).await?;
            }
            Kind::FreezeInTransaction => {
                lasts = self.freeze_time();
                self.freeze_in_transaction(controller).await?;
            }
            Kind::HostGone => {
                lasts = seconds(25);
                self.fleet.freeze(controller).await?;
                // A frozen process alone would still have its kernel acknowledge packets. A host that is gone
                // acknowledges nothing.
                for direction in [Direction::Up, Direction::Down] {
                    self.fleet.database_proxy(controller)?.hold(direction);
                }
            }
            Kind::BlackHoleUp => {
                lasts = seconds(8);
                self.fleet.database_proxy(controller)?.hold(Direction::Up);
            }
            Kind::BlackHoleDown => {
                lasts = seconds(8);
                self.fleet.database_proxy(controller)?.hold(Direction::Down);
            }
            Kind::Latency => {
                lasts = seconds(8);
                for direction in [Direction::Up, Direction::Down] {
                    self.fleet.database_proxy(controller)?.delay(direction, Duration::from_millis(50));
                }
            }
            Kind::AnswerToCommitLost => {
                for _ in 0..ANSWERS {
                    self.fleet.database_proxy(controller)?.swallow_answer_to(b"COMMIT");
                }
            }
            // Beyond the controllers' `lock_timeout` of 2 s, so that they give up and try again.
            Kind::RowsLocked => {
                let statement = "BEGIN; SELECT 1 FROM operations FOR UPDATE; SELECT pg_sleep(4)";
                holders.push(self.postgres.session(&self.url, statement)?);
            }
            Kind::ConnectionsTaken => {
                for _ in 0..self.postgres.connections_left(&self.url)? {
                    // Postgres notices a lost client only when it sends an answer, so these sessions also end by
                    // themselves.
                    holders.push(self.postgres.session(&self.url, "SELECT pg_sleep(5)")?);
                }
            }
            Kind::ReadOnly => self.read_only(true)?,
            Kind::Restart => {
                self.postgres.pause()?;
                lasts = seconds(3);
            }
            Kind::FailOver => {
                self.fail_over()?;
                lasts = Duration::ZERO;
            }
            Kind::ClockMinutes => {
                lasts = seconds(15);
                self.fleet.jump_clock(controller, if self.dice.below(2) == 0 { 120 } else { -120 })?;
            }
            Kind::ClockHour => {
                lasts = seconds(15);
                self.fleet.jump_clock(controller, if self.dice.below(2) == 0 { 3600 } else { -3600 })?;
            }
            Kind::SessionsCut => self.fleet.proxy().drop_connections(),
            Kind::AgentsBlackHole => {
                lasts = seconds(8);
                let direction = if self.dice.below(2) == 0 { Direction::Up } else { Direction::Down };
                self.fleet.proxy().hold(direction);
            }
            Kind::AgentsLatency => {
                lasts = seconds(8);
                for direction in [Direction::Up, Direction::Down] {
                    self.fleet.proxy().delay(direction, Duration::from_millis(50));
                }
            }
            Kind::AgentsKilled => {
                self.fleet.kill_agents().await?;
                lasts = seconds(2);
            }
        }
        if is_of_everybody(kind) {
            self.calm_since = Instant::now();
        }
        self.active.push(Active { kind, controller, until: Instant::now() + lasts, holders });
        Ok(())
    }

    async fn heal(&mut self, fault: Active) -> Result<()> {
        let Active { kind, controller, holders, .. } = fault;
        for mut holder in holders {
            // It may have ended by itself already.
            let _ = holder.kill().await;
        }
        match kind {
            // A controller cannot start while its database is away, so this is tried again later.
            Kind::Kill if self.active.iter().any(|other| is_of_everybody(other.kind)) => {
                self.active.push(Active { kind, controller, until: Instant::now() + seconds(1), holders: Vec::new() });
            }
            Kind::Kill => self.fleet.revive(controller)?,
            Kind::Freeze => self.fleet.thaw(controller).await?,
            Kind::FreezeInTransaction => {
                self.fleet.database_proxy(controller)?.release(Direction::Up);
                self.fleet.thaw(controller).await?;
            }
            Kind::HostGone => {
                // The host is back, but its old connections were never closed properly.
                let proxy = self.fleet.database_proxy(controller)?;
                proxy.drop_connections();
                for direction in [Direction::Up, Direction::Down] {
                    proxy.release(direction);
                }
                self.fleet.thaw(controller).await?;
            }
            Kind::BlackHoleUp => self.fleet.database_proxy(controller)?.release(Direction::Up),
            Kind::BlackHoleDown => self.fleet.database_proxy(controller)?.release(Direction::Down),
            Kind::Latency => {
                for direction in [Direction::Up, Direction::Down] {
                    self.fleet.database_proxy(controller)?.delay(direction, Duration::ZERO);
                }
            }
            Kind::AnswerToCommitLost => {
                let proxy = self.fleet.database_proxy(controller)?;
                self.lost += ANSWERS.saturating_sub(proxy.swallows_left());
                proxy.forget_swallows();
            }
            Kind::ReadOnly => self.read_only(false)?,
            Kind::Restart => self.postgres.resume()?,
            Kind::ClockMinutes | Kind::ClockHour => self.fleet.jump_clock(controller, 0)?,
            Kind::AgentsBlackHole | Kind::AgentsLatency => {
                for direction in [Direction::Up, Direction::Down] {
                    self.fleet.proxy().release(direction);
                    self.fleet.proxy().delay(direction, Duration::ZERO);
                }
            }
            Kind::AgentsKilled => self.fleet.start_agents()?,
            Kind::RowsLocked | Kind::ConnectionsTaken | Kind::FailOver | Kind::SessionsCut => {}
        }
        Ok(())
    }

    /// Freezes the controller inside a transaction: its COMMIT is held on the way, so that all locks of the transaction
    /// stay until it is thawed. Postgres may end the transaction before that.
    async fn freeze_in_transaction(&mut self, controller: usize) -> Result<()> {
        let proxy = self.fleet.database_proxy(controller)?;
        proxy.hold_at(b"COMMIT");
        // It commits at least once a second, unless another fault keeps it from its database. Then it is only frozen.
        if tokio::time::timeout(seconds(5), proxy.held()).await.is_ok() {
            self.inside += 1;
        } else {
            // Missing again, so that it is tried again.
            self.injected.remove(&Kind::FreezeInTransaction);
        }
        proxy.forget_swallows();
        self.fleet.freeze(controller).await
    }

    fn read_only(&self, on: bool) -> Result<()> {
        let (admin, database) = self.url.rsplit_once('/').context("a URL with a database")?;
        let admin = format!("{admin}/postgres");
        for statement in [
            format!("ALTER DATABASE {database} SET default_transaction_read_only = {on}"),
            // Existing sessions keep their setting, so they are terminated.
            format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"),
        ] {
            self.postgres.by_hand(&admin, &statement)?.map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    /// Fails over: the primary dies, and a synchronous standby with all acknowledged data replaces it.
    fn fail_over(&mut self) -> Result<()> {
        // Made only now: until then no commit has to wait for a second server.
        let standby = self.postgres.standby()?;
        self.postgres.pause()?;
        standby.promote()?;
        for number in 0..CONTROLLERS {
            let proxy = self.fleet.database_proxy(number)?;
            // The controllers keep their URLs: the proxy plays the virtual address of a cluster.
            proxy.retarget(standby.address());
            proxy.drop_connections();
        }
        let (before, _) = self.url.rsplit_once('@').context("a URL with a user")?;
        let (_, database) = self.url.rsplit_once('/').context("a URL with a database")?;
        self.url = format!("{before}@{}/{database}", standby.address());
        self.retired.push(std::mem::replace(&mut self.postgres, standby));
        Ok(())
    }

    /// Heals all faults.
    pub(crate) async fn heal_all(&mut self) -> Result<()> {
        let mut left = std::mem::take(&mut self.active);
        // The shared parts first: a controller cannot start without its database.
        left.sort_by_key(|fault| !is_of_everybody(fault.kind));
        for fault in left {
            self.heal(fault).await?;
        }
        self.calm_since = Instant::now();
        Ok(())
    }

    /// Ends, says what was injected, and returns the fleet, the database and its URL. `whole`: the run had time for all
    /// kinds, and one that is missing is an error.
    pub(crate) fn end(self, whole: bool) -> Result<(Fleet, Postgres, String)> {
        println!(
            "chaos: {:?}, {} freezes inside a transaction, {} answers to COMMIT lost",
            self.injected, self.inside, self.lost
        );
        ensure!(!whole || self.injected.len() == KINDS.len(), "not every kind of fault was injected");
        ensure!(!whole || self.inside > 0, "no controller froze inside a transaction");
        ensure!(!whole || self.lost > 0, "no answer to COMMIT was lost");
        Ok((self.fleet, self.postgres, self.url))
    }
}

/// True if the fault affects a single controller.
fn is_of_one(kind: Kind) -> bool {
    use Kind::{
        BlackHoleDown, BlackHoleUp, ClockHour, ClockMinutes, Freeze, FreezeInTransaction, HostGone, Kill, Latency,
    };
    matches!(
        kind,
        Kill | Freeze
            | FreezeInTransaction
            | HostGone
            | BlackHoleUp
            | BlackHoleDown
            | Latency
            | ClockMinutes
            | ClockHour
    )
}

/// True if the fault affects the database or the agents, so that no controller can work.
fn is_of_everybody(kind: Kind) -> bool {
    use Kind::{
        AgentsBlackHole, AgentsKilled, AgentsLatency, ConnectionsTaken, FailOver, ReadOnly, Restart, RowsLocked,
        SessionsCut,
    };
    matches!(
        kind,
        RowsLocked
            | ConnectionsTaken
            | ReadOnly
            | Restart
            | FailOver
            | SessionsCut
            | AgentsBlackHole
            | AgentsLatency
            | AgentsKilled
    )
}
