//! Users, API tokens, scopes and certificates.

use marco_controller::operation::{ExecutionState, OperationState};
use marco_controller::store::{
    ApiTokenRow, CertificateQuery, CertificateRow, CreateUserOutcome, DeleteNodeOutcome, NewOperation, OperationQuery,
    Reach, RenewOutcome, Scope, UpdateUserOutcome, UserRow,
};
use marco_proto::names::{ApiTokenId, ExecutionId, UserId};

use crate::support::*;

fn blue() -> Scope {
    Scope::new(labels(&[("room", "blue")]))
}

pub(crate) fn user(id: &str, role: &str, scope: Scope) -> UserRow {
    let id = UserId::parse(id).unwrap();
    UserRow { id, role: role.to_owned(), scope, create_time: start(), creator: "pat".to_owned(), revoke_time: None }
}

pub(crate) fn certificate_of(user: &UserRow, serial: &str) -> CertificateRow {
    let subject = user.id.to_string();
    CertificateRow { node: None, role: user.role.clone(), subject, ..certificate(serial, &node("x"), "key", 0) }
}

pub(crate) async fn a_user_is_what_the_store_says_until_it_is_shut_out(f: Fixture) {
    let kim = user("kim", "operator", blue());
    let created = f.store.create_user(&kim, &certificate_of(&kim, "0a")).await.unwrap();
    assert_eq!(created, CreateUserOutcome::Created(kim.clone()));
    let other = user("kim", "admin", Scope::everything());
    let refused = f.store.create_user(&other, &certificate_of(&other, "0b")).await.unwrap();
    assert_eq!(refused, CreateUserOutcome::Differs(kim.clone()));
    assert!(f.store.certificate("0b").await.unwrap().is_none(), "a certificate of a user that was refused is stored");
    // A second certificate of the same user. The role in a certificate made by hand does not count.
    f.store.create_user(&kim, &certificate_of(&kim, "0c")).await.unwrap();
    f.store.enter_certificate(&other, &certificate_of(&other, "0d")).await.unwrap();
    let serials = ["0a", "0c", "0d", "0e"].map(str::to_owned);
    let found = f.store.standings(&serials).await.unwrap();
    assert_eq!(found.len(), 3);
    assert!(found.iter().all(|one| one.role.as_deref() == Some("operator") && one.scope == blue() && !one.revoked));
    // Labels that scopes use may be changed by admins only, so the store knows their keys.
    assert!(f.store.scope_keys().await.unwrap().contains("room"));

    let everything = Scope::everything();
    let changed = f.store.update_user(&kim, "viewer", &everything).await.unwrap();
    let viewer = user("kim", "viewer", everything.clone());
    assert_eq!(changed, UpdateUserOutcome::Updated(viewer.clone()));
    // A change based on an outdated row would give a combination that nobody decided.
    let late = f.store.update_user(&kim, "operator", &Scope::new(labels(&[("room", "red")]))).await.unwrap();
    assert_eq!(late, UpdateUserOutcome::ChangedMeanwhile);
    assert_eq!(f.store.user(&kim.id).await.unwrap(), Some(viewer.clone()));
    assert!(!f.store.scope_keys().await.unwrap().contains("room"));
    assert_eq!(f.store.revoke_user(&kim.id, after(5)).await.unwrap().unwrap().revoke_time, Some(after(5)));
    assert!(f.store.standings(&serials).await.unwrap().iter().all(|one| one.revoked));
    assert_eq!(f.store.update_user(&viewer, "admin", &everything).await.unwrap(), UpdateUserOutcome::Revoked);
    // A certificate that is seen for the first time after the revocation is revoked too.
    f.store.enter_certificate(&other, &certificate_of(&other, "0e")).await.unwrap();
    assert_eq!(f.store.certificate("0e").await.unwrap().unwrap().revoke_time, Some(after(5)));
    // A user who is created again gets a new certificate; the old ones stay revoked.
    f.store.create_user(&other, &certificate_of(&other, "0f")).await.unwrap();
    let now = f.store.standings(&["0a", "0e", "0f"].map(str::to_owned)).await.unwrap();
    assert_eq!(now.len(), 3);
    assert!(now.iter().all(|one| one.revoked == (one.serial != "0f")), "{now:?}");
    let valid =
        CertificateQuery { subject: "kim".to_owned(), valid_at: Some(after(6)), limit: 9, ..Default::default() };
    assert_eq!(f.store.certificates(&valid).await.unwrap().len(), 1);
    assert_eq!(f.store.users(None, 9).await.unwrap().len(), 1);
}

pub(crate) async fn a_revoked_certificate_is_not_renewed(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    f.store.insert_certificate(&certificate("0a", &id, "key-pi-1", 1)).await.unwrap();
    assert_eq!(f.renew(&id, ("0a", "key-pi-1"), ("0b", "key-2"), after(1)).await, RenewOutcome::Renewed);
    f.store.revoke_certificate("0b", after(2)).await.unwrap().unwrap();
    let late = f.renew(&id, ("0b", "key-2"), ("0c", "key-3"), after(9000)).await;
    assert_eq!(late, RenewOutcome::Revoked);
    assert!(f.store.certificate("0c").await.unwrap().is_none());
    assert!(f.store.revoke_certificate("nope", after(1)).await.unwrap().is_none());
}

pub(crate) async fn a_certificate_that_is_seen_while_its_user_is_shut_out_is_out_with_it(f: Fixture) {
    // Many rounds, because the race has two orders.
    for round in 0..20 {
        let kim = user(&format!("kim-{round}"), "operator", blue());
        f.store.create_user(&kim, &certificate_of(&kim, &format!("a{round}"))).await.unwrap();
        let seen = format!("b{round}");
        let by_hand = certificate_of(&kim, &seen);
        let (entered, revoked) =
            tokio::join!(f.store.enter_certificate(&kim, &by_hand), f.store.revoke_user(&kim.id, after(1)));
        entered.unwrap();
        revoked.unwrap().unwrap();
        assert_eq!(f.store.certificate(&seen).await.unwrap().unwrap().revoke_time, Some(after(1)), "round {round}");
    }
}

pub(crate) async fn renewals_and_the_deletion_of_a_node_wait_for_each_other(f: Fixture) {
    let names: Vec<String> = (0..20).map(|number| format!("pi-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for id in f.enrolled(&names).await {
        let key = format!("key-{id}");
        let row = |serial: &str| certificate(&format!("{serial}-{id}"), &id, &key, 1);
        let (old, one, other) = (row("old"), row("one"), row("other"));
        f.store.insert_certificate(&old).await.unwrap();
        let (renewed, again, shut_out, deleted) = tokio::join!(
            f.renew(&id, (&old.serial, &key), (&one.serial, &key), after(1)),
            f.renew(&id, (&old.serial, &key), (&other.serial, "key-other"), after(1)),
            f.store.quarantine(&id, "smoke", after(1)),
            f.store.delete_node(&id, false, "pat", after(2)),
        );
        // Each renewal happens before the deletion or not at all, and no caller gets a database error.
        let stored =
            [f.store.certificate(&one.serial).await.unwrap(), f.store.certificate(&other.serial).await.unwrap()];
        let renewed = [renewed, again].map(|outcome| outcome == RenewOutcome::Renewed);
        assert_eq!(renewed, stored.clone().map(|stored| stored.is_some()), "{id}");
        shut_out.unwrap();
        assert_eq!(deleted.unwrap(), DeleteNodeOutcome::Deleted, "{id}");
        assert!(stored.iter().flatten().all(|stored| stored.revoked()), "{id}: {stored:?}");
        let late = f.renew(&id, (&old.serial, &key), ("late", &key), after(9000)).await;
        assert_eq!(late, RenewOutcome::Revoked, "{id}");
    }
}

pub(crate) async fn an_api_token_works_until_it_expires_or_is_revoked(f: Fixture) {
    let id = ApiTokenId::parse("script").unwrap();
    let row = ApiTokenRow {
        id: id.clone(),
        role: "viewer".to_owned(),
        scope: blue(),
        expire_time: after(100),
        create_time: start(),
        creator: "pat".to_owned(),
        revoke_time: None,
    };
    assert!(f.store.create_api_token(&row, "hash").await.unwrap());
    assert!(!f.store.create_api_token(&row, "other").await.unwrap(), "an id was given twice");
    let found = f.store.api_token_of("hash").await.unwrap().unwrap();
    assert_eq!((found.works(after(99)), found.works(after(100)), &found), (true, false, &row));
    assert_eq!(f.store.api_token_of("wrong").await.unwrap(), None);
    assert!(!f.store.revoke_api_token(&id, after(1)).await.unwrap().unwrap().works(after(1)));
    // A reused id would make two tokens look like one in the audit.
    assert!(!f.store.create_api_token(&row, "again").await.unwrap(), "the id of a revoked one was given again");
}

pub(crate) async fn a_node_outside_the_scope_is_neither_shown_nor_given_its_part(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2"]).await;
    let mut sessions = Vec::new();
    for id in &nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    let new = NewOperation { scope: blue(), ..new_operation(reboot(), &nodes) };
    f.store.create_operation(&new, start()).await.unwrap();
    assert_eq!(f.store.reach(&new.id, &blue()).await.unwrap(), Reach::All);
    let red = labels(&[("room", "red")]);
    f.store.update_node(&nodes[1], None, Some(&red), None).await.unwrap();
    assert_eq!(f.store.reach(&new.id, &blue()).await.unwrap(), Reach::Some);
    assert_eq!(f.store.reach(&new.id, &Scope::new(labels(&[("room", "x")]))).await.unwrap(), Reach::Nothing);
    let seen = f.store.executions_within(&blue(), &new.id, None, 9, &[]).await.unwrap();
    assert_eq!(seen.iter().map(|row| row.id.node.clone()).collect::<Vec<_>>(), nodes[..1]);
    let query = OperationQuery { limit: 9, scope: blue(), ..OperationQuery::default() };
    assert_eq!(f.store.operations(&query).await.unwrap().len(), 1);
    let counts = f.store.counts_within(std::slice::from_ref(&new.id), &blue()).await.unwrap();
    assert_eq!(counts[&new.id].total, 1);

    let given = f.claim(&sessions, after(1)).await;
    assert_eq!(given.iter().map(|one| one.execution.node.clone()).collect::<Vec<_>>(), nodes[..1]);
    let outside = ExecutionId { operation: new.id.clone(), node: nodes[1].clone() };
    assert_eq!(f.state(&outside).await, ExecutionState::Pending);
    assert_eq!(f.store.cancel_outside_scope(after(1)).await.unwrap().len(), 1);
    let row = f.execution(&outside).await;
    assert_eq!((row.state, row.error.unwrap().reason.as_str()), (ExecutionState::Cancelled, "OUTSIDE_SCOPE"));
    assert_eq!(f.store.events_within(&blue(), &new.id, 0, 99).await.unwrap().len(), 2, "made, and assigned to pi-1");
    assert_eq!(f.operation_state(&new.id).await, OperationState::Running);
    // An operation without a scope is not limited to any nodes.
    let free = f.create(reboot(), &nodes[1..]).await;
    assert!(f.store.cancel_outside_scope(after(2)).await.unwrap().is_empty());
    assert_eq!(f.claim(&sessions[1..], after(2)).await[0].execution.operation, free);
}
