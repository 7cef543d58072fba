//! Each change is committed with its audit row. Every method that changes something is called twice: with an audit that
//! refuses rows, and with one that takes them.

use std::collections::BTreeSet;
use std::future::Future;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use integration_tests::certs::NodeKey;
use integration_tests::image::{Compression, make_image};
use integration_tests::postgres::Postgres;
use integration_tests::raw::call;
use integration_tests::upload::push;
use integration_tests::{Database, Fleet};
use marco_controller::identity::roles;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::*;
use prost::Message;
use prost_types::{FieldMask, FileDescriptorSet};
use tonic::{Code, Status};

use crate::scene::{enrollment, later, node, wish};

/// Makes the audit refuse every row.
const BREAK: &str = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
     $$BEGIN RAISE EXCEPTION 'the audit takes no rows'; END$$; \
     CREATE TRIGGER refuse BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION refuse()";
const MEND: &str = "DROP TRIGGER refuse ON audit; DROP FUNCTION refuse";
/// Reads all tables except the audit itself and `controllers`, which changes by itself with each sign of life.
const EVERYTHING: &str = "SELECT table_name, query_to_xml(format('SELECT * FROM %I t ORDER BY t::text', table_name), \
         false, true, '')::text AS rows FROM information_schema.tables WHERE table_schema = 'public' \
     AND table_name NOT IN ('audit', 'controllers') ORDER BY table_name";
const AUDIT: &str = "SELECT method, result, actor, target FROM audit ORDER BY number";

/// Collections of the names in the audit.
const COLLECTIONS: [&str; 8] =
    ["apiTokens", "artifacts", "certificates", "joinTokens", "nodes", "operations", "schedules", "users"];

struct Walk {
    server: &'static Postgres,
    url: String,
    fleet: Fleet,
    walked: BTreeSet<String>,
}

impl Walk {
    fn rows(&self, query: &str) -> Result<Vec<serde_json::Value>> {
        self.server.rows(&self.url, query)
    }

    fn by_hand(&self, statement: &str) -> Result<()> {
        self.server.by_hand(&self.url, statement)?.map_err(anyhow::Error::msg)
    }

    /// Makes a call twice. Checks that nothing changes if its row cannot be written, and that otherwise it has one row.
    async fn twice<T, F>(&mut self, method: &str, make: impl Fn(&Fleet) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.walked.insert(method.to_owned());
        let before = self.rows(EVERYTHING)?;
        self.by_hand(BREAK)?;
        // A change that was not rolled back would be a change without a record.
        let refused = make(&self.fleet).await;
        let code = refused.err().with_context(|| format!("{method}: it was done without a record"))?.code();
        ensure!(self.rows(EVERYTHING)? == before, "{method}: it was answered {code:?} and changed something");
        self.by_hand(MEND)?;
        let before = self.rows(AUDIT)?.len();
        let answer = make(&self.fleet).await.with_context(|| method.to_owned())?;
        let all = self.rows(AUDIT)?;
        let new = all.get(before..).unwrap_or_default();
        ensure!(new.len() == 1, "{method}: {new:?}");
        let name = method.rsplit('/').next().unwrap_or_default();
        ensure!(new[0]["method"] == name && new[0]["result"] == "OK" && new[0]["target"] != "", "{method}: {new:?}");
        Ok(answer)
    }

    /// Makes a call twice, given the method's path, as the first admin.
    async fn admin<T: Message + Default>(&mut self, method: &str, request: impl Message) -> Result<T> {
        let (path, message) = (format!("/marco.bootstrap.v1.{method}"), request.encode_to_vec());
        let answer: Bytes = self
            .twice(method, |fleet| {
                let (channel, path, message) = (fleet.admin_channel(), path.clone(), message.clone());
                async move { call(&channel, &path, message, None).await }
            })
            .await?;
        Ok(T::decode(answer)?)
    }

    async fn operations(&mut self) -> Result<()> {
        let request = CreateOperationRequest { operation: Some(later(&["in-1"])), request_id: "r".to_owned() };
        let made: Operation = self.admin("OperationService/CreateOperation", request).await?;
        let name = made.name;
        let pause = PauseOperationRequest { name: name.clone(), reason: "to see".to_owned() };
        self.admin::<Operation>("OperationService/PauseOperation", pause).await?;
        let resume = ResumeOperationRequest { name: name.clone() };
        self.admin::<Operation>("OperationService/ResumeOperation", resume).await?;
        let cancel = CancelOperationRequest { name: name.clone() };
        self.admin::<Operation>("OperationService/CancelOperation", cancel).await?;
        let retry = RetryOperationRequest { name, request_id: String::new() };
        let again: Operation = self.admin("OperationService/RetryOperation", retry).await?;
        let id = again.name.trim_start_matches("operations/");
        // Only an overdue execution can be abandoned, and no agent runs here that could become overdue.
        self.by_hand(&format!(
            "UPDATE executions SET state = 'RUNNING', overdue = TRUE, attempt = 1, \
                 assign_time = EXTRACT(EPOCH FROM now())::bigint * 1000000, \
                 deadline = EXTRACT(EPOCH FROM now())::bigint * 1000000 WHERE operation = '{id}'"
        ))?;
        let abandon = AbandonExecutionRequest { name: format!("{}/executions/in-1", again.name) };
        self.admin::<Execution>("OperationService/AbandonExecution", abandon).await?;
        Ok(())
    }

    async fn schedules(&mut self) -> Result<()> {
        let name = "schedules/s".to_owned();
        let schedule = Schedule {
            cron: "0 0 1 1 *".to_owned(),
            time_zone: "UTC".to_owned(),
            operation: Some(Operation { schedule_time: None, ..later(&["in-1"]) }),
            ..Schedule::default()
        };
        let create = CreateScheduleRequest {
            schedule: Some(schedule.clone()),
            schedule_id: "s".to_owned(),
            ..CreateScheduleRequest::default()
        };
        self.admin::<Schedule>("ScheduleService/CreateSchedule", create).await?;
        let changed = Schedule { name: name.clone(), cron: "0 0 2 1 *".to_owned(), ..Schedule::default() };
        let update_mask = Some(FieldMask { paths: vec!["cron".to_owned()] });
        let update = UpdateScheduleRequest { schedule: Some(changed), update_mask, ..UpdateScheduleRequest::default() };
        self.admin::<Schedule>("ScheduleService/UpdateSchedule", update).await?;
        let pause = PauseScheduleRequest { name: name.clone(), reason: "to see".to_owned() };
        self.admin::<Schedule>("ScheduleService/PauseSchedule", pause).await?;
        let resume = ResumeScheduleRequest { name: name.clone() };
        self.admin::<Schedule>("ScheduleService/ResumeSchedule", resume).await?;
        let run = RunScheduleRequest { name: name.clone(), request_id: String::new() };
        self.admin::<Operation>("ScheduleService/RunSchedule", run).await?;
        self.admin::<DeleteScheduleResponse>("ScheduleService/DeleteSchedule", DeleteScheduleRequest { name }).await?;
        Ok(())
    }

    async fn nodes(&mut self) -> Result<()> {
        let name = "nodes/in-2".to_owned();
        let node = Node { name: name.clone(), display_name: "x".to_owned(), ..Node::default() };
        let update_mask = Some(FieldMask { paths: vec!["display_name".to_owned()] });
        let update = UpdateNodeRequest { node: Some(node), update_mask };
        self.admin::<Node>("NodeService/UpdateNode", update).await?;
        let quarantine = QuarantineNodeRequest { name: name.clone(), ..QuarantineNodeRequest::default() };
        self.admin::<Node>("NodeService/QuarantineNode", quarantine).await?;
        let approve = named(&name);
        self.admin::<Node>("NodeService/ApproveNode", approve).await?;
        // `ResolveNode` needs a conflict, and no agent runs here that could cause one.
        self.by_hand(
            "INSERT INTO conflicts (node, operation, kind, attempt, sequence, state, boot_id, holds, time) VALUES \
                 ('in-2', '0198a6e0-0000-7000-8000-000000000001', 'UNKNOWN', 1, 1, 'RUNNING', '', TRUE, 1)",
        )?;
        let decision = resolve_node_request::Decision::Abandon.into();
        let resolve = ResolveNodeRequest { name: name.clone(), decision };
        self.admin::<Node>("NodeService/ResolveNode", resolve).await?;
        let delete = DeleteNodeRequest { name, ..DeleteNodeRequest::default() };
        self.admin::<DeleteNodeResponse>("NodeService/DeleteNode", delete).await?;
        let create = CreateJoinTokenRequest { max_uses: 3, ..CreateJoinTokenRequest::default() };
        let token: JoinToken = self.admin("NodeService/CreateJoinToken", create).await?;
        let (key, fresh) = (NodeKey::generate()?, NodeKey::generate()?);
        let enroll = wish(&token.token, &key, "in-3", "")?;
        // Not by `admin`: the enrolment has a listener of its own, and takes callers without a certificate.
        let enrolled = self
            .twice("EnrollmentService/Enroll", |fleet| {
                let (client, enroll) = (enrollment(fleet, fleet.addresses().enroll), enroll.clone());
                async move {
                    let mut client = client.map_err(|error| Status::internal(format!("{error:#}")))?;
                    client.enroll(enroll).await.map(tonic::Response::into_inner)
                }
            })
            .await?;
        let signed = fresh.request(&key)?;
        let renew = RenewCertificateRequest {
            certificate: enrolled.certificate,
            certificate_request: signed.pem,
            signature: signed.signature.into(),
        };
        self.twice("EnrollmentService/RenewCertificate", |fleet| {
            let (client, renew) = (enrollment(fleet, fleet.addresses().enroll), renew.clone());
            async move {
                let mut client = client.map_err(|error| Status::internal(format!("{error:#}")))?;
                client.renew_certificate(renew).await.map(tonic::Response::into_inner)
            }
        })
        .await?;
        self.admin::<JoinToken>("NodeService/RevokeJoinToken", RevokeJoinTokenRequest { name: token.name }).await?;
        Ok(())
    }

    async fn doors(&mut self) -> Result<()> {
        let key = NodeKey::generate()?;
        let create = CreateUserRequest {
            user: Some(User { role: Role::Viewer.into(), ..User::default() }),
            user_id: "kim".to_owned(),
            certificate_request: key.request(&key)?.pem,
            ttl: None,
        };
        self.admin::<User>("AccessService/CreateUser", create).await?;
        let changed = User { name: "users/kim".to_owned(), role: Role::Operator.into(), ..User::default() };
        let update_mask = Some(FieldMask { paths: vec!["role".to_owned()] });
        let update = UpdateUserRequest { user: Some(changed), update_mask };
        self.admin::<User>("AccessService/UpdateUser", update).await?;
        let serial = self.rows("SELECT serial FROM certificates WHERE subject = 'kim'")?;
        let serial = serial.first().and_then(|row| row["serial"].as_str()).context("no certificate")?.to_owned();
        let revoke = RevokeCertificateRequest { name: format!("certificates/{serial}") };
        self.admin::<Certificate>("AccessService/RevokeCertificate", revoke).await?;
        let revoke = RevokeUserRequest { name: "users/kim".to_owned() };
        self.admin::<User>("AccessService/RevokeUser", revoke).await?;
        let api_token = Some(ApiToken { role: Role::Viewer.into(), ..ApiToken::default() });
        let create = CreateApiTokenRequest { api_token, api_token_id: "script".to_owned(), ttl: None };
        self.admin::<ApiToken>("AccessService/CreateApiToken", create).await?;
        let revoke = RevokeApiTokenRequest { name: "apiTokens/script".to_owned() };
        self.admin::<ApiToken>("AccessService/RevokeApiToken", revoke).await?;
        Ok(())
    }

    async fn artifacts(&mut self) -> Result<()> {
        let file = make_image(self.fleet.dir(), "image", Compression::Gzip)?;
        // Not by `admin`: an upload is a stream of requests.
        self.twice("ArtifactService/UploadArtifact", |fleet| {
            let (mut client, file) = (fleet.artifacts(), file.clone());
            async move {
                let pushed = push(&mut client, "image", Kind::Image, Purpose::Unspecified, &file).await;
                pushed.map_err(|error| match error.downcast::<Status>() {
                    Ok(status) => status,
                    Err(error) => Status::internal(format!("{error:#}")),
                })
            }
        })
        .await?;
        let name = "artifacts/image".to_owned();
        let default = SetDefaultArtifactRequest { name: name.clone(), ..SetDefaultArtifactRequest::default() };
        self.admin::<Artifact>("ArtifactService/SetDefaultArtifact", default).await?;
        self.by_hand("DELETE FROM artifact_defaults")?;
        let open = OpenArtifactRequest { name: name.clone(), open_to_mirror: true };
        self.admin::<Artifact>("ArtifactService/OpenArtifact", open).await?;
        let delete = named(&name);
        self.admin::<DeleteArtifactResponse>("ArtifactService/DeleteArtifact", delete).await?;
        Ok(())
    }
}

/// A request with a name in its first field. It encodes like any other request that has only that.
fn named(name: &str) -> GetNodeRequest {
    GetNodeRequest { name: name.to_owned() }
}

/// Methods of the API and of the enrolment that change something, from the descriptor set.
fn mutating() -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(marco_proto::DESCRIPTOR_SET).unwrap();
    let ours = set.file.iter().filter(|file| file.package() == "marco.bootstrap.v1");
    let methods = ours.flat_map(|file| &file.service).flat_map(|service| {
        service.method.iter().map(|method| format!("{}/{}", service.name(), method.name())).collect::<Vec<_>>()
    });
    methods.filter(|method| roles::changes_something(&format!("/marco.bootstrap.v1.{method}"))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_is_committed_with_its_one_row_or_not_at_all() -> Result<()> {
    let server = tokio::task::spawn_blocking(Postgres::start).await??;
    let url = server.database()?;
    let fleet = Fleet::builder().pis(0).database(Database::Url(url.clone())).start().await?;
    node(&fleet, "in-1", "in").await?;
    node(&fleet, "in-2", "in").await?;
    let mut walk = Walk { server, url, fleet, walked: BTreeSet::new() };
    walk.operations().await?;
    walk.schedules().await?;
    walk.nodes().await?;
    walk.doors().await?;
    walk.artifacts().await?;
    // A new method of the API fails here until it is added above.
    assert_eq!(walk.walked, mutating(), "a method that changes something was not walked");
    for row in walk.rows(AUDIT)? {
        let (actor, target) = (row["actor"].as_str().unwrap_or_default(), row["target"].as_str().unwrap_or_default());
        // Users go by their bare names, which no node can have. A caller that joins has no name yet.
        assert!(matches!(actor, "admin" | "") || actor.starts_with("nodes/"), "{row}");
        let collection = target.split_once('/').map(|(collection, _)| collection).unwrap_or_default();
        assert!(COLLECTIONS.contains(&collection), "{row}");
    }
    walk.fleet.went_well();
    Ok(())
}

/// A call that fails or changes nothing gets one row, outside of any change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_nothing_has_its_own_row() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    node(&fleet, "in-1", "in").await?;
    let operation = fleet.create(later(&["in-1"])).await?.name;
    let missing = CancelOperationRequest { name: "0198a6e0-0000-7000-8000-000000000001".to_owned() };
    let status = fleet.operations().cancel_operation(missing).await.err().context("it was cancelled")?;
    assert_eq!(status.code(), Code::NotFound);
    fleet.cancel(&operation).await?;
    // The second cancel changes nothing, but the audit shows it: an operator requested it.
    fleet.cancel(&operation).await?;
    let revoke = || RevokeApiTokenRequest { name: "nobody".to_owned() };
    let mut access = crate::scene::access(&fleet);
    access.revoke_api_token(revoke()).await.err().context("there is no such token")?;
    let request = ListAuditEventsRequest { page_size: 4, ..ListAuditEventsRequest::default() };
    let events = access.list_audit_events(request).await?.into_inner().audit_events;
    let told: Vec<_> = events.iter().map(|event| (event.method.as_str(), event.code.as_str())).collect();
    let expected = [
        ("RevokeApiToken", "NOT_FOUND"),
        ("CancelOperation", "OK"),
        ("CancelOperation", "OK"),
        ("CancelOperation", "NOT_FOUND"),
    ];
    assert_eq!(told, expected);
    fleet.went_well();
    Ok(())
}
