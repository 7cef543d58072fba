//! Ports for the controller of a test: the contract of its flags is that it gets them, so they are chosen before.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};

/// Below the range that Linux takes ports of outgoing connections from, so that no client of another test gets one.
const FIRST: u16 = 10_000;
const COUNT: u16 = 22_000;

/// A port on the loopback interface on which nobody listens, and that no other test of this process was given.
pub(super) fn free() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test processes that run at the same time begin at different places.
    let own = u16::try_from(u64::from(std::process::id()).wrapping_mul(131) % u64::from(COUNT))?;
    (0..COUNT)
        .map(|_| {
            let offset = (u32::from(own) + u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % u32::from(COUNT);
            SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST + u16::try_from(offset).unwrap_or_default()))
        })
        .find(|address| TcpListener::bind(address).is_ok())
        .context("no free port")
}
