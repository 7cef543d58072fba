//! Tokens, enrolment and certificates.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use marco_controller::operation::NodeState;
use marco_controller::store::{EnrolOutcome, NodeQuery};
use marco_proto::names::{JoinTokenId, NodeId};

use crate::support::*;

pub(crate) async fn a_token_is_used_at_most_as_often_as_it_says(f: Fixture) {
    f.token("t", 2).await;
    for (number, admitted) in [(1, true), (2, true), (3, false)] {
        let outcome = f.enrol("t", &format!("key-{number}"), None, &format!("10000000ABCDEF0{number}")).await;
        assert_eq!(matches!(outcome, EnrolOutcome::Admitted { .. }), admitted, "{outcome:?}");
    }
    let row = f.store.tokens(None, 10).await.unwrap().remove(0);
    assert_eq!((row.uses, row.max_uses, row.revoked), (2, 2, false));
    let nodes = f.store.approved_nodes(&BTreeMap::new()).await.unwrap();
    assert_eq!(nodes, [node("pi-abcdef01"), node("pi-abcdef02")]);
    let row = f.store.node(&nodes[0]).await.unwrap().unwrap();
    assert_eq!(row.labels, labels(&[("room", "blue")]));
    assert_eq!(f.store.node_of_key("key-2").await.unwrap(), Some(nodes[1].clone()));
}

pub(crate) async fn concurrent_enrolments_never_use_a_token_too_often(f: Fixture) {
    f.token("t", 3).await;
    let wishes = (0..8).map(|number| {
        let store = f.store.clone();
        tokio::spawn(async move {
            let key = format!("key-{number}");
            let issue = |id: &NodeId, generation| Some(certificate(&format!("c{number}"), id, &key, generation));
            let wish = wish("t", &key, None, &format!("100000000000000{number}"));
            matches!(store.enrol(&wish, after(1), issue).await.unwrap(), EnrolOutcome::Admitted { .. })
        })
    });
    let admitted = join_all(wishes).await.into_iter().filter(|done| *done.as_ref().unwrap()).count();
    assert_eq!(admitted, 3);
}

pub(crate) async fn a_lost_answer_to_an_enrolment_costs_no_second_use(f: Fixture) {
    f.token("t", 1).await;
    let first = f.enrol("t", "key", Some("lab-1"), "1").await;
    assert_eq!(first, EnrolOutcome::Admitted { node: node("lab-1"), held: false, generation: 1 });
    assert_eq!(f.enrol("t", "key", Some("lab-1"), "1").await, first);
    assert_eq!(f.store.tokens(None, 10).await.unwrap().remove(0).uses, 1);
    assert_eq!(f.enrol("t", "other", Some("lab-2"), "2").await, EnrolOutcome::Refused);
    assert_eq!(f.enrol("nonsense", "key", Some("lab-1"), "1").await, EnrolOutcome::Refused);
}

pub(crate) async fn a_known_board_with_a_new_key_waits_for_approval(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.token("t", 5).await;
    let serial = serial_of("pi-1").to_uppercase();
    let again = f.enrol("t", "key-new", Some("another-name"), &serial).await;
    assert_eq!(again, EnrolOutcome::Admitted { node: id.clone(), held: true, generation: 2 });
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().state, NodeState::AwaitingApproval);
    assert_eq!(f.store.node_of_key("key-pi-1").await.unwrap(), None);
    assert_eq!(f.enrol("token-pi-1", "key-pi-1", None, &serial).await, EnrolOutcome::Refused, "the old key");
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    assert_eq!(f.store.node_of_key("key-new").await.unwrap(), Some(id.clone()), "the old key is not the node's");
    f.store.insert_certificate(&certificate("0b", &id, "key-new", 2)).await.unwrap();
    f.store.approve(&id, after(9)).await.unwrap();
    assert_eq!(f.store.certificate("0a").await.unwrap().unwrap().revoke_time, Some(after(9)));
    let kept = f.store.certificate("0b").await.unwrap().unwrap();
    assert_eq!((kept.revoked(), kept.certificate), (false, certificate("0b", &id, "key-new", 2)));
    let serials = ["0a", "0b", "0c"].map(str::to_owned);
    let mut bad = f.store.unacceptable(&serials).await.unwrap();
    bad.sort();
    assert_eq!(bad, ["0a", "0c"]);
    f.store.quarantine(&id, "smoke", after(10)).await.unwrap();
    assert_eq!(f.store.unacceptable(&serials).await.unwrap().len(), 3);
    assert!(f.store.revoke_certificates_of(&id, after(11)).await.unwrap() >= 1);
}

pub(crate) async fn ids_that_are_taken_get_a_suffix(f: Fixture) {
    f.token("t", 9).await;
    for (serial, expected) in [("1", "lab"), ("2", "lab-2"), ("3", "lab-3")] {
        let outcome = f.enrol("t", &format!("key-{serial}"), Some("lab"), serial).await;
        assert_eq!(outcome, EnrolOutcome::Admitted { node: node(expected), held: false, generation: 1 });
    }
    let nameless = f.enrol("t", "0123456789abcdef", None, "").await;
    assert_eq!(nameless, EnrolOutcome::Admitted { node: node("pi-89abcdef"), held: false, generation: 1 });
}

pub(crate) async fn a_revoked_or_expired_token_is_refused(f: Fixture) {
    let token = f.token("t", 5).await;
    f.token("u", 5).await;
    assert!(f.store.revoke_token(&token.id).await.unwrap().unwrap().0.revoked);
    assert_eq!(f.enrol("t", "key", None, "1").await, EnrolOutcome::Refused);
    assert!(f.store.revoke_token(&JoinTokenId::parse("nope").unwrap()).await.unwrap().is_none());
    let late = f.store.enrol(&wish("u", "key", None, "1"), after(1800), |_, _| panic!("nothing is issued")).await;
    assert_eq!(late.unwrap(), EnrolOutcome::Refused);
    let page = f.store.tokens(None, 1).await.unwrap();
    let rest = f.store.tokens(Some(&page[0].id), 10).await.unwrap();
    assert_eq!((page.len(), rest.len()), (1, 1));
    assert_ne!(page[0].id, rest[0].id);
}

pub(crate) async fn a_certificate_that_was_not_issued_leaves_nothing(f: Fixture) {
    f.token("t", 1).await;
    let outcome = f.store.enrol(&wish("t", "key", None, "1"), after(1), |_, _| None).await.unwrap();
    assert_eq!(outcome, EnrolOutcome::NotIssued);
    assert!(f.store.nodes(&NodeQuery { limit: 10, ..NodeQuery::default() }).await.unwrap().is_empty());
    assert_eq!(f.store.tokens(None, 10).await.unwrap().remove(0).uses, 0);
}
