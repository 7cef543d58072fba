//! A Raspberry Pi 4 B made of a directory, with firmware that obeys the same rules as the real one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::{System, SystemError};

/// How fast a virtual Pi is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// From power or reset until the agent runs.
    pub boot_time: Duration,
    /// From the command to go down until the machine is down.
    pub shutdown_time: Duration,
}

/// A Raspberry Pi 4 B made of a directory.
#[derive(Debug)]
pub struct VirtualPi {}

impl VirtualPi {
    /// Opens the Pi in `dir`, whose id is the folder's name; lays it out first if there is none, powered on.
    pub fn open(_dir: &Path, _id: &str, _options: Options) -> Result<Arc<Self>, SystemError> {
        todo!()
    }

    /// Lets the Pi run until `stop`: boots, starts `agent` (again a second after it returned), drops it when the
    /// machine goes down, and boots again. On `stop` the agent gets a moment to return by itself.
    pub async fn power<F>(self: Arc<Self>, _agent: F, _stop: CancellationToken) -> Result<(), SystemError>
    where
        F: Fn(Arc<dyn System>) -> BoxFuture<'static, ()> + Send,
    {
        todo!()
    }
}
