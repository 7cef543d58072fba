//! Join tokens, enrolment and certificates.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use marco_controller::store::{EnrolOutcome, NodeQuery};
use marco_proto::names::{JoinTokenId, NodeId};

use crate::support::*;

/// The reason of a refusal.
pub(crate) fn refusal(outcome: EnrolOutcome) -> String {
    match outcome {
        EnrolOutcome::Refused(refusal) => refusal.why,
        other => panic!("{other:?}"),
    }
}

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
    // The use is counted in the transaction that admits the node, so no two enrolments share the last one.
    let admitted = join_all(wishes).await.into_iter().filter(|done| *done.as_ref().unwrap()).count();
    assert_eq!(admitted, 3);
}

pub(crate) async fn a_lost_answer_to_an_enrolment_costs_no_second_use(f: Fixture) {
    f.token("t", 1).await;
    let first = f.enrol("t", "key", Some("lab-1"), "1").await;
    assert_eq!(first, admitted("lab-1", false, 1));
    // The same key proves that it is the same node, so the used-up token does not matter.
    let again = f.enrol("t", "key", Some("lab-1"), "1").await;
    let EnrolOutcome::Admitted { node: same, again: Some(pem), .. } = again else { panic!("{again:?}") };
    assert_eq!(same, node("lab-1"));
    assert!(pem.starts_with("pem of "), "the answer that was lost is given again: {pem}");
    assert_eq!(f.store.tokens(None, 10).await.unwrap().remove(0).uses, 1);
    assert_eq!(refusal(f.enrol("t", "other", Some("lab-2"), "2").await), "the join token is used up");
    assert_eq!(refusal(f.enrol("nonsense", "key", Some("lab-1"), "1").await), "no join token has this secret");
}

pub(crate) async fn ids_that_are_taken_get_a_suffix(f: Fixture) {
    f.token("t", 9).await;
    for (serial, expected) in [("1", "lab"), ("2", "lab-2"), ("3", "lab-3")] {
        let outcome = f.enrol("t", &format!("key-{serial}"), Some("lab"), serial).await;
        assert_eq!(outcome, admitted(expected, false, 1));
    }
    // A board without a serial number is named after its key.
    let nameless = f.enrol("t", "0123456789abcdef", None, "").await;
    assert_eq!(nameless, admitted("pi-89abcdef", false, 1));
}

pub(crate) async fn a_revoked_or_expired_token_is_refused(f: Fixture) {
    let token = f.token("t", 5).await;
    f.token("u", 5).await;
    assert!(f.store.revoke_token(&token.id).await.unwrap().unwrap().0.revoked);
    assert_eq!(refusal(f.enrol("t", "key", None, "1").await), "the join token was revoked");
    assert!(f.store.revoke_token(&JoinTokenId::parse("nope").unwrap()).await.unwrap().is_none());
    // Expiry counts from the second itself: 1800 seconds after the creation the token is dead.
    let late = f.store.enrol(&wish("u", "key", None, "1"), after(1800), |_, _| panic!("nothing is issued")).await;
    assert_eq!(refusal(late.unwrap()), "the join token has expired");
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
    // The use is in the same transaction as the certificate, so both are rolled back.
    assert_eq!(f.store.tokens(None, 10).await.unwrap().remove(0).uses, 0);
}
