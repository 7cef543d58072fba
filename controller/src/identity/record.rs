//! Audit of calls: every change, and every refused call, up to a rate at which a flood of refused calls cannot fill the
//! disk.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::peer_log::{Peer, cut, may_log, of_peer};
use super::rate::{Rate, source};
use crate::store::{AuditRow, Store};

/// Refused calls of unknown callers from one address. A broken script shows, and a scanner does not fill pages.
const UNKNOWN_BURST: u32 = 20;
const UNKNOWN_EVERY: Duration = Duration::from_secs(10);
/// The same, from all addresses together: at most 9 MB a day.
const ALL_UNKNOWN_BURST: u32 = 500;
const ALL_UNKNOWN_EVERY: Duration = Duration::from_secs(2);
/// Refused calls of one known caller: far more than a person or a healthy service makes.
const KNOWN_BURST: u32 = 1000;
const KNOWN_EVERY: Duration = Duration::from_secs(1);
/// Largest text of a column, in bytes: callers choose some of the texts.
const TEXT_MAX: usize = 512;
/// The result of a call that succeeded.
pub const OK: &str = "OK";

/// Appends to the audit.
#[derive(Debug)]
pub struct Recorder {
    store: Store,
    unknown: Rate<IpAddr>,
    all_unknown: Rate<()>,
    known: Rate<String>,
    left_out: AtomicU64,
}

impl Recorder {
    /// A recorder that writes to this store.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            unknown: Rate::new(UNKNOWN_BURST, UNKNOWN_EVERY),
            all_unknown: Rate::new(ALL_UNKNOWN_BURST, ALL_UNKNOWN_EVERY),
            known: Rate::new(KNOWN_BURST, KNOWN_EVERY),
            left_out: AtomicU64::new(0),
        }
    }

    /// Appends a call to the audit. Refused calls are limited; the next one that is written carries the number of those
    /// that were not.
    pub async fn record(&self, row: AuditRow, address: Option<IpAddr>) {
        let mut row = cleaned(row);
        if row.result == "UNAVAILABLE" {
            // Nothing was changed, and the store does not answer: the caller would wait a second time.
            return;
        }
        // Only failed calls are limited: the audit must have every change.
        if row.result != OK {
            let allowed = match address.map(source) {
                Some(address) if row.actor.is_empty() => {
                    // The address goes first: one that has used up its own share takes nothing from the others.
                    self.unknown.take(address, row.time) && self.all_unknown.take((), row.time)
                }
                _ => self.known.take(row.actor.clone(), row.time),
            };
            if !allowed {
                self.left_out.fetch_add(1, Ordering::Relaxed);
                return;
            }
            // In the row itself, so that the audit shows its own gaps.
            let left_out = self.left_out.swap(0, Ordering::Relaxed);
            if left_out > 0 {
                row.message = format!("{} ({left_out} other refused calls were not recorded)", row.message);
            }
        }
        log(&row, address);
        if let Err(error) = self.store.record_audit(&row).await {
            of_peer!(error, row.actor.as_str(), error = &*crate::chain(&error), "a call could not be recorded");
        }
    }
}

/// Logs a call.
pub fn log(row: &AuditRow, address: Option<IpAddr>) {
    let AuditRow { actor, from, method, target, result, .. } = row;
    let peer = match address {
        Some(address) if actor.is_empty() => Peer::Address(source(address)),
        _ => Peer::from(actor.as_str()),
    };
    if may_log(peer) {
        let (actor, method, target) = (cut(actor), cut(method), cut(target));
        tracing::info!(%actor, from, %method, %target, result, "call");
    }
}

/// Bounds the texts of a row and removes their control characters.
pub fn cleaned(mut row: AuditRow) -> AuditRow {
    for text in [&mut row.actor, &mut row.method, &mut row.target, &mut row.message] {
        shorten(text);
    }
    row
}

/// Sets the target of a row.
pub fn set_target(row: &mut AuditRow, target: &str) {
    target.clone_into(&mut row.target);
    shorten(&mut row.target);
}

fn shorten(text: &mut String) {
    if text.len() > TEXT_MAX {
        let end = (0..=TEXT_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    if text.chars().any(char::is_control) {
        // The audit is shown in terminals, where control characters act.
        *text = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::{TEXT_MAX, shorten};

    #[test]
    fn what_a_caller_sends_is_bounded_and_harmless() {
        let mut text = format!("a\n\u{1b}[31m{}", "é".repeat(TEXT_MAX));
        shorten(&mut text);
        assert!(text.len() <= TEXT_MAX + 6 && !text.contains(char::is_control), "{text}");
    }
}
