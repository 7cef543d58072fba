//! Rights of users that are changed concurrently, and names that no user may have.

use anyhow::{Context as _, Result};
use integration_tests::client::{bad_fields, reason};
use integration_tests::postgres::Postgres;
use integration_tests::process::{binary, run};
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::{CreateUserRequest, ListUsersRequest, Role, UpdateUserRequest, User};
use prost_types::FieldMask;
use tonic::Code;

use crate::scene::{access, api_token, room, user};

/// Changes a user as another controller would, but commits only after advisory lock 7 is released.
const OTHER: &str = "BEGIN; UPDATE users SET role = 'admin' WHERE id = 'kim'; \
     SELECT pg_advisory_xact_lock(7); COMMIT";
const HOLD: &str = "SELECT pg_advisory_lock(7), pg_sleep(60)";
const LET_GO: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
     WHERE datname = current_database() AND query LIKE 'SELECT pg_advisory_lock(7)%'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_change_a_user_at_once_make_nothing_that_neither_decided() -> Result<()> {
    let server = tokio::task::spawn_blocking(Postgres::start).await??;
    let url = server.database()?;
    let mut fleet = Fleet::builder().pis(0).database(Database::Url(url.clone())).start().await?;
    user(&fleet, "kim", Role::Operator, None).await?;
    let by_hand = |statement: &'static str| {
        let url = url.clone();
        tokio::task::spawn_blocking(move || server.by_hand(&url, statement))
    };
    let waits = async |query: &str| {
        let query = format!(
            "SELECT pid FROM pg_stat_activity \
             WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%{query}%'"
        );
        wait_until(seconds(20), &query, async || Ok((!server.rows(&url, &query)?.is_empty()).then_some(()))).await
    };
    by_hand(HOLD);
    wait_until(seconds(20), "the lock is held", async || {
        let held = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND granted";
        Ok((!server.rows(&url, held)?.is_empty()).then_some(()))
    })
    .await?;
    let other = by_hand(OTHER);
    waits("pg_advisory_xact_lock").await?;
    // An operator may be limited to some nodes, but an admin, which kim is about to become, may not.
    let limit = UpdateUserRequest {
        user: Some(User { name: "users/kim".to_owned(), selector: room("in"), ..User::default() }),
        update_mask: Some(FieldMask { paths: vec!["selector".to_owned()] }),
    };
    let mut client = access(&fleet);
    let (again, limiting) = (limit.clone(), tokio::spawn(async move { client.update_user(limit).await }));
    // Now the controller's change waits for the other one's row.
    waits("UPDATE users").await?;
    by_hand(LET_GO).await??.map_err(anyhow::Error::msg)?;
    other.await??.map_err(anyhow::Error::msg)?;
    let lost = limiting.await?.err().context("it was changed to what nobody decided")?;
    assert_eq!((lost.code(), reason(&lost).as_str()), (Code::Aborted, "CHANGED_MEANWHILE"), "{lost:?}");
    let users = access(&fleet).list_users(ListUsersRequest::default()).await?.into_inner().users;
    let kim = users.iter().find(|user| user.name == "users/kim").context("no kim")?;
    assert_eq!((kim.role(), kim.selector.len()), (Role::Admin, 0));
    // The caller that reads the user again gets the reason.
    let refused = access(&fleet).update_user(again).await.unwrap_err();
    assert_eq!(bad_fields(&refused), ["user.selector"]);
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_user_has_the_name_of_the_cas_file_and_no_token_is_an_empty_file() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    for name in ["ca", "CA"] {
        let request = CreateUserRequest {
            user: Some(User { role: Role::Viewer.into(), ..User::default() }),
            user_id: name.to_owned(),
            certificate_request: "not looked at".to_owned(),
            ttl: None,
        };
        let refused = access(&fleet).create_user(request).await.unwrap_err();
        assert_eq!((refused.code(), bad_fields(&refused)), (Code::InvalidArgument, vec!["user_id".to_owned()]));
    }
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let certs = fleet.certs().display().to_string();
    let marcoctl = async |arguments: &[&str]| {
        let all = [&["--controller", &address, "--certs", &certs], arguments].concat();
        run(&binary("marcoctl")?, &all, seconds(60)).await
    };
    let ca = std::fs::read(fleet.certs().join("ca.crt"))?;
    let refused = marcoctl(&["users", "create", "ca", "--role", "viewer"]).await?;
    assert!(refused.status.code() == Some(2) && refused.stderr.contains("ca.crt"), "{refused:?}");
    assert_eq!(std::fs::read(fleet.certs().join("ca.crt"))?, ca);
    assert!(!fleet.certs().join("ca.key").exists());

    // An empty token file must not fall back to the admin's certificate in the same folder.
    let file = fleet.dir().join("token");
    let named = file.display().to_string();
    let list = ["--api-token-file", &named, "users", "list"];
    for nothing in ["", "\n"] {
        std::fs::write(&file, nothing)?;
        let refused = marcoctl(&list).await?;
        assert!(refused.status.code() == Some(2) && refused.stderr.contains("the file is empty"), "{refused:?}");
    }
    std::fs::write(&file, api_token(&fleet, "script", Role::Admin, None).await?)?;
    marcoctl(&list).await?.success()?;
    fleet.went_well();
    Ok(())
}
