//! A shell on the console after a failure.

use marco_proto::v1::ImageFacts;

use super::{Bench, ONE, SHORT, error, goes_down, reaches, update};
use crate::executor::CONSOLE_IN_USE;
use crate::job::State;
use crate::system::Mode;

#[tokio::test]
async fn shell_on_the_console_refuses_work_and_does_not_swallow_it() {
    let mut bench = Bench::new().reboot("boot-b", Mode::Installer);
    bench.said = Some(ImageFacts { refusal: "it has no init".into(), ..ImageFacts::default() });
    let journal = bench.journal();
    std::fs::write(bench.machine.shell(), "").unwrap();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    bench
        .run(&journal, async |journal, machine| {
            reaches(journal, ONE, State::Failed).await;
            goes_down(machine).await;
            for number in 2..4 {
                let execution = format!("operations/0198a6e0-0000-7000-8000-{number:012}/executions/pi-01");
                journal.accept(&execution, 1, update(SHORT)).await.unwrap();
                reaches(journal, &execution, State::Failed).await;
                assert_eq!(error(journal, &execution).reason, CONSOLE_IN_USE);
            }
            std::fs::remove_file(machine.shell()).unwrap();
            // The shell may end at this moment, and the next job is refused as well.
            for number in 4.. {
                let last = format!("operations/0198a6e0-0000-7000-8000-{number:012}/executions/pi-01");
                journal.accept(&last, 1, update(SHORT)).await.unwrap();
                reaches(journal, &last, State::Failed).await;
                if error(journal, &last).reason != CONSOLE_IN_USE {
                    break;
                }
            }
            assert_eq!(machine.told(), ["shell"]);
        })
        .await;
}
