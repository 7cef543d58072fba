//! The executor in the installer: every way of an installation has an end.

use std::time::Duration;

use super::{
    Bench, LONG, ONE, SHORT, TWO, armed_update, error, goes_down, image_sha256, on_trial, phase, reaches, reboot,
    update,
};
use crate::bootpart::DefaultBoot;
use crate::download::tests::Wrong;
use crate::executor::{CALLED_OFF, JOURNAL_NOT_WRITABLE, ONLY_IMAGES};
use crate::job::{Action, Artifact, Failure, NEVER_ENDED, State, Update, phase as phases};
use crate::journal::{Accepted, Confirmation, FILE_NAME, JournalError, REPLACED};
use crate::system::{Mode, System as _};

/// An installer on its trial boot, with the job that the old system left. What it tries again, it tries at once.
async fn on_trial_boot() -> Bench {
    let mut bench = armed_update().await.reboot("boot-b", Mode::Installer);
    bench.max_pause = Duration::from_millis(1);
    bench
}

/// An installer that has made itself the default, on a card that takes no file system.
async fn on_broken_card() -> Bench {
    let mut bench = on_trial_boot().await;
    bench.recovery().set_boot_partition(DefaultBoot::Installer).unwrap();
    bench.machine.broken = true;
    bench.fault = Wrong::Nothing;
    bench
}

/// The old system's reason for an update that its installer gave back.
async fn given_back(bench: Bench) -> Failure {
    let bench = bench.reboot("boot-c", Mode::Running);
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::RolledBack).await).await;
    error(&journal, ONE)
}

/// The installer restarts into the old system, which says that the job was lost.
async fn assert_job_is_lost(bench: Bench) {
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Armed"]);
    assert_eq!(given_back(bench).await.reason, "INSTALL_JOB_LOST");
}

fn job_file(bench: &Bench) -> std::path::PathBuf {
    bench.machine.dir.join("recovery/marco/install.json")
}

fn other_image() -> Action {
    let Action::Update(wanted) = update(SHORT) else { panic!("it is an update") };
    let image = Some(Artifact { id: "other.tar.gz".into(), sha256: image_sha256() });
    Action::Update(Update { image, ..wanted })
}

#[tokio::test]
async fn an_installer_whose_journal_is_torn_goes_by_the_job_on_the_card() {
    let bench = armed_update().await.reboot("boot-b", Mode::Installer);
    // A power cut on FAT may leave an empty file.
    std::fs::write(bench.machine.state_dir().join(FILE_NAME), "").unwrap();
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Installing).await).await;
    let entries = journal.entries();
    let entry = entries.get(ONE).unwrap();
    assert_eq!((entry.sequence, entry.attempt), (3, 7));
}

#[tokio::test]
async fn after_three_trials_the_installer_gives_up_and_waits() {
    let mut bench = on_trial(ONE).await;
    for (boot_id, trials) in [("boot-d", 1), ("boot-e", 2)] {
        bench = bench.reboot(boot_id, Mode::Installer);
        let journal = bench.journal();
        bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Installing).await).await;
        assert_eq!(journal.entries().get(ONE).unwrap().trials, trials);
        assert_eq!(bench.recovery().read_job().unwrap().unwrap().trials, trials);
        journal.try_boot(ONE).await.unwrap();
    }
    let bench = bench.reboot("boot-f", Mode::Installer);
    let journal = bench.journal();
    bench
        .run(&journal, async |journal, _| {
            reaches(journal, ONE, State::Failed).await;
            assert_eq!(error(journal, ONE).reason, "IMAGE_DID_NOT_COME_UP");
            // The installer is ready for the next job, if that is an image.
            journal.accept(TWO, 1, reboot(SHORT)).await.unwrap();
            reaches(journal, TWO, State::Failed).await;
            assert_eq!(error(journal, TWO).reason, ONLY_IMAGES);
        })
        .await;
}

#[tokio::test]
async fn the_installer_takes_an_image_without_notice() {
    let bench = Bench::new().reboot("boot-b", Mode::Installer);
    let journal = bench.journal();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Installing).await).await;
    assert_eq!(bench.recovery().read_job().unwrap().unwrap().execution, ONE);
    assert_eq!(bench.machine.told(), [""; 0]);
}

#[tokio::test]
async fn the_old_system_says_what_the_installer_could_not_do() {
    let bench = armed_update().await.reboot("boot-b", Mode::Installer);
    let noted = Failure::new("DOWNLOAD_REFUSED", "no such artifact");
    bench.journal().note(ONE, noted.clone()).await.unwrap();
    let bench = bench.reboot("boot-c", Mode::Running);
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::RolledBack).await).await;
    assert_eq!(error(&journal, ONE), noted);
}

#[tokio::test]
async fn lost_job_leads_back_to_the_old_system() {
    let bench = on_trial_boot().await;
    std::fs::remove_file(job_file(&bench)).unwrap();
    assert_job_is_lost(bench).await;
}

#[tokio::test]
async fn installer_does_the_job_of_a_newer_agent() {
    let bench = on_trial_boot().await;
    for file in [job_file(&bench), bench.machine.state_dir().join(FILE_NAME)] {
        let text =
            std::fs::read_to_string(&file).unwrap().replace("\"attempt\":", "\"of_tomorrow\": [1], \"attempt\":");
        std::fs::write(&file, text).unwrap();
    }
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| phase(journal, phases::CONNECTING).await).await;
    assert_eq!(journal.entries().get(ONE).unwrap().state, State::Installing);
}

#[tokio::test]
async fn job_that_only_a_newer_installer_can_do_leads_back_to_the_old_system() {
    let bench = on_trial_boot().await;
    let text = std::fs::read_to_string(job_file(&bench)).unwrap();
    std::fs::write(job_file(&bench), text.replace("\"do\": \"install\"", "\"do\": \"install-delta\"")).unwrap();
    assert_job_is_lost(bench).await;
}

/// An installer on a trial boot, without its journal and its job, that has given the machine back.
async fn goes_back_without_a_job() -> Bench {
    let mut bench = on_trial_boot().await;
    bench.machine.patience = SHORT;
    std::fs::remove_file(job_file(&bench)).unwrap();
    std::fs::write(bench.machine.state_dir().join(FILE_NAME), "").unwrap();
    let journal = bench.journal();
    bench.run(&journal, async |_, machine| goes_down(machine).await).await
}

#[tokio::test]
async fn installer_without_journal_and_job_leads_back_to_the_old_system() {
    let bench = goes_back_without_a_job().await;
    assert_eq!(bench.machine.told().first().unwrap(), "reboot Plain idle");
    assert_eq!(given_back(bench).await.reason, "OLD_SYSTEM_CAME_BACK");
}

#[tokio::test]
async fn journal_that_cannot_be_written_leads_back_to_the_old_system() {
    let bench = on_trial_boot().await;
    std::fs::create_dir_all(bench.machine.state_dir().join("journal.json.new/in the way")).unwrap();
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Armed"]);
    assert_eq!(error(&journal, ONE).reason, JOURNAL_NOT_WRITABLE);
    given_back(bench).await;
}

#[tokio::test]
async fn lost_job_of_a_touched_card_waits_for_another_image() {
    let bench = on_broken_card().await;
    std::fs::remove_file(job_file(&bench)).unwrap();
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, _| {
            reaches(journal, ONE, State::Failed).await;
            journal.accept(TWO, 1, other_image()).await.unwrap();
            reaches(journal, TWO, State::Failed).await;
        })
        .await;
    assert_eq!(error(&journal, ONE).reason, "INSTALL_JOB_LOST");
    assert_eq!(error(&journal, TWO).reason, "SYSTEM_ERROR", "it was tried");
    assert!(!bench.machine.told().iter().any(|told| told.starts_with("reboot")), "{:?}", bench.machine.told());
}

#[tokio::test]
async fn card_that_takes_no_file_system_ends_failed_and_takes_other_work() {
    let bench = on_broken_card().await;
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, _| {
            reaches(journal, ONE, State::Failed).await;
            journal.accept(TWO, 1, other_image()).await.unwrap();
            reaches(journal, TWO, State::Failed).await;
        })
        .await;
    let failure = error(&journal, ONE);
    assert_eq!(failure.reason, "SYSTEM_ERROR");
    assert!(failure.message.ends_with("mkfs ended with status 1 (tried 5 times)"), "{}", failure.message);
    // Five tries of each image; the count of the first is not the second's.
    assert_eq!(bench.machine.told(), ["prepare"; 10]);
    let marco = bench.machine.dir.join("recovery/marco");
    assert!(marco.join("node.key").exists() && marco.join("install.json").exists());
}

#[tokio::test]
async fn restarts_do_not_begin_the_count_anew() {
    let mut bench = on_broken_card().await;
    // One try for each boot: the machine is reset during the pause.
    bench.max_pause = LONG;
    let mut told = 0;
    for boot in ["boot-c", "boot-d", "boot-e", "boot-f"] {
        let journal = bench.journal();
        bench = bench.run(&journal, async |journal, _| phase(journal, phases::ANOTHER_TRY).await).await;
        told += bench.machine.told().len();
        bench = bench.reboot(boot, Mode::Installer);
    }
    let journal = bench.journal();
    bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert_eq!(told + bench.machine.told().len(), 5);
}

#[tokio::test]
async fn network_that_stays_away_is_waited_for_once_the_card_is_touched() {
    let mut bench = on_broken_card().await;
    bench.fault = Wrong::CutAfter(0);
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, _| {
            let mut changes = journal.changes();
            let tried = |number| {
                move |all: &std::sync::Arc<crate::journal::Entries>| {
                    all.get(ONE).is_some_and(|entry| entry.tries.failed() >= number)
                }
            };
            changes.wait_for(tried(12)).await.unwrap();
            assert_eq!(journal.entries().get(ONE).unwrap().state, State::Installing);
            // A cancel ends the tries.
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Failed).await;
        })
        .await;
    let failure = error(&journal, ONE);
    assert_eq!(failure.reason, CALLED_OFF);
    assert!(failure.message.contains("no progress in 4 tries"), "{}", failure.message);
    assert_eq!(bench.machine.told(), [""; 0], "a touched card is not left");
    assert!(!journal.entries().get(ONE).unwrap().cancel_refused, "it was heeded");
}

#[tokio::test]
async fn cancel_before_the_card_is_touched_leads_back_to_the_old_system() {
    let mut bench = on_trial_boot().await;
    bench.fault = Wrong::Nothing;
    let journal = bench.journal();
    journal.install(ONE).await.unwrap();
    // The installation is under way: a controller has confirmed it before.
    journal.note_confirmation(ONE, Confirmation::Stands);
    journal.request_cancel(ONE).await.unwrap();
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Installing"], "nothing was prepared");
    assert_eq!(bench.recovery().default_boot().unwrap(), DefaultBoot::System);
    assert_eq!(given_back(bench).await.reason, CALLED_OFF);
}

#[tokio::test]
async fn another_image_takes_the_place_of_one_that_is_being_installed() {
    let mut bench = on_broken_card().await;
    bench.machine.broken = false;
    bench.fault = Wrong::Withheld;
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, phases::CONNECTING).await;
            // Anything else is refused as before.
            assert!(matches!(journal.accept(TWO, 1, reboot(SHORT)).await, Err(JournalError::Busy(_))));
            assert_eq!(journal.accept(TWO, 1, other_image()).await.unwrap(), Accepted::New);
            reaches(journal, TWO, State::Installing).await;
        })
        .await;
    let entries = journal.entries();
    assert_eq!((entries.get(ONE).unwrap().state, error(&journal, ONE).reason.as_str()), (State::Failed, REPLACED));
    assert_eq!(bench.recovery().read_job().unwrap().unwrap().execution, TWO);
    // The same holds after a restart.
    let bench = bench.reboot("boot-c", Mode::Installer);
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| phase(journal, phases::CONNECTING).await).await;
    assert_eq!(journal.entries().unfinished().unwrap().execution, TWO);
}

#[tokio::test]
async fn touched_card_goes_on_only_when_a_controller_lets_the_job_stand() {
    let bench = Bench { heard: false, confirmation: SHORT, ..on_broken_card().await };
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, machine| {
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            assert_eq!(machine.told(), [""; 0], "it waits for as long as it takes");
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Failed).await;
        })
        .await;
    assert_eq!((error(&journal, ONE).reason.as_str(), bench.machine.told()), (CALLED_OFF, vec![]));
}

#[tokio::test]
async fn installer_whose_own_work_failed_leads_back_to_the_old_system() {
    // The job came to the installer itself, so the old system does not know it and cannot report its end.
    let mut bench = Bench::new().reboot("boot-b", Mode::Installer);
    bench.fault = Wrong::Missing;
    let journal = bench.journal();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    let bench = bench
        .run(&journal, async |journal, machine| {
            reaches(journal, ONE, State::Failed).await;
            assert_eq!(machine.told(), [""; 0], "the controller is told first");
            let sequence = journal.entries().get(ONE).unwrap().sequence;
            journal.ack(ONE, 1, sequence, 1).await.unwrap();
            goes_down(machine).await;
        })
        .await;
    assert_eq!(bench.machine.told(), ["reboot Plain idle"]);
    assert_eq!(error(&journal, ONE).reason, "DOWNLOAD_REFUSED");
}

#[tokio::test]
async fn installer_that_comes_up_again_after_it_went_back_stays() {
    let bench = goes_back_without_a_job().await;

    // The card boots the installer, whatever its files say.
    let bench = bench.reboot("boot-c", Mode::Installer);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, _| {}).await;
    assert_eq!(bench.machine.told(), [""; 0], "it would go back forever");

    // A system that comes up nevertheless forgets that, so the next installer may go back once.
    let bench = bench.reboot("boot-d", Mode::Running);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, _| {}).await.reboot("boot-e", Mode::Installer);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told().first().unwrap(), "reboot Plain idle");
}

#[tokio::test]
async fn installation_that_hangs_fifty_boots_is_given_up() {
    let mut bench = on_broken_card().await;
    for boot in 0..=50 {
        bench = bench.reboot(&format!("hung-{boot}"), Mode::Installer);
        bench.journal().install(ONE).await.unwrap();
    }
    let journal = bench.journal();
    assert_eq!(journal.entries().get(ONE).unwrap().tries.never_ended(), None);
    let bench = bench.reboot("boot-z", Mode::Installer);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert_eq!(error(&journal, ONE).reason, NEVER_ENDED);
    assert_eq!(bench.machine.told(), [""; 0], "it was not tried again");
}
