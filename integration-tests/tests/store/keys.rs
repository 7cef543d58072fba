//! Keys of nodes: new ones wait for approval, renewals replace them, and an admin revokes them.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use marco_controller::operation::NodeState;
use marco_controller::store::{
    ApiTokenRow, ApproveOutcome, EnrolOutcome, KeyState, NewToken, RenewOutcome, Scope, SessionOutcome, SessionStart,
};
use marco_proto::names::{ApiTokenId, JoinTokenId, NodeId};

use crate::enrolment::refusal;
use crate::support::*;

const HOUR: i64 = 3600;

/// A Hello with this key.
fn hello_with(key: &str, boot_id: &str, second: i64) -> SessionStart {
    SessionStart { key_sha256: key.to_owned(), ..hello(boot_id, &serial_of("pi-1"), after(second)) }
}

async fn state(f: &Fixture, id: &NodeId, key: &str) -> KeyState {
    f.store.key_state(id, key).await.unwrap().unwrap()
}

async fn token_for(f: &Fixture, secret: &str, serials: &[&str], nodes: &[&str]) {
    let token = NewToken {
        id: JoinTokenId::parse(secret).unwrap(),
        secret_sha256: secret.to_owned(),
        max_uses: 9,
        expire_time: after(1800),
        require_approval: false,
        labels: labels(&[]),
        creator: "pat".to_owned(),
        cidrs: Vec::new(),
        serials: serials.iter().map(|serial| (*serial).to_owned()).collect(),
        nodes: nodes.iter().map(|id| node(id)).collect(),
    };
    f.store.create_token(&token, start()).await.unwrap();
}

fn fingerprints(waiting: &[&str]) -> Vec<String> {
    waiting.iter().map(|key| (*key).to_owned()).collect()
}

pub(crate) async fn a_new_key_of_a_known_board_changes_nothing_until_it_is_approved(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    f.token("t", 5).await;
    let before = f.store.node(&id).await.unwrap().unwrap();
    // Upper case, because serial numbers must match without regard to case.
    let thief = f.enrol("t", "key-new", Some("another-name"), &serial_of("pi-1").to_uppercase()).await;
    assert_eq!(thief, admitted("pi-1", true, 1));
    let row = f.store.node(&id).await.unwrap().unwrap();
    assert_eq!((row.state, row.session_epoch, row.connected), (NodeState::Approved, epoch, true));
    assert_eq!(row.key_sha256, "key-pi-1");
    let [waits] = row.pending_keys.as_slice() else { panic!("{:?}", row.pending_keys) };
    assert_eq!((waits.key_sha256.as_str(), waits.serial.as_str()), ("key-new", serial_of("pi-1").as_str()));
    assert!(!waits.origin.is_empty() && waits.reason.contains("another key"), "{waits:?}");
    // The pending key begins no session, under any boot id, and its certificate is held.
    for boot in ["boot-1", "boot-9"] {
        let outcome = f.say_hello(&id, &hello_with("key-new", boot, 2), after(2)).await;
        assert!(matches!(outcome, SessionOutcome::KeyHeld { just_now: false }), "{outcome:?}");
    }
    f.store.insert_certificate(&certificate("0b", &id, "key-new", 1)).await.unwrap();
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    let standings = f.store.standings(&["0a", "0b"].map(str::to_owned)).await.unwrap();
    assert!(standings.iter().all(|one| one.held == (one.serial == "0b")), "{standings:?}");
    assert_eq!(
        f.renew(&id, ("0b", "key-new"), ("0c", "key-x"), after(3)).await,
        RenewOutcome::Held { just_now: false }
    );
    assert!(f.store.lost_sessions("c1", &[(id.clone(), epoch)]).await.unwrap().is_empty());
    let after_all = f.store.node(&id).await.unwrap().unwrap();
    assert_eq!((after_all.boot_id, after_all.board), (before.boot_id, before.board));

    // The approval must name the key. The previous key is replaced then, and held if it is used again.
    let choose = f.store.approve(&id, None, after(4)).await.unwrap();
    assert_eq!(choose, ApproveOutcome::Choose(fingerprints(&["key-new"])));
    let wrong = f.store.approve(&id, Some("key-x"), after(4)).await.unwrap();
    assert_eq!(wrong, ApproveOutcome::NoSuchKey(fingerprints(&["key-new"])));
    let row = f.approve(&id, Some("key-new"), after(5)).await;
    assert_eq!((row.key_sha256.as_str(), row.pending_keys.len(), row.connected), ("key-new", 0, false));
    assert_eq!(f.store.lost_sessions("c1", &[(id.clone(), epoch)]).await.unwrap(), [(id.clone(), epoch)]);
    let standings = f.store.standings(&["0a", "0b"].map(str::to_owned)).await.unwrap();
    assert!(standings.iter().all(|one| one.held == (one.serial == "0a") && one.replaced == one.held), "{standings:?}");
    f.begin(&id, &hello_with("key-new", "boot-9", 6), after(6)).await;
    let old = f.say_hello(&id, &hello_with("key-pi-1", "boot-1", 7), after(7)).await;
    assert!(matches!(old, SessionOutcome::KeyHeld { just_now: true }), "{old:?}");
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().pending_keys[0].key_sha256, "key-pi-1");
}

pub(crate) async fn a_token_that_names_the_node_or_the_serial_approves_the_key(f: Fixture) {
    for (secret, serials, nodes) in [("s", vec![serial_of("pi-1")], vec![]), ("n", vec![], vec!["pi-1"])] {
        let id = node("pi-1");
        if secret == "s" {
            f.enrolled(&["pi-1"]).await;
        }
        token_for(&f, secret, &serials.iter().map(String::as_str).collect::<Vec<_>>(), &nodes).await;
        let key = format!("key-{secret}");
        let EnrolOutcome::Admitted { node: same, held, .. } = f.enrol(secret, &key, None, &serial_of("pi-1")).await
        else {
            panic!("it was refused")
        };
        assert_eq!((same, held), (id.clone(), false));
        let row = f.store.node(&id).await.unwrap().unwrap();
        assert_eq!(
            (row.state, row.key_sha256.as_str(), row.pending_keys.len()),
            (NodeState::Approved, key.as_str(), 0)
        );
        f.begin(&id, &hello_with(&key, &format!("boot-{secret}"), 2), after(2)).await;
    }
    // The previous key is not revoked: a restored card needs one approval then, and no new token.
    assert_eq!(state(&f, &node("pi-1"), "key-pi-1").await, KeyState::Previous);
}

pub(crate) async fn a_node_with_one_key_that_waits_needs_no_fingerprint(f: Fixture) {
    let token = NewToken { require_approval: true, ..f.token("unused", 1).await };
    let token = NewToken { id: JoinTokenId::parse("t").unwrap(), secret_sha256: "t".to_owned(), max_uses: 9, ..token };
    f.store.create_token(&token, start()).await.unwrap();
    let first = f.enrol("t", "key-1", Some("lab"), "1").await;
    assert_eq!(first, admitted("lab", true, 1));
    let id = node("lab");
    // A second key for the same board: now two are waiting, and the approval must name one.
    assert_eq!(f.enrol("t", "key-2", Some("lab"), "1").await, admitted("lab", true, 1));
    let choose = f.store.approve(&id, None, after(2)).await.unwrap();
    assert_eq!(choose, ApproveOutcome::Choose(fingerprints(&["key-1", "key-2"])));
    let row = f.approve(&id, Some("key-1"), after(3)).await;
    assert_eq!((row.state, row.key_sha256.as_str(), row.pending_keys.len()), (NodeState::Approved, "key-1", 1));
    // A single pending key needs no fingerprint, also after the node's own key was revoked.
    assert_eq!(f.enrol("t", "key-3", Some("desk"), "3").await, admitted("desk", true, 1));
    assert_eq!(f.approve(&node("desk"), None, after(3)).await.state, NodeState::Approved);
    f.store.insert_certificate(&certificate("0a", &id, "key-1", 1)).await.unwrap();
    f.store.revoke_certificate("0a", after(4)).await.unwrap().unwrap();
    assert_eq!(f.approve(&id, None, after(5)).await.key_sha256, "key-2");
    assert!(matches!(f.store.approve(&node("nobody"), None, after(5)).await.unwrap(), ApproveOutcome::NotFound));
}

pub(crate) async fn no_more_keys_wait_than_an_admin_can_look_at(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.token("t", 100).await;
    for number in 0..16 {
        assert_eq!(f.enrol("t", &format!("key-{number}"), None, &serial_of("pi-1")).await, admitted("pi-1", true, 1));
    }
    let why = refusal(f.enrol("t", "key-16", None, &serial_of("pi-1")).await);
    assert!(why.contains("too many keys wait"), "{why}");
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().pending_keys.len(), 16);
}

pub(crate) async fn a_node_is_renewed_once_in_an_hour_and_the_same_request_gets_the_same_answer(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    assert_eq!(f.renew(&id, ("0a", "key-pi-1"), ("0b", "key-2"), after(1)).await, RenewOutcome::Renewed);
    for _ in 0..3 {
        let again = f.renew(&id, ("0a", "key-pi-1"), ("0c", "key-2"), after(2)).await;
        assert_eq!(again, RenewOutcome::Again("pem of 0b".to_owned()));
    }
    let soon = f.renew(&id, ("0a", "key-pi-1"), ("0c", "key-3"), after(2)).await;
    assert_eq!(soon, RenewOutcome::TooSoon { again: after(1 + HOUR) });
    // One that was asked a little earlier and stored later is no way around that.
    let earlier = f.renew(&id, ("0a", "key-pi-1"), ("0c", "key-3"), start()).await;
    assert_eq!(earlier, RenewOutcome::TooSoon { again: after(1 + HOUR) });
    assert!(f.store.certificate("0c").await.unwrap().is_none());
    // An hour later, with the renewed key. An unused renewed key expires with the next renewal.
    assert_eq!(f.renew(&id, ("0b", "key-2"), ("0d", "key-4"), after(2 + HOUR)).await, RenewOutcome::Renewed);
    assert_eq!(state(&f, &id, "key-2").await, KeyState::InService);
    assert_eq!(state(&f, &id, "key-4").await, KeyState::Next);
    assert_eq!(state(&f, &id, "key-pi-1").await, KeyState::Previous);
    // Renewals are refused during a quarantine.
    f.store.quarantine(&id, "smoke", after(3 * HOUR)).await.unwrap();
    let shut = f.renew(&id, ("0d", "key-4"), ("0e", "key-5"), after(3 * HOUR)).await;
    assert_eq!(shut, RenewOutcome::Quarantined);
}

pub(crate) async fn a_certificate_that_is_not_valid_yet_is_replaced_at_once(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    // A controller whose clock is 20 years ahead.
    let ahead = 20 * 365 * 24 * HOUR;
    assert_eq!(f.renew(&id, ("0a", "key-pi-1"), ("0b", "key-2"), after(ahead)).await, RenewOutcome::Renewed);
    // A certificate from the future proves only that some clock was ahead, so the limit of one an hour does not apply.
    let early = f.renew(&id, ("0b", "key-2"), ("0c", "key-3"), after(1)).await;
    assert_eq!(early, RenewOutcome::Renewed);
    // Only once: after that the limit of one an hour applies.
    let soon = f.renew(&id, ("0b", "key-2"), ("0d", "key-4"), after(2)).await;
    assert_eq!(soon, RenewOutcome::TooSoon { again: after(1 + HOUR) });
}

pub(crate) async fn both_keys_of_a_renewal_serve_until_the_new_one_was_used(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    assert_eq!(f.renew(&id, ("0a", "key-pi-1"), ("0b", "key-2"), after(1)).await, RenewOutcome::Renewed);
    let serve = async |serials: [&str; 2]| {
        let standings = f.store.standings(&serials.map(str::to_owned)).await.unwrap();
        standings.iter().filter(|one| !one.held).map(|one| one.serial.clone()).collect::<Vec<_>>()
    };
    assert_eq!(serve(["0a", "0b"]).await.len(), 2);
    f.begin(&id, &hello_with("key-pi-1", "boot-1", 2), after(2)).await;
    f.begin(&id, &hello_with("key-2", "boot-1", 3), after(3)).await;
    assert_eq!(serve(["0a", "0b"]).await, ["0b"]);
    // The card was restored from a backup, or its root is an overlay. The old key is held, but not revoked.
    let back = f.say_hello(&id, &hello_with("key-pi-1", "boot-4", 4), after(4)).await;
    assert!(matches!(back, SessionOutcome::KeyHeld { just_now: true }), "{back:?}");
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().state, NodeState::Approved);
    f.approve(&id, Some("key-pi-1"), after(5)).await;
    f.begin(&id, &hello_with("key-pi-1", "boot-4", 6), after(6)).await;
    assert_eq!(f.renew(&id, ("0a", "key-pi-1"), ("0d", "key-5"), after(7)).await, RenewOutcome::Renewed);
}

pub(crate) async fn a_previous_key_that_asks_for_a_renewal_is_held(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    f.renew(&id, ("0a", "key-pi-1"), ("0b", "key-2"), after(1)).await;
    f.begin(&id, &hello_with("key-2", "boot-1", 2), after(2)).await;
    let held = f.renew(&id, ("0a", "key-pi-1"), ("0c", "key-3"), after(2 * HOUR)).await;
    assert_eq!(held, RenewOutcome::Held { just_now: true });
    let held = f.renew(&id, ("0a", "key-pi-1"), ("0c", "key-3"), after(2 * HOUR)).await;
    assert_eq!(held, RenewOutcome::Held { just_now: false });
}

pub(crate) async fn revoking_a_certificate_shuts_its_key_out(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    f.token("t", 9).await;
    // Two certificates for one key, as earlier agents have them, and a key that was renewed from them.
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    assert_eq!(f.renew(&id, ("0a", "key-pi-1"), ("0b", "key-pi-1"), after(1)).await, RenewOutcome::Renewed);
    let next = f.renew(&id, ("0b", "key-pi-1"), ("0c", "key-2"), after(2 * HOUR)).await;
    assert_eq!(next, RenewOutcome::Renewed);
    f.store.revoke_certificate("0a", after(3 * HOUR)).await.unwrap().unwrap();
    assert!(f.store.certificate("0b").await.unwrap().unwrap().revoked());
    assert_eq!(f.renew(&id, ("0b", "key-pi-1"), ("0d", "key-3"), after(4 * HOUR)).await, RenewOutcome::Revoked);
    let shut = f.say_hello(&id, &hello_with("key-pi-1", "boot-2", 9), after(9)).await;
    assert!(matches!(shut, SessionOutcome::KeyRevoked), "{shut:?}");
    let why = refusal(f.enrol("t", "key-pi-1", None, &serial_of("pi-1")).await);
    assert!(why.contains("shut out"), "{why}");
    // The thief may own the renewed key too, so it has to be approved.
    assert_eq!(state(&f, &id, "key-2").await, KeyState::Pending);
    f.approve(&id, Some("key-2"), after(5 * HOUR)).await;
    f.begin(&id, &hello_with("key-2", "boot-3", 10), after(10)).await;
}

pub(crate) async fn old_certificates_are_forgotten(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.store.insert_certificate(&certificate("a000", &id, "key-pi-1", 1)).await.unwrap();
    for number in 0..80_i64 {
        let (serial, new) = (format!("a{number:03}"), format!("a{:03}", number + 1));
        let outcome = f.renew(&id, (&serial, "key-pi-1"), (&new, "key-pi-1"), after(number * HOUR)).await;
        assert_eq!(outcome, RenewOutcome::Renewed, "{number}");
    }
    assert!(f.store.certificate("a010").await.unwrap().is_none());
    assert!(f.store.certificate("a080").await.unwrap().is_some());
    let end = after(80 * HOUR) + TimeDelta::days(30);
    assert_eq!(f.store.prune_certificates(end + TimeDelta::days(390)).await.unwrap(), 0);
    assert!(f.store.prune_certificates(end + TimeDelta::days(402)).await.unwrap() > 60);
    assert!(f.store.certificate("a080").await.unwrap().is_none());
}

pub(crate) async fn names_of_users_and_of_the_controller_and_other_cases_are_refused(f: Fixture) {
    f.token("t", 99).await;
    f.enrolled(&["lab"]).await;
    let kim = crate::access::user("kim", "viewer", Scope::everything());
    f.store.create_user(&kim, &crate::access::certificate_of(&kim, "ab")).await.unwrap();
    for (wanted, why) in [
        ("kim", "kim is the name of users/kim"),
        ("KIM", "KIM differs by case only from users/kim"),
        ("Lab", "Lab differs by case only from nodes/lab"),
        ("Controller", "Controller is a name of the controller itself"),
        ("marco-controller", "marco-controller is a name of the controller itself"),
    ] {
        assert_eq!(refusal(f.enrol("t", &format!("key {wanted}"), Some(wanted), "77").await), why);
    }
    assert_eq!(f.store.tokens(None, 9).await.unwrap().iter().map(|token| token.uses).sum::<u32>(), 1);
    for id in ["lab", "LAB", "Kim", "controller"] {
        let user = crate::access::user(id, "viewer", Scope::everything());
        let made = f.store.create_user(&user, &crate::access::certificate_of(&user, &format!("c-{id}"))).await.unwrap();
        assert!(matches!(made, marco_controller::store::CreateUserOutcome::NameTaken(_)), "{id}: {made:?}");
    }
    // A name that was not asked for gets the next free suffix. The name of a deleted node is free again.
    assert_eq!(f.enrol("t", "key-1", Some("PI-abcd"), "5").await, admitted("PI-abcd", false, 1));
    assert_eq!(f.enrol("t", "key-2", None, "abcd").await, admitted("pi-abcd-2", false, 1));
    f.store.delete_node(&node("PI-abcd"), false, "pat", after(9)).await.unwrap();
    assert_eq!(f.enrol("t", "key-3", Some("Pi-Abcd"), "6").await, admitted("Pi-Abcd", false, 1));
}

pub(crate) async fn what_expires_in_14_days_is_told_once(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    let token = |id: &str, days: i64| ApiTokenRow {
        id: ApiTokenId::parse(id).unwrap(),
        role: "viewer".to_owned(),
        scope: Scope::everything(),
        expire_time: after(days * 24 * HOUR),
        create_time: start(),
        creator: "pat".to_owned(),
        revoke_time: None,
    };
    assert!(f.store.create_api_token(&token("nightly", 30), "hash").await.unwrap());
    // It was made for two weeks, so its end is no surprise.
    assert!(f.store.create_api_token(&token("guest", 16), "hash-2").await.unwrap());
    let told = async |time: DateTime<Utc>| {
        let found = f.store.newly_expiring(time).await.unwrap().into_iter();
        let ours = found.filter(|one| ["nodes/pi-1", "apiTokens/nightly", "apiTokens/guest"].contains(&&*one.owner));
        ours.map(|one| (one.credential, one.expire_time)).collect::<BTreeSet<_>>()
    };
    let end = after(30 * 24 * HOUR);
    let before = |hours: i64| end - TimeDelta::days(14) - TimeDelta::hours(hours);
    assert_eq!(told(before(2)).await, BTreeSet::new(), "14 days and 2 hours before the end");
    // The enrolment made a certificate too.
    let mut found = told(before(-2)).await;
    found.retain(|(credential, _)| credential == "certificates/0a" || credential.starts_with("apiTokens/"));
    let both = [("certificates/0a".to_owned(), end), ("apiTokens/nightly".to_owned(), end)];
    assert_eq!(found, both.into(), "14 days less 2 hours before the end");
    assert_eq!(told(before(-3)).await, BTreeSet::new(), "it was told already");
    // A certificate that was replaced by a renewal is not reported.
    let id = f.enrolled(&["pi-2"]).await.remove(0);
    f.store.insert_certificate(&certificate("0b", &id, "key-pi-2", 1)).await.unwrap();
    f.renew(&id, ("0b", "key-pi-2"), ("0c", "key-pi-2"), after(10 * 24 * HOUR)).await;
    let found = f.store.newly_expiring(start() + TimeDelta::days(18)).await.unwrap();
    assert!(found.iter().all(|one| one.owner != "nodes/pi-2"), "{found:?}");
}
