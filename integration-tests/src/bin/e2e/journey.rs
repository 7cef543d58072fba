//! From a card with only the installer to a system, to another one, to a broken one, and back.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use integration_tests::machine::lab::{ADDRESS, field, text};
use integration_tests::machine::rig::{Options, Rig, START};
use integration_tests::machine::system::{CLOUD_INIT_LABEL, Kind};
use integration_tests::machine::{End, Power};
use integration_tests::tree::{compare_with_source, list};
use integration_tests::wait::seconds;
use node_agent::system::virtual_pi::firmware::Outcome;

/// Timeout of an installation with all its boots, on an emulated processor shared with others.
const UPDATE: std::time::Duration = seconds(600);

/// Interval between two looks at a console for a text that triggers a cut.
const LOOK: std::time::Duration = std::time::Duration::from_millis(20);

/// Division of the card after an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// The installer's: recovery partition, root, home and boot partition.
    Resident,
    /// The image's: a FAT and a root.
    Single,
}

/// The node's own data, which each update must preserve.
#[derive(Debug, PartialEq, Eq)]
struct Own {
    machine_id: Vec<u8>,
    host_keys: Vec<(String, Vec<u8>)>,
    home: Vec<(String, Vec<u8>)>,
}

pub(crate) async fn travel(options: Options, dir: &Path) -> Result<()> {
    let begun = Instant::now();
    let step = |what: &str| println!("\n== {:4} s  {what}", begun.elapsed().as_secs());

    step("a controller, three images, and a card with nothing but the installer");
    let rig = Rig::start(options, dir).await?;
    let first = rig.push_image(Kind::Good, "first").await?;
    let second = rig.push_image(Kind::CloudInit, "second").await?;
    rig.push_image(Kind::Panics, "broken").await?;
    rig.lab.ask(&["artifacts", "default", "first"]).await?;
    let table: Vec<bool> =
        (1..=4).map(|number| Ok(rig.machine.card().partition(number)?.is_some())).collect::<Result<_>>()?;
    ensure!(table == [true, false, false, false], "the card has other partitions than p1: {table:?}");
    let fresh = rig.folder("fresh");
    rig.machine.card().copy_fat(1, &fresh).await?.context("the card has no recovery partition")?;
    let join = std::fs::read_to_string(fresh.join("marco/join.toml")).context("the card has no join file")?;
    // The node must discover its controller, so the card may not tell its address.
    ensure!(!join.contains(ADDRESS), "the join file says where the controller is: {join}");

    step("power on: it finds the controller, enrols, and installs what the controller has for it");
    let mut power = rig.machine.power_on();
    let node = rig
        .until(&mut power, START, "a node registers by itself", async || {
            let nodes = rig.lab.ask(&["nodes", "list"]).await?;
            Ok(field(&nodes, "nodes.0.name").and_then(|_| text(&nodes, "nodes.0.name")).ok().map(str::to_owned))
        })
        .await?;
    println!("{node} registered");
    let operation = rig
        .until(&mut power, START, "the controller makes an operation for it", async || {
            let operations = rig.lab.ask(&["operations", "list"]).await?;
            Ok(text(&operations, "operations.0.name").ok().map(str::to_owned))
        })
        .await?;
    arrives(&rig, &mut power, &node, &operation, &first, Layout::Resident).await?;
    let node = node.strip_prefix("nodes/").context("its name")?.to_owned();

    step("power off, and a look at the card from outside");
    rig.power_off(power, &node).await?;
    let before = look(&rig, "first", Layout::Resident).await?;
    let label = rig.machine.card().label(4).await?;
    // The first image has no cloud-init, so nothing looks for a label.
    ensure!(label == "BOOT", "the boot partition's label is {label}, though nobody looks for it");
    println!(
        "machine-id {}, {} host keys, {} files at home",
        String::from_utf8_lossy(&before.machine_id).trim(),
        before.host_keys.len(),
        before.home.len()
    );

    step("an update to the second image");
    let mut power = rig.machine.power_on();
    rig.connected(&mut power, &node, "NODE_MODE_RUNNING").await?;
    let operation = update(&rig, &node, "second", &[]).await?;
    arrives(&rig, &mut power, &format!("nodes/{node}"), &operation, &second, Layout::Resident).await?;
    rig.power_off(power, &node).await?;
    let after = look(&rig, "second", Layout::Resident).await?;
    ensure!(after == before, "the update did not preserve what is the node's own");
    let label = rig.machine.card().label(4).await?;
    ensure!(label == CLOUD_INIT_LABEL, "the boot partition's label is {label}, which cloud-init does not look for");
    println!("cloud-init of the second image finds its data by the label {label}");
    println!("home, host keys and machine-id are the same, byte for byte");

    step("an image that does not come up");
    let mut power = rig.machine.power_on();
    rig.connected(&mut power, &node, "NODE_MODE_RUNNING").await?;
    let starts = rig.machine.starts().len();
    let operation = update(&rig, &node, "broken", &[]).await?;
    let execution = rig.ended(&mut power, &operation, UPDATE).await?;
    let state = text(&execution, "state")?;
    ensure!(state == "STATE_FAILED", "the execution ended {state}: {execution}");
    println!("{operation} ended {state}: {}", text(&execution, "error.message")?);
    rig.connected(&mut power, &node, "NODE_MODE_INSTALLER").await?;
    let log = rig.lab.ask(&["operations", "log", &operation, &node]).await?;
    let log = text(&log, "log")?;
    ensure!(log.contains("IMAGE_DID_NOT_COME_UP") && log.contains("unpacking"), "the installer's log is\n{log}");
    println!("of the installer's log the controller has {} lines", log.lines().count());
    let history = rig.machine.starts();
    let trials = history.iter().skip(starts).filter(|start| {
        // A trial that ends by a reset is one that did not come up.
        let of_system = matches!(&start.outcome, Outcome::Booted(boot) if boot.partition == 4 && boot.tryboot);
        of_system && start.end == Some(End::Reset)
    });
    let trials = trials.count();
    ensure!(trials == 3, "the broken system was tried {trials} times, not three times");
    println!("it was tried {trials} times; the installer is back, and connected");

    step("an update to the previous image, from the installer");
    let operation = update(&rig, &node, "second", &[]).await?;
    arrives(&rig, &mut power, &format!("nodes/{node}"), &operation, &second, Layout::Resident).await?;
    rig.power_off(power, &node).await?;
    let after = look(&rig, "second", Layout::Resident).await?;
    ensure!(after == before, "the way back did not preserve what is the node's own");
    println!("home, host keys and machine-id are the same, byte for byte");

    step("an update to an image of a whole disk");
    let mut power = rig.machine.power_on();
    rig.connected(&mut power, &node, "NODE_MODE_RUNNING").await?;
    let third = rig.push_disk_image("third").await?;
    let operation = update(&rig, &node, "third", &[]).await?;
    arrives(&rig, &mut power, &format!("nodes/{node}"), &operation, &third, Layout::Resident).await?;
    rig.power_off(power, &node).await?;
    let after = look(&rig, "third", Layout::Resident).await?;
    ensure!(after == before, "the disk image did not preserve what is the node's own");
    println!("home, host keys and machine-id are the same, byte for byte");

    step("the same image written raw to the whole card, with the power cut twice");
    let mut power = rig.machine.power_on();
    rig.connected(&mut power, &node, "NODE_MODE_RUNNING").await?;
    let operation = update(&rig, &node, "third", &["--raw"]).await?;
    // The two dangerous moments of a raw installation: the recovery partition moves to the card's end, and the image is
    // half written.
    power = cut_when(&rig, power, "the recovery partition moves").await?;
    power = cut_when(&rig, power, "phase=\"unpacking image\"").await?;
    arrives(&rig, &mut power, &format!("nodes/{node}"), &operation, &third, Layout::Single).await?;
    rig.power_off(power, &node).await?;
    let after = look(&rig, "third", Layout::Single).await?;
    ensure!(after.machine_id == before.machine_id && after.host_keys == before.host_keys, "the node is another one");
    println!("the card is the image's; host keys and machine-id are the same");

    step("and an update of that to the second image, in layout resident again");
    let mut power = rig.machine.power_on();
    rig.connected(&mut power, &node, "NODE_MODE_RUNNING").await?;
    // A card in layout single has no installer, so the update brings one.
    let operation = update(&rig, &node, "second", &["--bootcode", "installer-1"]).await?;
    arrives(&rig, &mut power, &format!("nodes/{node}"), &operation, &second, Layout::Resident).await?;
    rig.power_off(power, &node).await?;
    let again = look(&rig, "second", Layout::Resident).await?;
    ensure!(again.machine_id == before.machine_id && again.host_keys == before.host_keys, "the node is another one");

    let starts = rig.machine.starts();
    println!("\n{} starts in {} s: every operation ended as it should", starts.len(), begun.elapsed().as_secs());
    for (number, start) in (1_u32..).zip(&starts).filter(|(_, start)| start.hung) {
        println!(
            "start {number} hung on its way down ({:?}) and was reset by the test: QEMU has no watchdog",
            start.end
        );
    }
    println!("not shown on {}: {}", rig.board().name(), rig.board().not_shown());
    Ok(())
}

/// Cuts the power as soon as the machine's console contains this text. Checks that the installer boots next, and starts
/// it.
async fn cut_when(rig: &Rig, mut power: Power, words: &str) -> Result<Power> {
    let begun = Instant::now();
    loop {
        power.check().await.map_err(|error| error.context(rig.tail()))?;
        let console = rig.machine.starts().last().map(|start| start.console.clone());
        let said = console.map(std::fs::read).transpose()?.unwrap_or_default();
        if String::from_utf8_lossy(&said).contains(words) {
            break;
        }
        ensure!(begun.elapsed() < UPDATE, "waited {UPDATE:?} in vain: {words}\n{}", rig.tail());
        tokio::time::sleep(LOOK).await;
    }
    power.cut().await?;
    let firmware = rig.machine.firmware(false).await?;
    let installer = matches!(&firmware.outcome, Outcome::Booted(boot) if boot.partition == 1);
    ensure!(installer, "after a cut at {words:?} boots {:?}", firmware.outcome);
    println!("cut when it said {words:?}: the installer is what boots");
    Ok(rig.machine.power_on())
}

/// Creates an update without notice, and returns the operation's name.
async fn update(rig: &Rig, node: &str, image: &str, more: &[&str]) -> Result<String> {
    let arguments = ["operations", "update", node, "--image", image, "--notice", "0s"];
    let operation = rig.lab.ask(&[&arguments, more].concat()).await?;
    Ok(text(&operation, "name")?.to_owned())
}

/// Waits until the operation has succeeded, and checks that the controller reports this image and layout for the node.
async fn arrives(
    rig: &Rig,
    power: &mut Power,
    node: &str,
    operation: &str,
    sha256: &str,
    layout: Layout,
) -> Result<()> {
    let execution = rig.ended(power, operation, UPDATE).await?;
    let (state, of) = (text(&execution, "state")?, text(&execution, "node")?);
    ensure!(
        state == "STATE_SUCCEEDED" && of == node,
        "the execution on {of} ended {state}: {execution}\n{}",
        rig.tail()
    );
    let found = rig.connected(power, node, "NODE_MODE_RUNNING").await?;
    let (runs, laid_out) = (text(&found, "system.imageSha256")?, text(&found, "system.layout")?);
    ensure!(runs == sha256, "the node runs {runs}, not {sha256}");
    let wanted = match layout {
        Layout::Resident => "CARD_LAYOUT_RESIDENT",
        Layout::Single => "CARD_LAYOUT_SINGLE",
    };
    ensure!(laid_out == wanted, "the card is laid out as {laid_out}");
    if layout == Layout::Resident {
        was_supervised(rig)?;
    }
    println!("{operation} ended {state}: {node} runs {}", text(&found, "system.os")?);
    Ok(())
}

/// Checks by its console that the system that runs was supervised on its trial, until it was accepted.
fn was_supervised(rig: &Rig) -> Result<()> {
    let starts = rig.machine.starts();
    let console = starts.last().map(|start| std::fs::read(&start.console)).transpose()?.unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    // QEMU's own machines have the softdog in place of a Pi's watchdog.
    let fed = if rig.board().has_watchdog() { "the watchdog is fed" } else { "" };
    for said in ["this system is on trial", fed, "the system is accepted"] {
        ensure!(console.contains(said), "on trial the console does not say {said:?}\n{}", rig.tail());
    }
    Ok(())
}

/// Checks the card from outside: its file systems are intact, root and boot partition are those of the image, and the
/// firmware boots the system by default. Returns the node's own data.
async fn look(rig: &Rig, image: &str, layout: Layout) -> Result<Own> {
    let card = rig.machine.card();
    let (table, boot_number): ([Option<bool>; 4], u32) = match layout {
        Layout::Resident => ([Some(true), Some(false), Some(false), Some(true)], 4),
        Layout::Single => ([Some(true), Some(false), None, None], 1),
    };
    for (number, fat) in (1..).zip(table) {
        let is = card.partition(number)?.map(|partition| partition.is_fat());
        ensure!(is == fat, "partition {number} is {is:?} a FAT, not {fat:?}");
        if fat == Some(false) {
            card.check_ext4(number).await?;
        }
    }
    let firmware = rig.machine.firmware(false).await?;
    let system = matches!(&firmware.outcome, Outcome::Booted(boot) if boot.partition == boot_number);
    ensure!(
        system && firmware.unreadable.is_empty(),
        "by default boots {:?}, unreadable are {:?}",
        firmware.outcome,
        firmware.unreadable
    );

    let seen = rig.folder("seen");
    let (root, boot, home) = (seen.join("root"), seen.join("boot"), rig.folder("seen-home"));
    card.copy_ext4(2, "/", &root).await?;
    card.copy_fat(boot_number, &boot).await?;
    match layout {
        Layout::Resident => card.copy_ext4(3, "/pi", &home).await?,
        Layout::Single => {
            card.copy_ext4(2, "/home/pi", &home).await?;
            // Removed because it is the node's own data and not part of the image's tree.
            std::fs::remove_dir_all(root.join("home/pi")).context("its home is on its root")?;
            let (tree, own) = (rig.tree(image), ["etc/fstab", "boot/firmware/cmdline.txt"]);
            for (own, found) in own.into_iter().zip([root.join("etc/fstab"), boot.join("cmdline.txt")]) {
                ensure!(std::fs::read(tree.join(own))? == std::fs::read(found)?, "{own} is not the image's");
            }
        }
    }
    // mkfs makes this folder; it is not part of the image.
    std::fs::remove_dir(root.join("lost+found")).context("every ext4 has one")?;
    let same = compare_with_source(&rig.tree(image), &seen)?;
    println!("root and boot partition hold the {same} files and folders of image {image}");

    let host_keys =
        files(&root.join("etc/ssh"))?.into_iter().filter(|(name, _)| name.starts_with("ssh_host_")).collect();
    let own = Own { machine_id: std::fs::read(root.join("etc/machine-id"))?, host_keys, home: files(&home)? };
    // 32 hexadecimal digits and a line feed (machine-id(5)).
    ensure!(own.machine_id.len() == 33, "the machine-id is {:?}", String::from_utf8_lossy(&own.machine_id));
    ensure!(own.host_keys.len() >= 2 && !own.home.is_empty(), "host keys or home are missing: {own:?}");
    Ok(own)
}

/// All files below a folder: relative path and contents.
fn files(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let paths = list(folder)?.into_iter().filter(|path| folder.join(path).is_file());
    paths.map(|path| Ok((path.display().to_string(), std::fs::read(folder.join(&path))?))).collect()
}
