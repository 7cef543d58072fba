//! Checks how a controller asks the database for its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, TimeZone as _, Utc};
use tokio_util::sync::CancellationToken;

use crate::clock::{AnchoredClock, Clock as _, MAX_ROUND_TRIP, Sample};
use crate::store::StoreError;
use crate::{SAMPLES, fastest_answer, keep_anchored};

fn shared() -> DateTime<Utc> {
    Utc.timestamp_opt(1_800_000_000, 0).unwrap()
}

/// Answers the questions in turn: each after this time, and with the shared time moved by so many hours. `None`: an
/// error.
async fn asked(answers: [Option<(Duration, i64)>; SAMPLES]) -> (usize, anyhow::Result<Option<Sample>>) {
    let questions = AtomicUsize::new(0);
    let sample = fastest_answer(|| {
        let answer = answers[questions.fetch_add(1, Ordering::Relaxed)];
        async move {
            let Some((late, hours)) = answer else { return Err(StoreError::Url("no answer".to_owned())) };
            tokio::time::sleep(late).await;
            Ok(Some(shared() + TimeDelta::hours(hours)))
        }
    });
    let sample = sample.await;
    (questions.into_inner(), sample)
}

#[tokio::test]
async fn clock_is_set_by_the_fastest_of_several_answers() {
    let late = MAX_ROUND_TRIP + Duration::from_millis(50);
    for answers in [
        [Some((late, 1)), Some((Duration::ZERO, 0)), Some((late, 2))],
        [None, Some((late, 1)), Some((Duration::ZERO, 0))],
    ] {
        let (questions, sample) = asked(answers).await;
        assert_eq!((questions, sample.unwrap().unwrap().time), (SAMPLES, shared()), "{answers:?}");
    }
}

#[tokio::test]
async fn clock_is_not_set_by_late_answers_alone() {
    let late = Some((MAX_ROUND_TRIP + Duration::from_millis(50), 1));
    let refused = asked([late; SAMPLES]).await.1.unwrap_err();
    assert!(refused.to_string().contains("3 times in a row"), "{refused}");
    assert!(asked([None; SAMPLES]).await.1.is_err());
}

#[tokio::test]
async fn clock_follows_the_database_and_outlasts_a_question_without_answer() {
    let sample = |hours| {
        let now = Instant::now();
        Sample { time: shared() + TimeDelta::hours(hours), asked: now, answered: now }
    };
    let (clock, stop) = (Arc::new(AnchoredClock::new(sample(0))), CancellationToken::new());
    let (questions, ends) = (AtomicUsize::new(0), stop.clone());
    let ask = || {
        let number = questions.fetch_add(1, Ordering::Relaxed);
        if number == 2 {
            ends.cancel();
        }
        async move { if number == 0 { anyhow::bail!("no answer") } else { Ok(Some(sample(i64::try_from(number)?))) } }
    };
    keep_anchored(Arc::clone(&clock), ask, Duration::from_millis(1), stop).await;
    assert_eq!(questions.load(Ordering::Relaxed), 3);
    let ahead = clock.now() - shared();
    assert!(ahead >= TimeDelta::hours(2) && ahead < TimeDelta::hours(3), "{ahead}");
}
