use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

use super::{Host, HostOptions};
use crate::system::{Booted, Down, Force, Layout, Reboot, Standing, System};

fn put(root: &Path, path: &str, bytes: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A host with a shutdown command that records its arguments, one a line, and exits with the status in `status`.
fn host(root: &Path) -> Host {
    put(root, "bin/shutdown", "#!/bin/sh\nprintf '%s\\n' \"$@\" >> \"$0.log\"\nexit $(cat \"$0.status\")\n");
    put(root, "bin/shutdown.status", "0");
    put(root, "run/systemd/keep", "");
    let program = root.join("bin/shutdown");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    Host::new(HostOptions {
        sysroot: root.into(),
        shutdown_command: vec!["/bin/sh".into(), program.to_str().unwrap().into()],
        force_command: Vec::new(),
        ..HostOptions::default()
    })
    .unwrap()
}

fn said(root: &Path) -> Vec<String> {
    fs::read_to_string(root.join("bin/shutdown.log")).unwrap_or_default().lines().map(Into::into).collect()
}

#[test]
fn a_pi_is_described_from_its_device_tree() {
    let root = TempDir::new().unwrap();
    let tree = "proc/device-tree";
    put(root.path(), &format!("{tree}/model"), "Raspberry Pi 4 Model B Rev 1.4\0");
    put(root.path(), &format!("{tree}/serial-number"), "10000000abcdef01\0");
    put(root.path(), &format!("{tree}/system/linux,revision"), 0x00c0_3114_u32.to_be_bytes());
    put(root.path(), &format!("{tree}/chosen/bootloader/partition"), 1_u32.to_be_bytes());
    put(root.path(), &format!("{tree}/chosen/bootloader/tryboot"), 1_u32.to_be_bytes());
    put(root.path(), "proc/meminfo", "MemTotal:        3884128 kB\nMemFree: 1 kB\n");
    put(root.path(), "proc/sys/kernel/random/boot_id", "6f1c-boot\n");
    put(root.path(), "etc/os-release", "ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n");
    put(root.path(), "boot/firmware/config.txt", "");
    for (interface, address) in [("eth0", "DC:A6:32:00:00:02"), ("wlan0", "dc:a6:32:00:00:01")] {
        put(root.path(), &format!("sys/class/net/{interface}/address"), address);
        put(root.path(), &format!("sys/class/net/{interface}/device/uevent"), "");
    }
    // No device behind it, so it is not the board's.
    put(root.path(), "sys/class/net/docker0/address", "02:42:00:00:00:01");
    let host = host(root.path());
    let facts = host.facts().unwrap();
    assert_eq!(facts.board.model, "Raspberry Pi 4 Model B Rev 1.4");
    assert_eq!((facts.board.revision.as_str(), facts.board.family.as_str()), ("c03114", "pi4"));
    assert_eq!(facts.board.serial, "10000000abcdef01");
    assert_eq!(facts.board.macs, ["dc:a6:32:00:00:01", "dc:a6:32:00:00:02"]);
    assert_eq!(facts.board.memory_bytes, 3_884_128 * 1024);
    assert_eq!(facts.system.os, "Debian GNU/Linux 12 (bookworm)");
    assert_eq!(facts.system.layout, Layout::Single);
    assert!(facts.system.page_size >= 4096);
    assert_eq!(host.boot_id().unwrap(), "6f1c-boot");
    assert_eq!(host.booted(), Some(Booted { partition: 1, tryboot: true }));
}

#[test]
fn cpuinfo_stands_in_for_the_device_tree() {
    let root = TempDir::new().unwrap();
    let text = "processor : 0\n\nRevision\t: a02082\nSerial\t\t: 00000000deadbeef\nModel\t\t: Raspberry Pi 3 Model B Rev 1.2\n";
    put(root.path(), "proc/cpuinfo", text);
    let board = host(root.path()).facts().unwrap().board;
    assert_eq!((board.family.as_str(), board.serial.as_str()), ("pi3", "00000000deadbeef"));
    assert_eq!(host(root.path()).booted(), None);
}

#[test]
fn any_other_machine_has_empty_facts_and_no_card() {
    let root = TempDir::new().unwrap();
    let host = host(root.path());
    assert_eq!(host.facts().unwrap().board, crate::system::Board::default());
    assert_eq!(host.card(), None);
}

#[test]
fn this_very_machine_can_be_described() {
    let host = Host::new(HostOptions::default()).unwrap();
    assert_eq!(host.boot_id().unwrap().len(), 36);
    assert!(host.facts().unwrap().board.memory_bytes > 0);
}

#[tokio::test]
async fn a_notice_warns_and_a_cancel_takes_it_back() {
    let root = TempDir::new().unwrap();
    let host = host(root.path());
    host.announce(Down::Reboot, Duration::from_secs(90), "new kernel").await.unwrap();
    assert_eq!(said(root.path()), ["-k", "-r", "+2", "This machine reboots in 1m 30s: new kernel"]);
    host.withdraw().await.unwrap();
    assert_eq!(said(root.path())[4..], ["-c", "The announced shutdown was cancelled."]);
}

#[tokio::test]
async fn only_the_agents_own_shutdown_is_taken_back() {
    let root = TempDir::new().unwrap();
    let scheduled = "run/systemd/shutdown/scheduled";
    let host = host(root.path());
    // Does what logind does for `shutdown -k` and for `shutdown -c`.
    let script = "#!/bin/sh\nprintf '%s\\n' \"$@\" >> \"$0.log\"\ncd \"$(dirname \"$0\")/..\"\ncase $1 in\n\
                  -k) mkdir -p run/systemd/shutdown; echo \"MODE=reboot\" > run/systemd/shutdown/scheduled ;;\n\
                  -c) rm run/systemd/shutdown/scheduled ;;\nesac\n";
    put(root.path(), "bin/shutdown", script);
    let minute = Duration::from_secs(60);
    assert_eq!(host.standing(), Standing::Nothing);
    host.withdraw().await.unwrap();
    assert_eq!(said(root.path()), [""; 0], "nothing was announced");
    assert!(host.announce(Down::Reboot, minute, "").await.unwrap());
    assert_eq!(host.standing(), Standing::Ours);
    // An agent that was killed during its notice withdraws its announcement.
    let again = Host::new(host.options.clone()).unwrap();
    again.withdraw().await.unwrap();
    assert_eq!((again.standing(), said(root.path()).len()), (Standing::Nothing, 6));

    let theirs = "USEC=1\nMODE=poweroff\n";
    put(root.path(), scheduled, theirs);
    // The test machine may have no terminal, or no program that writes to it.
    let _ = host.announce(Down::Reboot, minute, "").await;
    let _ = host.withdraw().await;
    assert_eq!(fs::read_to_string(root.path().join(scheduled)).unwrap(), theirs);
    assert_eq!(said(root.path()).len(), 6, "shutdown was not called");

    let parameter = "run/systemd/reboot-param";
    // Another program asked for that reboot, so its argument stays.
    put(root.path(), parameter, "recovery");
    let _ = host.withdraw().await;
    assert!(root.path().join(parameter).exists(), "of somebody else's reboot");
}

#[tokio::test]
async fn commands_get_the_message_as_one_argument_and_no_shell() {
    let root = TempDir::new().unwrap();
    let host = host(root.path());
    // An operator writes the message. It must never reach a shell.
    host.reboot(Reboot::Plain, None, "$(touch /tmp/x); `id` 'now'").await.unwrap();
    assert_eq!(said(root.path()), ["-r", "now", "This machine reboots now: $(touch /tmp/x); `id` 'now'"]);
    host.power_off(None, "").await.unwrap();
    assert_eq!(said(root.path())[3..], ["-P", "now", "This machine powers off now."]);
}

#[tokio::test]
async fn a_trial_boot_is_prepared_before_the_command_and_forgotten_when_it_fails() {
    let root = TempDir::new().unwrap();
    let host = host(root.path());
    let parameter = root.path().join("run/systemd/reboot-param");
    host.reboot(Reboot::TryBoot, None, "").await.unwrap();
    assert_eq!(fs::read_to_string(&parameter).unwrap(), "0 tryboot");
    host.withdraw().await.unwrap();
    assert!(!parameter.exists());
    // A failed command must leave no trial boot for the next reboot.
    put(root.path(), "bin/shutdown.status", "1");
    assert!(host.reboot(Reboot::TryBoot, None, "").await.is_err());
    assert!(!parameter.exists());
}

#[tokio::test]
async fn a_stronger_command_keeps_the_argument_of_the_reboot() {
    let root = TempDir::new().unwrap();
    let orderly = host(root.path());
    let force_command = orderly.options.shutdown_command.clone();
    let host = Host::new(HostOptions { force_command, ..orderly.options }).unwrap();
    let parameter = root.path().join("run/systemd/reboot-param");
    host.reboot(Reboot::TryBoot, None, "").await.unwrap();
    host.force(Down::Reboot, Reboot::TryBoot, Force::Services, None).await.unwrap();
    assert_eq!(fs::read_to_string(&parameter).unwrap(), "0 tryboot");
    assert_eq!(said(root.path())[3..], ["reboot", "--force"]);
    host.force(Down::Reboot, Reboot::Plain, Force::Everything, None).await.unwrap();
    assert!(!parameter.exists());
    host.force(Down::PowerOff, Reboot::Plain, Force::Services, None).await.unwrap();
    assert_eq!(said(root.path())[5..], ["reboot", "--force", "--force", "poweroff", "--force"]);
}

#[tokio::test]
async fn a_machine_with_a_shutdown_command_of_its_own_is_told_by_nothing_else() {
    let root = TempDir::new().unwrap();
    let host = host(root.path());
    host.force(Down::Reboot, Reboot::TryBoot, Force::Everything, None).await.unwrap();
    assert_eq!(said(root.path())[..2], ["-r", "now"]);
}

#[tokio::test]
async fn an_update_is_refused_with_the_reason() {
    let root = TempDir::new().unwrap();
    let refusal = host(root.path()).preflight_update().await.unwrap_err();
    assert_eq!(refusal.reason, "LAYOUT_NOT_RESIDENT");
}

#[test]
fn a_command_without_an_absolute_path_is_refused() {
    for command in [vec![], vec!["shutdown".to_owned()]] {
        assert!(Host::new(HostOptions { shutdown_command: command, ..HostOptions::default() }).is_err());
    }
}
