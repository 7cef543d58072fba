//! Maintenance windows: work waits for them, and continues when they open.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use marco_controller::operation::{ExecutionState, WaitReason};
use marco_controller::schedule::MaintenanceWindow;
use marco_controller::store::NewOperation;
use marco_proto::names::ExecutionId;

use crate::support::{Fixture, after, new_operation, reboot, report, start};

/// Two hours from each midnight, UTC.
fn nightly() -> MaintenanceWindow {
    MaintenanceWindow { cron: "0 0 * * *".to_owned(), duration: Duration::from_secs(7200), time_zone: String::new() }
}

fn midnight() -> DateTime<Utc> {
    nightly().closed_until(start()).unwrap()
}

pub(crate) async fn nothing_is_begun_while_the_window_is_closed(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let new = NewOperation { window: Some(nightly()), ..new_operation(reboot(), std::slice::from_ref(&id)) };
    f.store.create_operation(&new, start()).await.unwrap();
    let execution = ExecutionId { operation: new.id.clone(), node: id.clone() };
    let row = f.execution(&execution).await;
    assert_eq!((row.wait_reason, row.next_attempt_time), (Some(WaitReason::WindowClosed), Some(midnight())));
    assert!(f.store.move_windows(after(1)).await.unwrap().is_empty());
    assert!(f.claim(&[(id.clone(), epoch)], after(1)).await.is_empty());

    assert_eq!(f.store.move_windows(midnight()).await.unwrap(), std::slice::from_ref(&new.id));
    let row = f.execution(&execution).await;
    assert_eq!((row.wait_reason, row.next_attempt_time), (Some(WaitReason::Due), None));
    let assignment = f.claim(&[(id, epoch)], midnight()).await.remove(0);
    assert_eq!(f.store.operation(&new.id).await.unwrap().unwrap().window, Some(nightly()));
    // Work that has begun continues after the window closes.
    let closes = midnight() + TimeDelta::hours(2);
    f.store.move_windows(closes).await.unwrap();
    f.report(epoch, &report(&assignment, 1, ExecutionState::Succeeded, "boot-2"), closes).await;
    assert_eq!(f.state(&execution).await, ExecutionState::Succeeded);
}

pub(crate) async fn what_was_not_begun_in_a_window_waits_for_the_next(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let window = NewOperation {
        window: Some(nightly()),
        expire_time: midnight() + TimeDelta::days(3),
        ..new_operation(reboot(), std::slice::from_ref(&id))
    };
    f.store.create_operation(&window, start()).await.unwrap();
    f.store.move_windows(midnight()).await.unwrap();
    // The pause covers the whole window, so that nothing begins in it.
    f.store.pause(&window.id, "pat", "", midnight()).await.unwrap();
    let closes = midnight() + TimeDelta::hours(2);
    assert_eq!(f.store.move_windows(closes).await.unwrap().len(), 1);
    f.store.resume(&window.id, "pat", closes).await.unwrap();
    let execution = f.execution(&ExecutionId { operation: window.id.clone(), node: id.clone() }).await;
    assert_eq!(execution.wait_reason, Some(WaitReason::WindowClosed));
    assert_eq!(execution.next_attempt_time, Some(midnight() + TimeDelta::days(1)));
    // A closed window does not keep the node from other operations.
    let other = f.create(reboot(), std::slice::from_ref(&id)).await;
    assert_eq!(f.claim(&[(id, epoch)], closes).await.remove(0).execution.operation, other);
}

pub(crate) async fn a_window_that_never_opens_promises_nothing(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    let window = MaintenanceWindow { cron: "0 0 30 2 *".to_owned(), ..nightly() };
    let new = NewOperation { window: Some(window), ..new_operation(reboot(), std::slice::from_ref(&id)) };
    f.store.create_operation(&new, start()).await.unwrap();
    assert!(f.store.move_windows(after(1)).await.unwrap().is_empty());
    let row = f.execution(&ExecutionId { operation: new.id, node: id }).await;
    assert_eq!((row.wait_reason, row.next_attempt_time), (Some(WaitReason::WindowClosed), None));
}
