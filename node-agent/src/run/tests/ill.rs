//! Cards on which a file cannot be read, or says something else than the firmware does: the node connects and says so.

use marco_proto::v1::execution::State as WireState;
use marco_proto::v1::node_condition::Type;
use marco_proto::v1::{Hello, NodeMode, Reboot, assign};

use super::{DEADLINE, Fleet, TestSession, at_once, install, reported};
use crate::bootpart::{BootPart, DefaultBoot};
use crate::system::Board;

impl Fleet {
    /// Boots the Pi again, with what was done to its card. The caller holds the session before: without it the agent of
    /// the boot before could open this one.
    async fn after_a_power_cut(&mut self) -> (TestSession, Hello) {
        std::fs::write(self.pi().join("power-cut"), "").unwrap();
        tokio::time::timeout(DEADLINE, self.session()).await.expect("it does not connect")
    }

    fn installer_boots(&self) {
        let recovery = BootPart::new(self.pi().join("recovery"), &Board::default());
        recovery.set_boot_partition(DefaultBoot::Installer).unwrap();
    }
}

fn ails(hello: &Hello) -> Vec<Type> {
    hello.conditions.iter().map(|condition| condition.r#type()).collect()
}

#[tokio::test]
async fn node_whose_journal_cannot_be_opened_connects_and_takes_no_work() {
    let mut fleet = Fleet::with_token().await;
    let _first = fleet.session().await;
    let journal = fleet.pi().join("root/var/lib/marco-agent/journal.json");
    std::fs::remove_file(&journal).unwrap();
    std::fs::create_dir(&journal).unwrap();
    let (mut session, hello) = fleet.after_a_power_cut().await;
    assert_eq!(ails(&hello), [Type::Journal, Type::JournalLost]);
    super::assign(&session, 1, assign::Action::Reboot(Reboot { notice: at_once(), message: String::new() })).await;
    let failed = reported(&mut session, WireState::Failed).await;
    assert_eq!(failed.error.unwrap().reason, "JOURNAL_NOT_WRITABLE");
    assert_eq!(fleet.log("reboot").len(), 0);
    fleet.end().await;
}

#[tokio::test]
async fn installer_whose_journal_cannot_be_opened_connects() {
    let mut fleet = Fleet::with_token().await;
    let _first = fleet.session().await;
    fleet.installer_boots();
    std::fs::create_dir(fleet.pi().join("recovery/marco/journal.json")).unwrap();
    let (_session, hello) = fleet.after_a_power_cut().await;
    assert_eq!(hello.mode(), NodeMode::Installer);
    assert_eq!(ails(&hello), [Type::Journal, Type::JournalLost]);
    fleet.end().await;
}

#[tokio::test]
async fn update_beside_wrong_settings_is_refused_before_anything_is_armed() {
    let mut fleet = Fleet::with_token().await;
    let _first = fleet.session().await;
    let wrong = "[root]\ntype = \"ntfs\"\n";
    std::fs::write(fleet.pi().join("recovery/marco/install.toml"), wrong).unwrap();
    let (mut session, hello) = fleet.after_a_power_cut().await;
    assert_eq!(ails(&hello), [Type::Settings]);
    assert_eq!(hello.system.unwrap().update_refusal.unwrap().reason, "SETTINGS_WRONG");
    super::assign(&session, 1, install(&"a".repeat(64))).await;
    let failed = reported(&mut session, WireState::Failed).await.error.unwrap();
    assert_eq!(failed.reason, "SETTINGS_WRONG");
    assert!(failed.message.contains("ntfs"), "{}", failed.message);
    assert_eq!(fleet.log("reboot").len(), 0);

    // An installer that is the default goes on, and says so.
    fleet.installer_boots();
    let (_session, hello) = fleet.after_a_power_cut().await;
    assert_eq!((hello.mode(), ails(&hello)), (NodeMode::Installer, vec![Type::Settings]));
    fleet.end().await;
}

#[tokio::test]
async fn installer_that_boots_by_default_never_goes_back() {
    let mut fleet = Fleet::with_token().await;
    let _first = fleet.session().await;
    fleet.installer_boots();
    // With this line the card looks like a stock one, which has nothing but its own system.
    let config = fleet.pi().join("recovery/config.txt");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("# the owner's\n{text}")).unwrap();
    assert!(BootPart::new(fleet.pi().join("recovery"), &Board::default()).is_stock());
    let (_session, hello) = fleet.after_a_power_cut().await;
    assert_eq!((hello.mode(), fleet.log("reboot").len()), (NodeMode::Installer, 0));
    fleet.end().await;
}
