//! The audit of calls.

use anyhow::{Context as _, Result};
use integration_tests::Fleet;
use integration_tests::raw::call;
use marco_proto::v1::{AuditEvent, AuditFilter, ListAuditEventsRequest, Role};

use crate::scene::{access, api_token, later, node, user};

async fn events(fleet: &Fleet, filter: AuditFilter) -> Result<Vec<AuditEvent>> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        // Small pages, so that there are several.
        let request = ListAuditEventsRequest { page_size: 7, page_token, filter: Some(filter.clone()) };
        let page = access(fleet).list_audit_events(request).await?.into_inner();
        all.extend(page.audit_events);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_changed_what_and_who_was_refused_is_recorded_with_credential_and_address() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    node(&fleet, "in-1", "in").await?;
    let operation = fleet.create(later(&["in-1"])).await?.name;
    let kim = user(&fleet, "kim", Role::Viewer, None).await?.channel(fleet.addresses().api)?;
    let secret = api_token(&fleet, "script", Role::Operator, Some("out")).await?;
    let anonymous = fleet.admin().anonymous().channel(fleet.addresses().api)?;
    let path = |method: &str| format!("/marco.bootstrap.v1.{method}");
    let named = |name: &str| prost::Message::encode_to_vec(&marco_proto::v1::GetNodeRequest { name: name.to_owned() });
    // In this order: refused by role, a read, refused by scope (twice), and a change.
    call(&kim, &path("OperationService/CancelOperation"), named(&operation), None).await.unwrap_err();
    call(&kim, &path("NodeService/GetNode"), named("in-1"), None).await?;
    call(&anonymous, &path("NodeService/GetNode"), named("in-1"), Some(&secret)).await.unwrap_err();
    call(&anonymous, &path("OperationService/CancelOperation"), named(&operation), Some(&secret)).await.unwrap_err();
    fleet.cancel(&operation).await?;

    let by_admin = events(&fleet, AuditFilter { caller: "admin".to_owned(), ..AuditFilter::default() }).await?;
    let methods: Vec<&str> = by_admin.iter().map(|event| event.method.as_str()).collect();
    // Newest first. Reads are not recorded.
    let expected = ["CancelOperation", "CreateApiToken", "CreateUser", "CreateOperation", "CreateJoinToken"];
    assert_eq!(methods, expected);
    let cancel = &by_admin[0];
    assert_eq!((cancel.resource.as_str(), cancel.code.as_str()), (operation.as_str(), "OK"));
    assert!(cancel.credential.starts_with("certificates/") && cancel.address.starts_with("127.0.0.1:"), "{cancel:?}");
    assert!(cancel.time.is_some() && cancel.message.is_empty());
    // The audit only grows, so a secret in it could never be removed.
    let text = format!("{by_admin:?}");
    assert!(!text.contains(&secret), "a secret is in the audit");

    let refused = events(&fleet, AuditFilter { caller: "kim".to_owned(), ..AuditFilter::default() }).await?;
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!((refused[0].method.as_str(), refused[0].code.as_str()), ("CancelOperation", "PERMISSION_DENIED"));
    assert!(refused[0].message.contains("operator"), "{refused:?}");
    let filter = AuditFilter { caller: "apiTokens/script".to_owned(), refused: true, ..AuditFilter::default() };
    let by_token = events(&fleet, filter).await?;
    let told: Vec<_> = by_token.iter().map(|event| (event.method.as_str(), event.resource.as_str())).collect();
    assert_eq!(told, [("CancelOperation", operation.as_str()), ("GetNode", "nodes/in-1")]);
    assert!(by_token.iter().all(|event| event.credential == "apiTokens/script"), "{by_token:?}");

    // Callers without credentials are recorded too, but only so often: their calls must not fill the disk.
    for _ in 0..300 {
        call(&anonymous, &path("NodeService/DeleteNode"), named("in-1"), None).await.unwrap_err();
    }
    let nobody =
        events(&fleet, AuditFilter { refused: true, method: "DeleteNode".to_owned(), ..AuditFilter::default() })
            .await?;
    assert!((5..60).contains(&nobody.len()), "{} of 300 are recorded", nobody.len());
    assert!(nobody.iter().all(|event| event.caller.is_empty() && event.code == "UNAUTHENTICATED"));
    let since = nobody.first().context("none")?.time;
    let latest = events(&fleet, AuditFilter { since, ..AuditFilter::default() }).await?;
    assert!(!latest.is_empty() && latest.len() < nobody.len() + by_admin.len(), "{latest:?}");
    fleet.went_well();
    Ok(())
}
