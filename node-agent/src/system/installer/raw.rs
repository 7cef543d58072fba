//! The card's partitions while the file systems of a whole-disk image are written to them.

use std::path::Path;
use std::time::Duration;

use super::super::command::run;
use super::super::disk::{self, Access, Disk};
use super::super::{Card, RawTarget, SystemError, Target};
use super::{blocking, prepare};

/// Time limit for checking or growing a card's file system.
const TIME: Duration = Duration::from_secs(15 * 60);

/// Unmounts the file systems that were made for a tarball.
pub(super) async fn open(card: &Disk, target: &Target) -> Result<RawTarget, SystemError> {
    let (root, boot) = (target.root.clone(), target.boot.clone());
    blocking(move || [&root.join("home"), &root, &boot].into_iter().try_for_each(|at| disk::unmount(at))).await?;
    Ok(RawTarget { boot: card.partition(4), root: card.partition(2) })
}

/// Checks the root, grows it to its partition, and mounts everything again.
pub(super) async fn mount(card: &Disk, places: &Card, target: &Target) -> Result<(), SystemError> {
    let (boot, root, home) = (card.partition(4), card.partition(2), card.partition(3));
    grow(&root).await?;
    let (at, places) = (target.clone(), places.clone());
    blocking(move || {
        // A home that this installation made takes the image's files for its users. It was mounted within the root
        // before.
        let new_home = prepare::is_unfinished(&home, &places.home);
        disk::mount(&root, &at.root, Access::ReadWrite)?;
        disk::mount(&boot, &at.boot, Access::ReadWrite)?;
        if new_home { disk::mount(&home, &at.root.join("home"), Access::ReadWrite) } else { Ok(()) }
    })
    .await
}

async fn grow(root: &Path) -> Result<(), SystemError> {
    let device = root.to_string_lossy();
    // resize2fs refuses a file system that was not checked just before.
    let check = ["/sbin/e2fsck", "-f", "-y", &*device];
    if let Err(error) = run(&check, TIME).await {
        // e2fsck also exits with 1 after a repair. The second run then finds nothing.
        tracing::warn!(%error, "the image's root was not clean");
        run(&check, TIME).await?;
    }
    run(&["/sbin/resize2fs", &*device], TIME).await
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::super::super::command::run;
    use super::grow;

    #[tokio::test]
    async fn a_root_that_is_smaller_than_its_partition_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        let file = File::create(&path).unwrap();
        file.set_len(16 << 20).unwrap();
        let shown = path.to_str().unwrap();
        run(&["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", shown], Duration::from_secs(60)).await.unwrap();
        file.set_len(64 << 20).unwrap();
        grow(&path).await.unwrap();
        // The number of blocks, of 1 KiB: kernel documentation, filesystems/ext4, "Super Block".
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(u32::from_le_bytes(bytes[1028..1032].try_into().unwrap()), 64 << 10);
    }
}
