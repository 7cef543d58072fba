//! An installer that does not even get in: the old system is started again, if it is whole.

use std::time::Duration;

use crate::bootpart::{BootPart, DefaultBoot};
use crate::cause::chain;
use crate::step;
use crate::system::{self, Board, Down, Force, Reboot, System, SystemError};

/// Waits for `after`, and then starts the old system if this is an installer on a trial boot. Pends forever otherwise,
/// and if the machine stays up: an installer on a card without another system goes on trying.
pub(super) async fn when_nobody_lets_it_in(system: &dyn System, board: &Board, after: Duration) {
    tokio::time::sleep(after).await;
    if has_old_system(system, board).await {
        let why =
            "the installer has no way in (its identity, or a controller, is missing): the old system is started again";
        tracing::error!("{why}");
        system.keep_line(why);
        // Plain: the default is the old system, and a trial boot would start the installer again.
        let ordered = match step::at("go back", &system.state_dir(), &[]) {
            Ok(()) => system.reboot(Reboot::Plain, None, "").await,
            Err(error) => Err(SystemError::io("restart", system.root())(error)),
        };
        if let Err(error) = ordered {
            tracing::error!(error = %chain(&error), "machine does not restart, forced");
            if let Err(error) = system.force(Down::Reboot, Reboot::Plain, Force::Everything, None).await {
                tracing::error!(error = %chain(&error), "machine does not restart");
            }
        }
    }
    std::future::pending().await
}

/// Returns true for an installer on a card that boots its old system by default.
async fn has_old_system(system: &dyn System, board: &Board) -> bool {
    let Some(card) = system.card().filter(|_| system.mode() == system::Mode::Installer) else { return false };
    let part = BootPart::new(card.recovery, board);
    let found = tokio::task::spawn_blocking(move || part.default_boot()).await;
    matches!(found, Ok(Ok(DefaultBoot::System)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{has_old_system, when_nobody_lets_it_in};
    use crate::bootpart::DefaultBoot;
    use crate::system::virtual_pi::tests::Powered;
    use crate::system::{Mode, Reboot};

    const SHORT: Duration = Duration::from_millis(1);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn installer_on_trial_that_does_not_get_in_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut powered = Powered::new(dir.path());
        powered.boot().await.reboot(Reboot::TryBoot, None, "").await.unwrap();
        let installer = powered.boot().await;
        assert_eq!(installer.mode(), Mode::Installer);
        let board = installer.facts().unwrap().board;
        tokio::select! {
            () = when_nobody_lets_it_in(installer.as_ref(), &board, SHORT) => panic!("it ended"),
            system = powered.boot() => assert_eq!(system.mode(), Mode::Running),
        }
        powered.kill().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn installer_with_nothing_to_go_back_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut powered = Powered::new(dir.path());
        let system = powered.boot().await;
        let board = system.facts().unwrap().board;
        assert!(!has_old_system(system.as_ref(), &board).await, "a system that runs does not go back");
        powered.bootpart().set_boot_partition(DefaultBoot::Installer).unwrap();
        system.reboot(Reboot::Plain, None, "").await.unwrap();
        let installer = powered.boot().await;
        assert_eq!(installer.mode(), Mode::Installer);
        let board = installer.facts().unwrap().board;
        assert!(!has_old_system(installer.as_ref(), &board).await);
        powered.kill().await;
    }
}
