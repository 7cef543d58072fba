//! The hardware watchdog: it resets the machine if the installer hangs, and the installer starts again.

use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

const DEVICE: &str = "/dev/watchdog";
/// Feeding interval. A Raspberry Pi's watchdog expires after at most 15 s.
const EVERY: Duration = Duration::from_secs(4);

/// Fed while the runtime makes progress. Closed without its magic byte, it keeps counting after the agent ends.
pub(super) struct Watchdog {
    device: Arc<Mutex<Option<File>>>,
    _feeder: AbortOnDropHandle<()>,
}

impl Watchdog {
    /// Opens the device, if there is one, and keeps feeding it.
    pub(super) fn start() -> Self {
        let device = std::fs::OpenOptions::new().write(true).open(DEVICE);
        if let Err(error) = &device {
            tracing::info!(error = %error, "no watchdog");
        }
        let device = Arc::new(Mutex::new(device.ok()));
        let fed = Arc::clone(&device);
        let feeder = tokio::spawn(async move {
            loop {
                feed(&fed);
                tokio::time::sleep(EVERY).await;
            }
        });
        Self { device, _feeder: AbortOnDropHandle::new(feeder) }
    }

    pub(super) fn feed(&self) {
        feed(&self.device);
    }
}

fn feed(device: &Mutex<Option<File>>) {
    if let Some(device) = device.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        // Any byte except V feeds it (kernel, watchdog-api). A write that fails leads to a reset, as a hang does.
        let _ = device.write_all(b"\0");
    }
}
