//! Nodes, operations and schedules inside and outside a scope, and callers of all kinds.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use integration_tests::Fleet;
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::fleet::reboot;
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{
    ApiToken, Board, CreateApiTokenRequest, CreateJoinTokenRequest, CreateScheduleRequest, CreateUserRequest,
    EnrollRequest, Operation, Role, Schedule, User,
};
use tonic::transport::Channel;

/// The label that scopes select by.
pub(crate) const ROOM: &str = "room";

pub(crate) fn room(value: &str) -> std::collections::HashMap<String, String> {
    [(ROOM.to_owned(), value.to_owned())].into()
}

pub(crate) fn access(fleet: &Fleet) -> AccessServiceClient<Channel> {
    AccessServiceClient::new(fleet.admin_channel())
}

/// Creates an API token, and returns its secret.
pub(crate) async fn api_token(fleet: &Fleet, id: &str, role: Role, limited_to: Option<&str>) -> Result<String> {
    let selector = limited_to.map(room).unwrap_or_default();
    let token = ApiToken { role: role.into(), selector, ..ApiToken::default() };
    let request = CreateApiTokenRequest { api_token: Some(token), api_token_id: id.to_owned(), ttl: None };
    Ok(access(fleet).create_api_token(request).await?.into_inner().token)
}

/// Creates a user with a new key.
pub(crate) async fn user(fleet: &Fleet, id: &str, role: Role, limited_to: Option<&str>) -> Result<Credentials> {
    let key = NodeKey::generate()?;
    let selector = limited_to.map(room).unwrap_or_default();
    let request = CreateUserRequest {
        user: Some(User { role: role.into(), selector, ..User::default() }),
        user_id: id.to_owned(),
        certificate_request: key.request(&key)?.pem,
        ttl: None,
    };
    let user = access(fleet).create_user(request).await?.into_inner();
    Ok(Credentials { ca: user.ca_certificate, identity: Some((user.certificate, key.pem())) })
}

pub(crate) fn enrollment(fleet: &Fleet, address: SocketAddr) -> Result<EnrollmentServiceClient<Channel>> {
    Ok(EnrollmentServiceClient::new(fleet.admin().anonymous().channel(address)?))
}

pub(crate) fn wish(token: &str, key: &NodeKey, id: &str, serial: &str) -> Result<EnrollRequest> {
    Ok(EnrollRequest {
        token: token.to_owned(),
        certificate_request: key.request(key)?.pem,
        node_id: id.to_owned(),
        board: Some(Board { serial: serial.to_owned(), ..Board::default() }),
    })
}

/// Enrols a node by hand, with the label `room`.
pub(crate) async fn node(fleet: &Fleet, id: &str, in_room: &str) -> Result<Credentials> {
    let request = CreateJoinTokenRequest { labels: room(in_room), ..CreateJoinTokenRequest::default() };
    let token = fleet.nodes().create_join_token(request).await?.into_inner().token;
    let key = NodeKey::generate()?;
    let asked = wish(&token, &key, id, "")?;
    let enrolled = enrollment(fleet, fleet.addresses().enroll)?.enroll(asked).await?.into_inner();
    Ok(Credentials { ca: enrolled.ca_certificate, identity: Some((enrolled.certificate, key.pem())) })
}

/// A reboot of nodes in an hour.
pub(crate) fn later(nodes: &[&str]) -> Operation {
    // Far enough ahead that it never begins while a test looks at it.
    let time = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    Operation { schedule_time: Some(time.into()), ..reboot(nodes, std::time::Duration::ZERO) }
}

/// The resources that calls refer to.
pub(crate) struct Scene {
    pub(crate) fleet: Fleet,
    /// The credentials of the node `in-1`.
    pub(crate) node: Credentials,
    /// An operation on a node inside the scope, one on a node outside, and one on both.
    pub(crate) operations: [String; 3],
}

impl Scene {
    pub(crate) async fn set() -> Result<Self> {
        Self::of(Fleet::builder().pis(0).start().await?).await
    }

    pub(crate) async fn of(fleet: Fleet) -> Result<Self> {
        let node = node(&fleet, "in-1", "in").await?;
        // A second node inside, because calls like a quarantine would take the calling node away.
        self::node(&fleet, "in-2", "in").await?;
        self::node(&fleet, "out-1", "out").await?;
        let inside = fleet.create(later(&["in-1"])).await?.name;
        let outside = fleet.create(later(&["out-1"])).await?.name;
        let both = fleet.create(later(&["in-1", "out-1"])).await?.name;
        Ok(Self { fleet, node, operations: [inside, outside, both] })
    }

    /// Creates those of the schedules `s-in`, `s-out` and `s-both` that are missing: calls under test may have deleted
    /// them.
    pub(crate) async fn schedules(&self) -> Result<()> {
        for (id, nodes) in [("s-in", &["in-2"][..]), ("s-out", &["out-1"]), ("s-both", &["in-2", "out-1"])] {
            let schedule = Schedule {
                cron: "0 0 1 1 *".to_owned(),
                time_zone: "UTC".to_owned(),
                operation: Some(reboot(nodes, std::time::Duration::ZERO)),
                ..Schedule::default()
            };
            let request =
                CreateScheduleRequest { schedule: Some(schedule), schedule_id: id.to_owned(), validate_only: false };
            let created = ScheduleServiceClient::new(self.fleet.admin_channel()).create_schedule(request).await;
            if let Err(status) = created
                // Only those that an earlier call has deleted are missing.
                && status.code() != tonic::Code::AlreadyExists
            {
                return Err(status).context(id);
            }
        }
        Ok(())
    }
}
