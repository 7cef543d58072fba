//! The recorded history: its retention, and that it is true.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::join_all;
use marco_controller::operation::{ExecutionState, OperationState};
use marco_controller::store::ReportOutcome;
use marco_proto::names::{ExecutionId, NodeId};

use crate::support::*;

pub(crate) async fn events_of_operations_that_ended_long_ago_are_removed_and_the_operations_kept(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let old = assignment.execution.operation.clone();
    for (sequence, state, boot_id) in
        [(1, ExecutionState::Rebooting, "boot-1"), (2, ExecutionState::Succeeded, "boot-2")]
    {
        f.report(epoch, &report(&assignment, sequence, state, boot_id), after(3)).await;
    }
    f.store.finish_operations(after(4)).await.unwrap();
    let unfinished = f.create(reboot(), &[node("pi-1")]).await;
    assert_eq!(f.store.prune_events(after(3)).await.unwrap(), 0, "it had not ended before");
    let events = f.store.events(&old, 0, 100).await.unwrap();
    assert!(events.iter().any(|event| event.to == "SUCCEEDED" && event.node.is_some()), "{events:?}");
    assert_eq!(f.store.prune_events(after(5)).await.unwrap(), 1);
    assert_eq!(f.store.prune_events(after(5)).await.unwrap(), 0);
    assert!(f.store.events(&old, 0, 100).await.unwrap().is_empty());
    assert!(!f.store.events(&unfinished, 0, 100).await.unwrap().is_empty());
    assert_eq!(f.operation_state(&old).await, OperationState::Succeeded);
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Succeeded);
}

/// Number of nodes that race, and of races for each.
const RACERS: usize = 20;
const ROUNDS: usize = 50;

/// Yields a random number of times, so that each race has another order.
async fn dawdle(random: &mut u64, most: u64) {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    for _ in 0..(*random >> 33) % most {
        tokio::task::yield_now().await;
    }
}

/// A node's part of a race: takes its assignment, and obeys a cancel until the point of no return. Returns true if it
/// rebooted. `steps` counts its progress.
async fn play(
    f: &Fixture,
    id: &NodeId,
    (epoch, boot): (&mut i64, &mut u32),
    mut random: u64,
    of: &ExecutionId,
    steps: &AtomicU64,
) -> bool {
    let name = |boot: u32| format!("boot-{boot}");
    loop {
        let given = f.claim(&[(id.clone(), *epoch)], after(2)).await;
        let Some(assignment) = given.into_iter().find(|given| &given.execution == of) else {
            if f.state(of).await.is_final() {
                return false;
            }
            dawdle(&mut random, 20).await;
            continue;
        };
        steps.fetch_add(1, Ordering::Relaxed);
        dawdle(&mut random, 200).await;
        let running = report(&assignment, 1, ExecutionState::Running, &name(*boot));
        assert_eq!(f.report(*epoch, &running, after(3)).await, ReportOutcome::Acked);
        steps.fetch_add(1, Ordering::Relaxed);
        dawdle(&mut random, 200).await;
        if f.store.cancels_due("c1", after(0)).await.unwrap().contains(of) {
            let cancelled = report(&assignment, 2, ExecutionState::Cancelled, &name(*boot));
            assert_eq!(f.report(*epoch, &cancelled, after(4)).await, ReportOutcome::Acked);
            return false;
        }
        steps.fetch_add(1, Ordering::Relaxed);
        dawdle(&mut random, 200).await;
        let rebooting = report(&assignment, 2, ExecutionState::Rebooting, &name(*boot));
        // Half of the nodes reboot before this report arrives, as after a broken stream.
        let told = random & 8 != 0;
        if told {
            assert_eq!(f.report(*epoch, &rebooting, after(4)).await, ReportOutcome::Acked);
        }
        steps.fetch_add(1, Ordering::Relaxed);
        *boot += 1;
        *epoch = f.session(id, &name(*boot), after(5)).await;
        // A returning node repeats its last journalled state, even if the controller has it already.
        let back = f.reconcile(id, *epoch, &name(*boot), &[rebooting], 5).await;
        assert!(back.holder && back.refused.is_empty(), "{back:?}");
        let done = report(&assignment, 3, ExecutionState::Succeeded, &name(*boot));
        assert_eq!(f.report(*epoch, &done, after(6)).await, ReportOutcome::Acked);
        steps.fetch_add(1, Ordering::Relaxed);
        return true;
    }
}

pub(crate) async fn races_of_cancel_against_dispatch_and_completion_end_as_the_node_says(f: Fixture) {
    let names: Vec<String> = (0..RACERS).map(|number| format!("pi-{number}")).collect();
    let nodes = f.enrolled(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let f = Arc::new(f);
    // A new seed for each run: the races should explore new orders, and failures print it.
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
    let racers = nodes.into_iter().zip(1_u64..).map(|(id, number)| {
        let f = Arc::clone(&f);
        tokio::spawn(async move {
            let mut random = u64::from(seed).wrapping_mul(number * 2 + 1);
            let (mut boot, mut outcomes) = (1, [0, 0]);
            let mut epoch = f.session(&id, "boot-1", after(1)).await;
            for _ in 0..ROUNDS {
                let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
                let execution = ExecutionId { operation: operation.clone(), node: id.clone() };
                dawdle(&mut random, 50).await;
                // The canceller waits for a random step of the node, so that cancels hit each phase of an execution.
                let (steps, mut cancellers) = (AtomicU64::new(0), random);
                let (restarted, ()) =
                    tokio::join!(play(&f, &id, (&mut epoch, &mut boot), random, &execution, &steps), async {
                        while steps.load(Ordering::Relaxed) < (random >> 40) % 6 {
                            tokio::task::yield_now().await;
                        }
                        dawdle(&mut cancellers, 300).await;
                        f.store.request_cancel(&operation, "pat", after(3)).await.unwrap();
                    });
                let wanted = if restarted { ExecutionState::Succeeded } else { ExecutionState::Cancelled };
                assert_eq!(f.state(&execution).await, wanted, "{execution} with seed {seed}");
                f.store.finish_operations(after(7)).await.unwrap();
                let ended = f.operation_state(&operation).await;
                let wanted = if restarted { OperationState::Succeeded } else { OperationState::Cancelled };
                assert_eq!(ended, wanted, "{operation} with seed {seed}");
                outcomes[usize::from(restarted)] += 1;
            }
            outcomes
        })
    });
    let mut all = [0, 0];
    for outcomes in join_all(racers).await {
        let [cancelled, restarted] = outcomes.unwrap();
        all = [all[0] + cancelled, all[1] + restarted];
    }
    assert_eq!(all[0] + all[1], RACERS * ROUNDS);
    // The control: both outcomes must occur, otherwise there was no race.
    assert!(all.iter().all(|count| *count > 10), "a race that always ends the same is none: {all:?}, seed {seed}");
}
