//! Default images for blank cards. A node whose installer finds no system on its card, and has no work, gets an
//! operation of its own. That is listed, followed and retried like any other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::TimeDelta;
use marco_proto::names::{ArtifactId, NodeId, OperationId};
use marco_proto::v1;
use uuid::Uuid;

use super::{Ended, Session};
use crate::api::Context;
use crate::api::operation::{Operations, request_key};
use crate::api::status::ApiError;
use crate::identity::peer_log::{cut, of_peer};
use crate::operation::{Action, FrozenArtifact, NodeState, Notice, OperationState, Target, Update};
use crate::store::{Kind, NewOperation, OperationQuery, Purpose, Scope, StoreError};

/// Interval of the search for an image. An operator may push one, or make it the default, while nodes wait for it.
pub(super) const EVERY: Duration = Duration::from_secs(5);
/// Creator of such operations, followed by `/` and the node.
const CREATOR: &str = "marco-controller";
/// Expiry of such an operation. The card is installed now or, if the node goes away, after a later Hello.
const LIFETIME: TimeDelta = TimeDelta::hours(1);
/// Images that the 2015 installer took, by the board alone.
const PI_1: &str = "ArchLinuxARM-rpi-latest";
const OTHERS: &str = "ArchLinuxARM-rpi-2-latest";

/// Facts from the Hello of a node with a blank card.
pub(super) struct Blank {
    family: String,
    boot_id: String,
    /// Image that a file of the 2015 system on the card names, without `.tar.gz`; empty: none.
    named: String,
}

impl Blank {
    pub(super) fn of(hello: &v1::Hello) -> Option<Self> {
        let family = hello.board.as_ref().map(|board| board.family.clone()).unwrap_or_default();
        (hello.mode() == v1::NodeMode::Installer && hello.card_is_blank).then(|| Self {
            family,
            boot_id: hello.boot_id.clone(),
            named: hello.image.clone(),
        })
    }

    /// Creates the operation, unless the node has work, is not approved, or no image is known. Creates one for each
    /// image and boot: an installation that failed would only fail again.
    pub(super) async fn install(&self, context: &Context, node: &NodeId) -> Result<(), ApiError> {
        let rows = context.store.nodes_by_id(std::slice::from_ref(node)).await?;
        if rows.first().is_none_or(|row| row.state != NodeState::Approved || row.active_execution.is_some()) {
            return Ok(());
        }
        let unfinished = OperationState::ALL.iter().copied().filter(|state| !state.is_final()).collect();
        let query =
            OperationQuery { limit: 50, states: unfinished, node: Some(node.clone()), ..OperationQuery::default() };
        // Only operations with an image count: a requested reboot must not keep a blank card from its system.
        if context.store.operations(&query).await?.iter().any(|row| row.action.image().is_some()) {
            return Ok(());
        }
        let Some(image) = self.image(context).await? else { return Ok(()) };
        let mut update = Update {
            image: Some(image.clone()),
            bootcode: None,
            bootcodes: BTreeMap::new(),
            notice: Notice { delay: Duration::ZERO, message: String::new() },
            discard_home: false,
            raw: false,
        };
        let operations = Operations::new(context.clone());
        operations.freeze(&mut update, &BTreeSet::from([self.family.clone()])).await?;
        let now = context.clock.now();
        let id =
            OperationId::parse(&Uuid::now_v7().to_string()).map_err(|error| ApiError::Internal(error.to_string()))?;
        // The request key makes this idempotent: within one boot, each tick and each controller gets the same
        // operation.
        let body = [b"blank card".as_slice(), node.as_str().as_bytes(), image.sha256.as_bytes()];
        let request = format!("{}:{}", self.boot_id, image.sha256);
        let new = NewOperation {
            id: id.clone(),
            action: Action::Update(update),
            target: Target::Nodes(vec![node.as_str().to_owned()]),
            nodes: vec![node.clone()],
            schedule_time: now,
            expire_time: crate::calendar::later(now, LIFETIME),
            creator: format!("{CREATOR}/{node}"),
            request: request_key(&request, &body)?,
            retry_of: None,
            rollout: None,
            window: None,
            origin: None,
            // The creator is the controller, and no user's scope limits it.
            scope: Scope::everything(),
        };
        let row = operations.stored(&new, now).await?;
        // Another id is that of an earlier operation with the same request key.
        if row.id == id {
            of_peer!(info, node, operation = %id, image = image.id, "a blank card gets an image");
        }
        Ok(())
    }

    /// The first of these that exists: the image that the card names, the board's default, the image of the 2015
    /// installer.
    async fn image(&self, context: &Context) -> Result<Option<FrozenArtifact>, StoreError> {
        let frozen =
            |row: crate::store::ArtifactRow| FrozenArtifact { id: row.id.as_str().to_owned(), sha256: row.sha256 };
        let by_name = async |name: &str| -> Result<Option<FrozenArtifact>, StoreError> {
            let Ok(id) = ArtifactId::parse(name) else { return Ok(None) };
            Ok(context.store.artifact(&id).await?.filter(|row| row.kind == Kind::Image).map(frozen))
        };
        if !self.named.is_empty()
            && let Some(image) = by_name(&self.named).await?
        {
            return Ok(Some(image));
        }
        if let Some(row) = context.store.default_for(&self.family, Kind::Image, Purpose::None).await? {
            return Ok(Some(frozen(row)));
        }
        by_name(if self.family == "pi1" { PI_1 } else { OTHERS }).await
    }
}

impl Session {
    /// Creates the operation for a blank card as soon as an image exists. Errors are logged, and the next tick tries
    /// again.
    pub(super) async fn look_for_an_image(&self) -> Result<(), Ended> {
        if let Some(blank) = &self.blank
            && let Err(error) = blank.install(&self.context, &self.node).await
        {
            of_peer!(warn, &self.node, error = %cut(&error.to_string()), "no image was chosen for a blank card");
        }
        Ok(())
    }
}
