//! Ports for a test's controller. The test chooses them beforehand, because the controller takes them as flags.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};

/// Below Linux's ephemeral range, so that no outgoing connection of another test takes one.
const FIRST: u16 = 10_000;
const COUNT: u16 = 22_000;

/// A free port on the loopback interface that no other test of this process was given.
pub(super) fn free() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test processes that run at the same time begin at different ports.
    let own = u16::try_from(u64::from(std::process::id()).wrapping_mul(131) % u64::from(COUNT))?;
    (0..COUNT)
        .map(|_| {
            let offset = (u32::from(own) + u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % u32::from(COUNT);
            SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST + u16::try_from(offset).unwrap_or_default()))
        })
        // Binding proves that no other process listens. The listener is dropped at once, and the controller binds next.
        .find(|address| TcpListener::bind(address).is_ok())
        .context("no free port")
}
