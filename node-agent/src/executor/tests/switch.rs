//! The last step of an update fails: the card still boots the installer, which must find all that it needs.

use std::time::Duration;

use super::{Bench, ONE, SHORT, TWO, armed_update, error, goes_down, on_trial, phase, reaches, update};
use crate::bootpart::DefaultBoot;
use crate::job::{RELEASE_MISMATCH, State};
use crate::journal::{FILE_NAME, Verdict};
use crate::system::{Mode, System as _};

/// The files that an installer cannot do without.
fn assert_installer_has_everything(bench: &Bench) {
    let marco = bench.machine.dir.join("recovery/marco");
    for name in ["node.key", "node.crt", "ca.crt", FILE_NAME, "install.json"] {
        assert!(marco.join(name).exists(), "{name} is gone");
    }
    assert_eq!(bench.recovery().read_job().unwrap().unwrap().execution, ONE);
}

/// Makes `autoboot.txt` impossible to write. It says nothing either, so the first FAT boots.
fn break_autoboot(bench: &Bench) {
    let autoboot = bench.machine.dir.join("recovery/autoboot.txt");
    std::fs::remove_file(&autoboot).unwrap();
    std::fs::create_dir(&autoboot).unwrap();
}

#[tokio::test]
async fn switch_that_fails_leaves_the_installer_all_it_needs() {
    let mut bench = on_trial(ONE).await;
    bench.max_pause = Duration::from_millis(1);
    break_autoboot(&bench);
    let journal = bench.journal();
    bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the controller to accept the new system").await;
            journal.judge(ONE, Verdict::Accepted);
            reaches(journal, ONE, State::Failed).await;
        })
        .await;
    let failure = error(&journal, ONE);
    assert_eq!(failure.reason, "BOOT_PARTITION_IO");
    assert!(failure.message.contains("the next boot is the installer"), "{}", failure.message);
    assert_installer_has_everything(&bench);

    // The next start of the new system's agent removes nothing either.
    let journal = bench.journal();
    bench = bench.run(&journal, async |_, _| {}).await;
    assert_installer_has_everything(&bench);

    let bench = bench.reboot("boot-d", Mode::Installer);
    assert_eq!(bench.journal().entries().get(ONE).unwrap().state, State::Trial);
}

#[tokio::test]
async fn new_system_without_its_journal_takes_nothing_from_the_installer() {
    let bench = on_trial(ONE).await;
    // Without the journal the update looks as if it were over.
    std::fs::write(bench.machine.state_dir().join(FILE_NAME), "").unwrap();
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, _| {}).await;
    assert_installer_has_everything(&bench);
}

#[tokio::test]
async fn wrong_system_on_trial_takes_nothing_from_the_installer() {
    let bench = on_trial(TWO).await;
    let journal = bench.journal();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert_eq!(error(&journal, ONE).reason, RELEASE_MISMATCH);
    assert_installer_has_everything(&bench);
}

#[tokio::test]
async fn system_beside_a_default_installer_goes_to_it_without_a_trial() {
    let bench = Bench::new();
    bench.recovery().set_boot_partition(DefaultBoot::Installer).unwrap();
    let journal = bench.journal();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    let bench = bench
        .run(&journal, async |journal, machine| {
            reaches(journal, ONE, State::Armed).await;
            while machine.told().len() < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    assert_eq!(bench.machine.told().last().unwrap(), "reboot Plain Armed");

    // An agent that was killed before the command gives the same one.
    let journal = bench.journal();
    let bench = bench.reboot("boot-a", Mode::Running).run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Armed"]);
}

#[tokio::test]
async fn update_that_is_over_is_tidied_when_the_system_is_the_default() {
    let bench = armed_update().await.reboot("boot-c", Mode::Running);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::RolledBack).await).await;
    assert!(!bench.machine.dir.join("recovery/marco/node.key").exists());
}

async fn accepted(mut bench: Bench, end: State) -> Bench {
    bench.max_pause = Duration::from_millis(1);
    let journal = bench.journal();
    bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the controller to accept the new system").await;
            journal.judge(ONE, Verdict::Accepted);
            reaches(journal, ONE, end).await;
        })
        .await
}

#[tokio::test]
async fn accepted_system_loses_the_parameters_of_its_trial() {
    let bench = on_trial(ONE).await;
    let cmdline = bench.machine.dir.join("boot/cmdline.txt");
    let words = "marco.trial=begin panic=10 marco.trial=end";
    std::fs::write(&cmdline, format!("{words} root=/dev/mmcblk0p2\n")).unwrap();
    let supervisor = bench.machine.root().join(crate::supervise::PROGRAM);
    std::fs::create_dir_all(supervisor.parent().unwrap()).unwrap();
    std::fs::write(&supervisor, "program").unwrap();
    let bench = accepted(bench, State::Succeeded).await;
    assert!(!supervisor.exists());
    let spaces = " ".repeat(words.len());
    assert_eq!(std::fs::read_to_string(&cmdline).unwrap(), format!("{spaces} root=/dev/mmcblk0p2\n"));
    assert_eq!(bench.recovery().default_boot().unwrap(), DefaultBoot::System);
}

#[tokio::test]
async fn system_that_keeps_the_parameters_of_its_trial_is_not_the_default() {
    let bench = on_trial(ONE).await;
    let cmdline = bench.machine.dir.join("boot/cmdline.txt");
    let _ = std::fs::remove_file(&cmdline);
    std::fs::create_dir(&cmdline).unwrap();
    let bench = accepted(bench, State::Failed).await;
    assert_eq!(bench.recovery().default_boot().unwrap(), DefaultBoot::Installer);
    assert_installer_has_everything(&bench);
}

/// A new system on trial, with the program that supervises it.
async fn supervised() -> (Bench, std::path::PathBuf) {
    let bench = on_trial(ONE).await;
    let supervisor = bench.machine.root().join(crate::supervise::PROGRAM);
    std::fs::create_dir_all(supervisor.parent().unwrap()).unwrap();
    std::fs::write(&supervisor, "program").unwrap();
    (bench, supervisor)
}

#[tokio::test]
async fn system_that_would_boot_by_a_missing_init_is_not_the_default() {
    // A first boot has rewritten its command line, and a part of the trial's words is left.
    let (bench, supervisor) = supervised().await;
    std::fs::write(bench.machine.dir.join("boot/cmdline.txt"), "quiet init=/var/lib/marco-agent/supervise\n").unwrap();
    let bench = accepted(bench, State::Failed).await;
    assert_eq!(bench.recovery().default_boot().unwrap(), DefaultBoot::Installer);
    assert!(supervisor.exists(), "the line still names it");
    assert_installer_has_everything(&bench);
}

#[tokio::test]
async fn words_of_the_trial_go_wherever_the_first_boot_has_moved_them() {
    let (bench, supervisor) = supervised().await;
    let boot = bench.machine.dir.join("boot");
    let words = "marco.trial=begin init=/var/lib/marco-agent/supervise marco.trial=end";
    std::fs::create_dir_all(boot.join("new")).unwrap();
    std::fs::write(boot.join("cmdline.txt"), format!("{} {words}\n", "x".repeat(600))).unwrap();
    std::fs::write(boot.join("new/cmdline.txt"), words).unwrap();
    let bench = accepted(bench, State::Succeeded).await;
    for file in ["cmdline.txt", "new/cmdline.txt"] {
        assert!(!std::fs::read_to_string(boot.join(file)).unwrap().contains("init="), "{file}");
    }
    assert!(!supervisor.exists());
    assert_eq!(bench.recovery().default_boot().unwrap(), DefaultBoot::System);
}

#[tokio::test]
async fn supervisor_stays_until_the_switch_is_made() {
    let (bench, supervisor) = supervised().await;
    break_autoboot(&bench);
    let _bench = accepted(bench, State::Failed).await;
    assert!(supervisor.exists(), "a card that hangs in the switch has nobody to reset it");
}
