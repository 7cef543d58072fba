//! Many Pis at once, on both databases.

use std::time::Duration;

use anyhow::Result;
use integration_tests::fleet::execution_name;
use integration_tests::postgres::Postgres;
use integration_tests::{Database, Fleet, seconds};
use marco_proto::v1::operation::{Action, State, Target};
use marco_proto::v1::{AllNodes, Operation, Reboot};

const PIS: usize = 200;

async fn all_reboot_once(database: Database) -> Result<()> {
    let fleet = Fleet::builder().pis(PIS).database(database).start().await?;
    // Without notice all of them reboot and reconnect in the same seconds.
    let at_once = Some(prost_types::Duration::try_from(Duration::ZERO)?);
    let reboot = Operation {
        action: Some(Action::Reboot(Reboot { notice: at_once, message: String::new() })),
        target: Some(Target::All(AllNodes {})),
        ..Operation::default()
    };
    let created = fleet.create(reboot).await?;
    let ended = fleet.ends(&created.name, seconds(240), State::Succeeded).await?;
    let counts = ended.counts.unwrap_or_default();
    assert_eq!((usize::try_from(counts.total)?, usize::try_from(counts.succeeded)?), (PIS, PIS), "{counts:?}");
    for id in fleet.ids().await? {
        let pi = fleet.pi(&id);
        assert_eq!(pi.reboots(&execution_name(&created, &id))?, 1, "{id}");
        assert_eq!(pi.boots()?, 2, "{id}");
    }
    Ok(())
}

#[tokio::test]
async fn two_hundred_pis_reboot_once_each_on_sqlite() -> Result<()> {
    all_reboot_once(Database::Sqlite).await
}

#[tokio::test]
async fn two_hundred_pis_reboot_once_each_on_postgres() -> Result<()> {
    all_reboot_once(Database::Url(Postgres::start()?.database()?)).await
}
