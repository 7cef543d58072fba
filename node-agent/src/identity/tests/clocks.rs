//! Controllers with wrong clocks, which are right again later.

use super::*;

const DAY: i64 = 24 * 60 * 60 * 1_000_000;

/// End of the time in which the certificate needs no renewal.
fn rests(identity: &Identity) -> Duration {
    identity.renewal_in()
}

#[tokio::test]
async fn renewal_that_succeeded_is_not_due_again() {
    // 20 days ahead, within the certificate's 30 days; a build after the controller's time; and a time long ago.
    for wrong in ["2026-01-21T00:00:00Z", "2026-06-01T00:00:00Z", "1970-01-02T00:00:00Z"] {
        let dir = tempfile::tempdir().unwrap();
        let controller = Controller::start(Pki::new(FROM, TO)).await;
        enrolled(dir.path(), &controller).await;
        let time = Arc::new(TlsTime::starting_at(micros(wrong)));
        let identity = Identity::load(dir.path(), time).unwrap().unwrap();
        identity.renew(std::slice::from_ref(&controller.address), KeyPolicy::Rotate).await.unwrap();
        assert!(rests(&identity) > Duration::from_secs(5 * 86_400), "{wrong}: due in {:?}", rests(&identity));
        identity.connect(&controller.address, Purpose::Session).await.unwrap();
        // The same after a restart.
        let again = Identity::load(dir.path(), time_of_build()).unwrap().unwrap();
        assert!(rests(&again) > Duration::from_secs(5 * 86_400), "{wrong}: due in {:?}", rests(&again));
    }
}

/// An agent that was built before the certificates were issued.
fn time_of_build() -> Arc<TlsTime> {
    Arc::new(TlsTime::starting_at(micros(FROM) - 100 * DAY))
}

#[tokio::test]
async fn time_before_the_build_is_believed_when_proved() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    enrolled(dir.path(), &controller).await;
    let built = Arc::new(TlsTime::starting_at(micros("2027-06-01T00:00:00Z")));
    let identity = Identity::load(dir.path(), built).unwrap().unwrap();
    // It takes the controller's certificate for expired until another time is proved.
    let refused = identity.connect(&controller.address, Purpose::Session).await;
    assert!(matches!(refused, Err(IdentityError::Connect { .. })), "{refused:?}");
    assert!(identity.is_refused());
    identity.renew(std::slice::from_ref(&controller.address), KeyPolicy::Rotate).await.unwrap();
    identity.connect(&controller.address, Purpose::Session).await.unwrap();
    let now = identity.time().now_micros();
    assert!((micros(FROM)..micros(TO)).contains(&now), "{now}");
}

#[tokio::test]
async fn certificate_that_is_not_valid_yet_is_due_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let identity = enrolled(dir.path(), &controller).await;
    assert!(!rests(&identity).is_zero());
    identity.time().set(micros(FROM) - DAY);
    assert!(rests(&identity).is_zero());
}

#[tokio::test]
async fn certificate_of_another_ca_proves_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    enrolled(dir.path(), &controller).await;
    let foreign = Controller::start(Pki::new("2060-01-01T00:00:00Z", "2060-01-31T00:00:00Z")).await;
    let other = tempfile::tempdir().unwrap();
    enrolled(other.path(), &foreign).await;
    // A card that was put together from two.
    for file in ["node.crt", "node.key"] {
        std::fs::copy(other.path().join(file), dir.path().join(file)).unwrap();
    }
    let time = time();
    assert!(Identity::load(dir.path(), Arc::clone(&time)).is_err());
    assert!(time.now_micros() < micros(FROM), "{}", time.now());
}

#[tokio::test]
async fn years_ahead_and_back_again_cost_two_renewals() {
    let dir = tempfile::tempdir().unwrap();
    let right = Controller::start(Pki::new(FROM, TO)).await;
    enrolled(dir.path(), &right).await;
    let ahead = Controller::start(right.pki.at("2027-01-01T00:00:00Z", "2027-01-31T00:00:00Z")).await;
    let identity = Arc::new(Identity::load(dir.path(), time()).unwrap().unwrap());
    let (stop, kept) = (CancellationToken::new(), Arc::clone(&identity));
    let address = Arc::new(std::sync::Mutex::new(ahead.address.clone()));
    let (stopped, listener) = (stop.clone(), Arc::clone(&address));
    let keeping = tokio::spawn(async move {
        kept.keep_fresh(|| vec![listener.lock().unwrap().clone()], KeyPolicy::Rotate, &stopped).await;
    });
    for (controller, told) in [(&ahead, "2027-01-02T00:00:00Z"), (&right, "2026-01-02T00:00:00Z")] {
        address.lock().unwrap().clone_from(&controller.address);
        let hello = async || {
            let channel = identity.connect(&controller.address, Purpose::Session).await.ok()?;
            let (_requests, stream) = tokio::sync::mpsc::channel::<ConnectRequest>(1);
            AgentServiceClient::new(channel).connect(ReceiverStream::new(stream)).await.ok()
        };
        let back = tokio::time::timeout(Duration::from_secs(30), async {
            while hello().await.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        back.await.unwrap_or_else(|_| panic!("it did not come back at {told}"));
        identity.accepted();
        identity.learn_time(micros(told));
    }
    // A node used to renew every second in this case, and its time never went back.
    assert_eq!((ahead.renewed().len(), right.renewed().len()), (1, 1));
    assert!(rests(&identity) > Duration::from_secs(5 * 86_400));
    stop.cancel();
    keeping.await.unwrap();
}
