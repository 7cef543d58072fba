//! Images that are hard to install: a tree with everything that is easily lost on the way, compared by rsync on a real
//! ext4, and one that needs the largest window that is accepted.

#[path = "traps/tree.rs"]
mod tree;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::fleet::update;
use integration_tests::image::{lay_out_root, noise};
use integration_tests::mount::Mount;
use integration_tests::process::{binary, run, tool};
use integration_tests::tree::PERSONALISED;
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};

/// Timeout of one step on a busy machine.
const LIMIT: Duration = seconds(300);
/// Size of an ext4 in bytes.
const CARD: u64 = 4 << 30;

async fn command(program: &str, arguments: &[&str]) -> Result<String> {
    run(&tool(program)?, arguments, LIMIT).await?.success().with_context(|| format!("{program} {arguments:?}"))
}

/// Starts a Pi with an ext4 as its card, and returns its mount and id.
async fn pi_on_ext4(fleet: &mut Fleet) -> Result<(Mount, String)> {
    let card = Mount::ext4(fleet.dir().join("pis"), CARD).await?;
    let token = fleet.dir().join("token");
    fs::write(&token, fleet.token(1).await?)?;
    fleet.start_new_agents(&["--token-file".to_owned(), token.display().to_string()])?;
    let id = wait_until(seconds(60), "the Pi is connected", async || {
        let node = fleet.list_nodes().await?.into_iter().find(|node| node.connected);
        Ok(node.map(|node| node.name.trim_start_matches("nodes/").to_owned()))
    })
    .await?;
    Ok((card, id))
}

/// Prints that a test could not run: it must not look as if it had passed.
#[allow(clippy::print_stdout, reason = "for whoever reads the tests' output")]
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("NOT TESTED: only root may mount file systems and make devices; run this test as root");
    }
    root
}

/// Lists the changes that rsync would need to make both roots equal, one line for each path.
async fn differences(source: &Path, installed: &Path) -> Result<Vec<String>> {
    let (source, installed) = (format!("{}/", source.display()), format!("{}/", installed.display()));
    // A dry run that compares contents, hard links, ACLs and extended attributes, with numeric owners.
    let compare = ["-naXAHc", "--numeric-ids", "--delete", "--exclude=/lost+found", "--out-format=%i %n"];
    let said = command("rsync", &[&compare[..], &[&source, &installed]].concat()).await?;
    Ok(said.lines().map(str::to_owned).collect())
}

/// True for a line about the installer's own work: the node's own files, their parent folders, and the boot files,
/// which are on their own partition.
fn is_personal(line: &str) -> bool {
    let Some((what, path)) = line.split_once(' ') else { return false };
    let path = Path::new(path.trim_start());
    let own = PERSONALISED.iter().any(|own| path.starts_with(own)) || path.starts_with("boot/firmware");
    // `.d..t......` is a folder that differs only in its time, because a file was added to it.
    own || (what == ".d..t......" && PERSONALISED.iter().any(|own| Path::new(own).parent() == Some(path)))
}

#[tokio::test]
async fn a_tree_with_traps_arrives_as_it_was() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let (card, id) = pi_on_ext4(&mut fleet).await?;
    let bed = Mount::ext4(fleet.dir().join("bed"), CARD).await?;
    let source = bed.folder().join("source");
    lay_out_root(&source, "traps")?;
    tree::lay(&source).await?;

    let tarball = fleet.dir().join("traps.tar.zst");
    let (from, to) = (source.display().to_string(), tarball.display().to_string());
    run(&binary("marcoctl")?, &["image", "pack", &from, "-o", &to], LIMIT).await?.success()?;
    let image = push(&mut fleet.artifacts(), "traps", Kind::Image, Purpose::Unspecified, &tarball).await?;
    fleet.succeeds(update(&[&id], &image.name, ""), LIMIT).await?;

    let root = card.folder().join(&id).join("root");
    let differs: Vec<String> =
        differences(&source, &root).await?.into_iter().filter(|line| !is_personal(line)).collect();
    assert!(differs.is_empty(), "rsync finds {} differences:\n{}", differs.len(), differs.join("\n"));
    let sparse = fs::metadata(root.join(tree::SPARSE))?;
    assert_eq!(sparse.len(), 1 << 30);
    assert!(sparse.blocks() * 512 < 2 << 20, "the sparse gigabyte takes {} blocks", sparse.blocks());

    // The control: the comparison finds each of these differences.
    let damages: [(&[&str], &str); 4] = [
        (&["setfattr", "-n", "user.note", "-v", "other"], "usr/traps/attributes"),
        (&["chown", "--no-dereference", "1:1"], "usr/traps/dangling"),
        (&["setfacl", "-m", "user:4711:rwx"], "usr/traps/acl"),
        (&["touch", "--date=1969-01-01T00:00:00Z"], "usr/traps/before-1970"),
    ];
    for (damage, found) in damages {
        let path = root.join(found).display().to_string();
        let (program, arguments) = damage.split_first().context("a program")?;
        command(program, &[arguments, &[path.as_str()]].concat()).await?;
        let differs = differences(&source, &root).await?;
        assert!(differs.iter().any(|line| line.ends_with(found)), "{damage:?} is not seen in {differs:?}");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_large_image_with_the_largest_window_is_installed_in_64_mib_of_memory() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let source = fleet.dir().join("large");
    lay_out_root(&source, "large")?;
    // Copies of incompressible bytes, as far apart as the window reaches.
    let bytes = noise("large", 15 << 20);
    for copy in 0..8 {
        fs::write(
            source.join(format!("usr/lib/marker/copy-{copy}")),
            if copy < 3 { &bytes[..] } else { &bytes[copy..] },
        )?;
    }
    let tarball = fleet.dir().join("large.tar.zst");
    let file = fs::File::create(&tarball)?;
    let mut encoder = zstd::Encoder::new(file, 3)?;
    encoder.long_distance_matching(true)?;
    encoder.window_log(24)?;
    let mut packed = tar::Builder::new(encoder);
    packed.follow_symlinks(false);
    packed.append_dir_all(".", &source)?;
    packed.into_inner()?.finish()?;
    let image = push(&mut fleet.artifacts(), "large", Kind::Image, Purpose::Unspecified, &tarball).await?;
    fleet.succeeds(update(&ids, &image.name, ""), LIMIT).await?;

    let status = fs::read_to_string(format!("/proc/{}/status", fleet.agents_id().context("no agent")?))?;
    let kibibytes = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    // Without the pages of the program itself, which depend on the build and on what the page cache holds. 16 of the 64 MiB
    // are left for them.
    let taken = kibibytes("VmHWM:")?.saturating_sub(kibibytes("RssFile:")?);
    ensure!(taken < 48 << 10, "the agent took {taken} KiB beside its program: {status}");
    // The control: the image is small enough that packing must have used the window.
    ensure!(fs::metadata(&tarball)?.len() < 40 << 20, "the window was not used");
    fleet.went_well();
    Ok(())
}

/// A name of any bytes.
pub(crate) fn name(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}
