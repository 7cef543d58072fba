//! An installer that does not even get in: the old system is started again, if it is whole.

use std::time::Duration;

use crate::bootpart::BootPart;
use crate::cause::chain;
use crate::system::{self, Board, Down, Force, Reboot, System};

/// Waits for `after`, and then starts the old system if this is an installer on a trial boot. Pends forever otherwise,
/// and if the machine stays up: an installer on a card without another system goes on trying.
pub(super) async fn when_nobody_lets_it_in(system: &dyn System, board: &Board, after: Duration) {
    tokio::time::sleep(after).await;
    if has_old_system(system, board).await {
        let why =
            "the installer has no way in (its identity, or a controller, is missing): the old system is started again";
        tracing::error!("{why}");
        system.keep_line(why);
        note(system, board).await;
        // Plain: the default is the old system, and a trial boot would start the installer again.
        let ordered = async {
            system::effect(system, "go back")?;
            system.reboot(Reboot::Plain, None, "").await
        };
        if let Err(error) = ordered.await {
            tracing::error!(error = %chain(&error), "machine does not restart, forced");
            if let Err(error) = system.force(Down::Reboot, Reboot::Plain, Force::Everything, None).await {
                tracing::error!(error = %chain(&error), "machine does not restart");
            }
        }
    }
    std::future::pending().await
}

/// Marks the card before the installer goes back.
async fn note(system: &dyn System, board: &Board) {
    let (Some(card), Ok(boot_id)) = (system.card(), system.boot_id()) else { return };
    let part = BootPart::new(card.recovery, board);
    match tokio::task::spawn_blocking(move || part.note_going_back(&boot_id)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = %chain(&error), "way back not marked on the card"),
        Err(error) => tracing::warn!(error = %error, "way back not marked on the card"),
    }
}

/// Returns true for an installer that a plain restart leads to the old system.
async fn has_old_system(system: &dyn System, board: &Board) -> bool {
    let Some(card) = system.card().filter(|_| system.mode() == system::Mode::Installer) else { return false };
    let (part, boot_id) = (BootPart::new(card.recovery, board), system.boot_id().unwrap_or_default());
    let booted = system.booted();
    let found = tokio::task::spawn_blocking(move || part.can_go_back(booted, &boot_id)).await;
    matches!(found, Ok(Ok(true)))
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

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn installer_that_went_back_and_came_again_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut powered = Powered::new(dir.path());
        powered.boot().await.reboot(Reboot::TryBoot, None, "").await.unwrap();
        let installer = powered.boot().await;
        let board = installer.facts().unwrap().board;
        assert!(has_old_system(installer.as_ref(), &board).await);
        // Killed between the mark and the restart, so it still has to go.
        super::note(installer.as_ref(), &board).await;
        assert!(has_old_system(installer.as_ref(), &board).await);
        powered.bootpart().note_going_back("another boot").unwrap();
        assert!(!has_old_system(installer.as_ref(), &board).await);
        powered.kill().await;
    }
}
