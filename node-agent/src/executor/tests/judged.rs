//! The controller's facts about an image, before anything is armed.

use marco_proto::v1::ImageFacts;

use super::{Bench, ONE, SHORT, error, reaches, update};
use crate::job::{Action, Failure, State, Update};
use crate::system::{Mode, Refusal};

/// Facts of an image that starts the bench's board.
pub(super) fn good() -> ImageFacts {
    let files = ["kernel8.img", "config.txt", "cmdline.txt", "bcm2711-rpi-4-b.dtb"];
    ImageFacts {
        refusal: String::new(),
        boot_files: files.map(str::to_owned).into(),
        texts: [("config.txt".to_owned(), "arm_64bit=1\n".to_owned())].into(),
        ..ImageFacts::default()
    }
}

#[tokio::test]
async fn image_that_cannot_start_the_board_is_not_armed() {
    for mode in [Mode::Running, Mode::Installer] {
        let mut bench = Bench::new().reboot("boot-a", mode);
        bench.said = Some(ImageFacts { refusal: "it has no init".into(), ..ImageFacts::default() });
        let journal = bench.journal();
        journal.accept(ONE, 1, update(SHORT)).await.unwrap();
        let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
        assert_eq!(error(&journal, ONE), Failure::new("NOT_A_SYSTEM", "it has no init"));
        assert_eq!(bench.recovery().read_job().unwrap(), None);
    }
}

#[tokio::test]
async fn image_of_which_nothing_is_known_is_armed() {
    let mut bench = Bench::new();
    bench.said = None;
    let journal = bench.journal();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Armed).await).await;
}

#[tokio::test]
async fn home_that_the_installer_would_not_understand_is_refused_in_the_running_system() {
    let luks = Refusal { reason: "PARTITION_NOT_UNDERSTOOD", message: "/home (p3) holds crypto_LUKS".into() };
    for (discard_home, raw, state) in
        [(false, false, State::Failed), (true, false, State::Armed), (false, true, State::Armed)]
    {
        let mut bench = Bench::new();
        bench.machine.unkept = Some(luks.clone());
        let Action::Update(wanted) = update(SHORT) else { panic!("it is an update") };
        let journal = bench.journal();
        journal.accept(ONE, 1, Action::Update(Update { discard_home, raw, ..wanted })).await.unwrap();
        let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, state).await).await;
        if state == State::Failed {
            assert_eq!(error(&journal, ONE), Failure::new(luks.reason, luks.message.clone()));
            assert_eq!(bench.recovery().read_job().unwrap(), None);
        }
    }
}
