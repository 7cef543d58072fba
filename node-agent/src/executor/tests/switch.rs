//! The last step of an update fails: the card still boots the installer, which must find all that it needs.

use std::time::Duration;

use super::{Bench, ONE, SHORT, TWO, armed_update, error, goes_down, on_trial, phase, reaches, update};
use crate::bootpart::DefaultBoot;
use crate::job::{Failure, RELEASE_MISMATCH, State};
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

#[tokio::test]
async fn default_system_waits_for_its_verdict_without_a_limit() {
    let mut bench = on_trial(ONE).await;
    bench.verdict = Duration::ZERO;
    // The switch was done, and the acceptance was in memory only.
    bench.recovery().set_boot_partition(DefaultBoot::System).unwrap();
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, machine| {
            phase(journal, "waiting for the controller to accept the new system").await;
            // The executor's timer, which began earlier, is over before this one.
            tokio::time::timeout(SHORT, goes_down(machine)).await.unwrap_err();
            journal.judge(ONE, Verdict::Accepted);
            reaches(journal, ONE, State::Succeeded).await;
        })
        .await;
    assert_eq!(bench.machine.told(), [""; 0]);
}

#[tokio::test]
async fn refusal_of_a_default_system_ends_the_job_and_not_the_boot() {
    let bench = on_trial(ONE).await;
    bench.recovery().set_boot_partition(DefaultBoot::System).unwrap();
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the controller to accept the new system").await;
            journal.judge(ONE, Verdict::Refused(Failure::new("NOT_VERIFIED", "it is another one")));
            reaches(journal, ONE, State::Failed).await;
        })
        .await;
    assert_eq!(error(&journal, ONE).reason, "NOT_VERIFIED");
    assert_eq!(bench.machine.told(), [""; 0]);
}
