//! Sending to a client that may not be reading: both the queue and the wait are bounded.

use std::time::Duration;

use tokio::sync::mpsc::Sender;

/// The reason why a message was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The reader is gone.
    Gone,
    /// The reader took nothing within the timeout.
    Slow,
}

/// Sends a message; waits at most `patience` for a place in the queue.
pub(super) async fn send<T>(to: &Sender<T>, message: T, patience: Duration) -> Result<(), Unsent> {
    match tokio::time::timeout(patience, to.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Unsent::Gone),
        Err(_) => Err(Unsent::Slow),
    }
}

/// Sends a message that a newer one replaces soon; drops it if the queue is full.
pub(super) fn offer<T>(to: &Sender<T>, message: T) {
    // A full queue means that the reader has older states to read anyway.
    let _ = to.try_send(message);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::{Unsent, offer, send};

    /// Longer than any wait here; reached only by a failure.
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
