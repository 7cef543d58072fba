//! The state from which every run begins: a controller with an enrolled node, two images, and an update that waits for
//! the node. It is made once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use integration_tests::fleet::update;
use integration_tests::image::{Compression, lay_out_root, make_bootcode, pack};
use integration_tests::upload::{Artifacts, push};
use marco_controller::clock::ManualClock;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation::Action;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{CreateJoinTokenRequest, CreateOperationRequest, GetNodeRequest, Operation};
use node_agent::identity::JoinToken;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use crate::hook::Recorder;
use crate::time::VirtualTime;
use crate::world::{NODE, World, begin};

/// The database in which the operation is not begun.
pub(crate) const BEFORE_BEGIN: &str = "before-begin.db";
/// The database that does not know the operation.
pub(crate) const BEFORE_CREATION: &str = "before-creation.db";
/// The operation's name.
const OPERATION: &str = "operation";
/// Installer of the updates: another one than the card's own, so that it is fetched and staged.
const SET: &str = "set";
/// A file of the old system's root that no image has.
pub(crate) const OLD_ROOT: &str = "root/usr/share/doc/README";
/// A file of the user's that every run must keep.
pub(crate) const KEPT: &str = "home/kept";
/// Turns of virtual time until the node is enrolled.
const TURNS: usize = 400;

/// The template's folder, and the operation in it.
pub(crate) struct Template {
    dir: PathBuf,
    pub(crate) operation: String,
}

impl Template {
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The template that another process has made in this folder.
    pub(crate) fn made(dir: &Path) -> Result<Self> {
        let operation = fs::read_to_string(dir.join(OPERATION)).context("the template")?;
        Ok(Self { dir: dir.to_owned(), operation })
    }

    pub(crate) fn make(dir: &Path) -> Result<Self> {
        let clock = Arc::new(ManualClock::new(begin()));
        let (runtime, time) = VirtualTime::new(clock)?;
        runtime.block_on(Box::pin(make(dir, time)))
    }
}

async fn make(dir: &Path, time: VirtualTime) -> Result<Template> {
    let mut world = World::open(dir, time).await?;
    let api = world.api()?;
    let mut nodes = NodeServiceClient::new(api.clone());
    let request = CreateJoinTokenRequest { max_uses: 1, ..CreateJoinTokenRequest::default() };
    let token = world.time.drive(nodes.create_join_token(request)).await?.into_inner().token;
    let (events, _none) = mpsc::unbounded_channel();
    let recorder = Arc::new(Recorder::new(&world.pi_dir(), Vec::new(), events));
    world.power(recorder, Some(JoinToken::parse(&token)?))?;
    let mut connected = false;
    for _ in 0..TURNS {
        world.time.still().await;
        world.time.pass(std::time::Duration::from_millis(100)).await;
        let request = GetNodeRequest { name: format!("nodes/{NODE}") };
        let node = world.time.drive(nodes.get_node(request)).await;
        if node.is_ok_and(|node| node.into_inner().connected) {
            connected = true;
            break;
        }
    }
    ensure!(connected, "the node was not enrolled");
    for name in ["next", "other"] {
        let image = image(dir, name)?;
        let mut artifacts = Artifacts::new(api.clone());
        world.time.drive(push(&mut artifacts, name, Kind::Image, Purpose::Unspecified, &image)).await?;
    }
    let set = dir.join(format!("{SET}.zip"));
    fs::write(&set, make_bootcode(SET)?)?;
    world.time.drive(push(&mut Artifacts::new(api.clone()), SET, Kind::Bootcode, Purpose::Installer, &set)).await?;
    world.unplug().await?;
    fs::write(world.pi_dir().join(KEPT), "the user's\n")?;
    ensure!(world.pi_dir().join(OLD_ROOT).exists(), "the old system is another one");
    // A controller ends with the last connection.
    drop((api, nodes));

    world.stop_controller().await?;
    save(&mut world, BEFORE_CREATION).await?;
    world.start_controller().await?;
    let operation = order(&mut world, "next").await?;
    world.stop_controller().await?;
    save(&mut world, BEFORE_BEGIN).await?;
    let data = world.data();
    drop(world);
    fs::rename(dir.join("data-0"), dir.join("data-of-the-first"))?;
    fs::rename(data, dir.join("data-0"))?;
    fs::write(dir.join(OPERATION), &operation)?;
    Ok(Template { dir: dir.to_owned(), operation })
}

/// Orders the update to an image, and returns the operation's name.
pub(crate) async fn order(world: &mut World, image: &str) -> Result<String> {
    let mut operations: OperationServiceClient<Channel> = OperationServiceClient::new(world.api()?);
    let mut operation: Operation = update(&[NODE], image, SET);
    if let Some(Action::Update(update)) = &mut operation.action {
        // Long enough for a step of its own.
        update.notice = Some(prost_types::Duration { seconds: 5, nanos: 0 });
    }
    let request = CreateOperationRequest { operation: Some(operation), request_id: String::new() };
    Ok(world.time.drive(operations.create_operation(request)).await?.into_inner().name)
}

/// Saves the database of a controller that has ended, with the log beside it.
async fn save(world: &mut World, name: &str) -> Result<()> {
    let data = world.data();
    fs::copy(data.join("marco.db"), world.dir().join(name)).context("the backup")?;
    let log = data.join("marco.db-wal");
    if log.exists() {
        fs::copy(log, world.dir().join(format!("{name}-wal")))?;
    }
    Ok(())
}

/// A small image.
fn image(dir: &Path, name: &str) -> Result<PathBuf> {
    let root = dir.join(name);
    lay_out_root(&root, name)?;
    // Three megabytes that make other tests real, and these slow.
    fs::write(root.join("usr/lib/marker/noise"), "none")?;
    pack(&root, &dir.join(format!("{name}.tar.gz")), Compression::Gzip)
}
