//! Sending to somebody who may not be reading: what waits is bounded, and so is the time.

use std::time::Duration;

use tokio::sync::mpsc::Sender;

/// Why a message did not go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsent {
    /// Nobody reads any more.
    Gone,
    /// Nothing was taken for so long as was waited.
    Slow,
}

/// Waits for room, but not for longer than `patience`.
pub(super) async fn send<T>(to: &Sender<T>, message: T, patience: Duration) -> Result<(), Unsent> {
    match tokio::time::timeout(patience, to.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Unsent::Gone),
        Err(_) => Err(Unsent::Slow),
    }
}

/// For what a newer message replaces soon: without room it is left out.
pub(super) fn offer<T>(to: &Sender<T>, message: T) {
    let _ = to.try_send(message);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::{Unsent, offer, send};

    /// Longer than any wait here: only a failure takes it.
    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn who_takes_nothing_is_given_up_and_who_takes_something_is_not() {
        let (sender, mut receiver) = mpsc::channel(1);
        assert_eq!(send(&sender, 1, LONG).await, Ok(()));
        assert_eq!(send(&sender, 2, Duration::from_millis(20)).await, Err(Unsent::Slow));
        let (sent, taken) = tokio::join!(send(&sender, 3, LONG), receiver.recv());
        assert_eq!((sent, taken, receiver.recv().await), (Ok(()), Some(1), Some(3)));
        drop(receiver);
        assert_eq!(send(&sender, 4, LONG).await, Err(Unsent::Gone));
    }

    #[tokio::test]
    async fn what_has_no_room_is_left_out_and_nobody_waits() {
        let (sender, mut receiver) = mpsc::channel(2);
        (0..100).for_each(|number| offer(&sender, number));
        drop(sender);
        assert_eq!((receiver.recv().await, receiver.recv().await, receiver.recv().await), (Some(0), Some(1), None));
    }
}
