//! Filters must not reveal nodes outside the caller's scope.

use anyhow::Result;
use integration_tests::client::reason;
use integration_tests::postgres::Postgres;
use integration_tests::{Database, Fleet};
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{ListOperationsRequest, OperationFilter, Role};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::scene::{Scene, user};

/// The names of the operations with an execution on this node.
async fn with(channel: &Channel, node: &str) -> Result<Vec<String>, Status> {
    let filter = Some(OperationFilter { node: node.to_owned(), ..OperationFilter::default() });
    let request = ListOperationsRequest { filter, ..ListOperationsRequest::default() };
    let list = OperationServiceClient::new(channel.clone()).list_operations(request).await?.into_inner();
    Ok(list.operations.into_iter().map(|operation| operation.name).collect())
}

async fn tells_nothing_of_nodes_outside(fleet: Fleet) -> Result<()> {
    let mut scene = Scene::of(fleet).await?;
    let fleet = &scene.fleet;
    let [inside, outside, both] = &scene.operations;
    for role in [Role::Viewer, Role::Operator] {
        let kim = user(fleet, &format!("kim-{}", role.as_str_name()), role, Some("in")).await?;
        let kim = kim.channel(fleet.addresses().api)?;
        assert_eq!(with(&kim, "in-1").await?, [both.clone(), inside.clone()]);
        assert_eq!(with(&kim, "nodes/in-2").await?, Vec::<String>::new());
        // A limited user sees the half of `both` that is inside, but not the node that shares it. The answers for
        // existing and for unknown nodes outside are the same.
        let (there, nowhere) = (with(&kim, "out-1").await.unwrap_err(), with(&kim, "out-2").await.unwrap_err());
        assert_eq!((there.code(), reason(&there).as_str()), (Code::PermissionDenied, "OUTSIDE_SCOPE"));
        assert_eq!((there.message(), there.details()), (nowhere.message(), nowhere.details()));
    }
    let all = user(fleet, "lee", Role::Viewer, None).await?.channel(fleet.addresses().api)?;
    assert_eq!(with(&all, "out-1").await?, [both.clone(), outside.clone()]);
    assert_eq!(with(&all, "out-2").await?, Vec::<String>::new());
    scene.fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_by_a_node_tells_nothing_of_nodes_outside() -> Result<()> {
    tells_nothing_of_nodes_outside(Fleet::builder().pis(0).start().await?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_does_so_on_postgres_too() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    tells_nothing_of_nodes_outside(Fleet::builder().pis(0).database(Database::Url(url)).start().await?).await
}
