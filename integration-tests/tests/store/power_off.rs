//! Proof that a node is off.

use marco_controller::operation::{Conflict, ExecutionError, ExecutionState, OperationState, reason};
use marco_controller::store::{ReportOutcome, ReportRow};
use marco_proto::names::ExecutionId;

use crate::support::*;

pub(crate) async fn goodbye_and_sixty_silent_seconds_prove_it(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(power_off()).await;
    let execution = &assignment.execution;
    assert!(!f.store.say_goodbye(execution, epoch, after(5)).await.unwrap(), "it has not armed the power-off");
    f.report(epoch, &report(&assignment, 1, ExecutionState::Rebooting, "boot-1"), after(10)).await;
    assert!(!f.store.say_goodbye(execution, epoch - 1, after(15)).await.unwrap(), "under another session");
    assert!(f.store.say_goodbye(execution, epoch, after(19)).await.unwrap());
    assert!(f.store.power_off_done(start(), after(500)).await.unwrap().is_empty(), "its stream is open");
    f.store.end_session(&id, epoch, after(20)).await.unwrap();
    assert!(f.store.power_off_done(start(), after(79)).await.unwrap().is_empty());
    // A controller that was away cannot know whether the node would have come back.
    assert!(f.store.power_off_done(after(450), after(500)).await.unwrap().is_empty());
    let done = f.store.power_off_done(after(20), after(80)).await.unwrap();
    assert_eq!((done.len(), done[0].to), (1, ExecutionState::Succeeded));
    assert_eq!(f.operation_state(&execution.operation).await, OperationState::Succeeded);
    let events = f.store.events(&execution.operation, 0, 100).await.unwrap();
    assert!(events.iter().any(|event| event.reason == "the agent ends with the power-off"), "{events:?}");
}

pub(crate) async fn broken_stream_proves_nothing(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(power_off()).await;
    let armed = report(&assignment, 1, ExecutionState::Rebooting, "boot-1");
    f.report(epoch, &armed, after(10)).await;
    f.store.end_session(&id, epoch, after(20)).await.unwrap();
    assert!(f.store.power_off_done(start(), after(500)).await.unwrap().is_empty(), "it only broke");
    // The node connects again while its shutdown hangs. The goodbye of its earlier session would not count any more.
    let epoch = f.session(&id, "boot-1", after(501)).await;
    f.hello(&id, epoch, "boot-1", std::slice::from_ref(&armed), true, 501).await;
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Rebooting, "it is on its way down");
    assert!(f.store.say_goodbye(&assignment.execution, epoch, after(502)).await.unwrap());
    f.store.end_session(&id, epoch, after(502)).await.unwrap();
    // Any later session makes the goodbye void, because the machine was not off.
    let later = f.session(&id, "boot-1", after(503)).await;
    f.store.end_session(&id, later, after(504)).await.unwrap();
    assert!(f.store.power_off_done(start(), after(9000)).await.unwrap().is_empty(), "it was heard of since");
    assert_eq!(f.store.mark_overdue(after(9000)).await.unwrap().len(), 1);
}

pub(crate) async fn returning_node_is_told_by_its_boot_id(f: Fixture) {
    for (boot_id, listed, end) in [
        ("boot-1", false, ExecutionState::Failed),
        ("boot-1", true, ExecutionState::Rebooting),
        ("boot-2", false, ExecutionState::Succeeded),
        ("boot-2", true, ExecutionState::Succeeded),
    ] {
        let (id, epoch) = f.online(&format!("pi-{boot_id}-{listed}")).await;
        f.create(power_off(), std::slice::from_ref(&id)).await;
        let assignment = f.claim(&[(id.clone(), epoch)], start()).await.remove(0);
        let armed = report(&assignment, 1, ExecutionState::Rebooting, "boot-1");
        f.report(epoch, &armed, after(1)).await;
        let epoch = f.session(&id, boot_id, after(2)).await;
        let listed = if listed { vec![armed] } else { Vec::new() };
        f.hello(&id, epoch, boot_id, &listed, true, 2).await;
        assert_eq!(f.state(&assignment.execution).await, end, "{boot_id} {listed:?}");
    }
}

pub(crate) async fn contradiction_of_an_end_is_kept_and_shown(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(power_off()).await;
    let execution = &assignment.execution;
    f.report(epoch, &report(&assignment, 2, ExecutionState::Rebooting, "boot-1"), after(1)).await;
    f.store.say_goodbye(execution, epoch, after(2)).await.unwrap();
    f.store.end_session(&id, epoch, after(2)).await.unwrap();
    assert_eq!(f.store.power_off_done(start(), after(62)).await.unwrap().len(), 1);
    // It was not off: its agent was started again.
    let epoch = f.session(&id, "boot-1", after(100)).await;
    let error = Some(ExecutionError::new("POWER_OFF_DID_NOT_HAPPEN", "still running"));
    let still_on = ReportRow { error, ..report(&assignment, 3, ExecutionState::Failed, "boot-1") };
    let events = |f: &Fixture| {
        let (store, id) = (f.store.clone(), execution.operation.clone());
        async move { store.events(&id, 0, 100).await.unwrap() }
    };
    let before = events(&f).await.len();
    for at in [101, 102] {
        let hello = f.hello(&id, epoch, "boot-1", std::slice::from_ref(&still_on), true, at).await;
        assert_eq!(hello.acks, [(execution.clone(), 3)], "it need not be said again");
        let outcome = f.report(epoch, &still_on, after(at)).await;
        assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: true, .. }), "{outcome:?}");
    }
    assert_eq!(f.state(execution).await, ExecutionState::Succeeded, "an end is for good");
    let after_it = events(&f).await;
    assert_eq!(after_it.len(), before + 1, "it is an event once");
    assert!(after_it.last().unwrap().reason.contains("POWER_OFF_DID_NOT_HAPPEN"), "{after_it:?}");
    let shown = f.store.node(&id).await.unwrap().unwrap().conflicts;
    assert_eq!((shown.len(), shown[0].holds), (1, false), "{shown:?}");
    assert!(f.store.conflict(execution).await.unwrap().is_some());
    // The conflict does not keep the node from other work.
    f.create(reboot(), std::slice::from_ref(&id)).await;
    assert_eq!(f.claim(&[(id, epoch)], after(103)).await.len(), 1);
    assert_eq!(reason::STILL_ON, "STILL_ON");
}

pub(crate) async fn work_on_what_has_ended_is_kept_and_shown(f: Fixture) {
    for end in [ExecutionState::Cancelled, ExecutionState::Expired, ExecutionState::Succeeded] {
        let (id, epoch) = f.online(&format!("pi-{}", end.as_str().to_lowercase())).await;
        f.create(reboot(), std::slice::from_ref(&id)).await;
        let assignment = f.claim(&[(id.clone(), epoch)], start()).await.remove(0);
        let execution = &assignment.execution;
        let mut sequence = 1;
        match end {
            ExecutionState::Cancelled => {
                f.store.request_cancel(&execution.operation, "pat", after(1)).await.unwrap();
            }
            ExecutionState::Succeeded => {
                f.report(epoch, &report(&assignment, 1, ExecutionState::Rebooting, "boot-1"), after(1)).await;
                f.report(epoch, &report(&assignment, 2, ExecutionState::Succeeded, "boot-2"), after(2)).await;
                sequence = 3;
            }
            _ => {}
        }
        // The node did not say that it has it, so it is taken back.
        let epoch = f.session(&id, "boot-1", after(3)).await;
        f.hello(&id, epoch, "boot-1", &[], true, 3).await;
        f.store.expire(after(25 * 3600)).await.unwrap();
        assert_eq!(f.state(execution).await, end);
        let events = async || f.store.events(&execution.operation, 0, 100).await.unwrap().len();
        let before = events().await;
        let running = report(&assignment, sequence, ExecutionState::Running, "boot-1");
        for at in 4..8 {
            let outcome = f.report(epoch, &running, after(at)).await;
            assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: true, .. }), "{end}: {outcome:?}");
        }
        assert_eq!((f.state(execution).await, events().await), (end, before + 1), "an event, once");
        let shown = f.store.node(&id).await.unwrap().unwrap().conflicts;
        assert_eq!(shown.len(), 1, "{end}: {shown:?}");
        assert_eq!((shown[0].kind, shown[0].reported, shown[0].holds), (Conflict::Ended, running.state, false));
        // An acknowledgement would accept the system that it asks about.
        let asks = report(&assignment, sequence + 1, ExecutionState::Verifying, "boot-1");
        let outcome = f.report(epoch, &asks, after(8)).await;
        assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: false, .. }), "{end}: {outcome:?}");
        // The node refuses other work for it. What it goes on to say does not give it other work again.
        let waiting = f.create(reboot(), std::slice::from_ref(&id)).await;
        let refused = ExecutionId { operation: waiting, node: id.clone() };
        let busy = ReportRow { sequence: sequence + 2, ..running };
        assert!(f.store.not_held(&refused, Some(&busy), epoch, after(9)).await.unwrap());
        f.report(epoch, &ReportRow { phase: "restarting".to_owned(), sequence: sequence + 3, ..busy }, after(10)).await;
        assert!(f.claim(&[(id.clone(), epoch)], after(11)).await.is_empty(), "{end}: it would refuse it again");
    }
}
