//! Changes to an image's own texts, so that they fit the card. Pure.

pub(super) use marco_archive::firmware::BootMount;

use crate::system::Target;

/// Programs that images name as `init=` for their first boot only, to grow the root over the rest of the card: behind
/// our root there is another partition.
const RESIZERS: [&str; 2] = ["init_resize", "raspberrypi-sys-mods/firstboot"];

/// The kernel's command line for this card: our root, our root's file system, and no first-boot resizer.
pub(super) fn cmdline(text: &str, root_device: &str, root_type: &str) -> String {
    let kind = format!("rootfstype={root_type}");
    let mut words: Vec<String> = text
        .split_whitespace()
        // `resize` has an initramfs grow the root, which would run into our home partition.
        .filter(|word| *word != "resize" && !word.starts_with("root="))
        .filter(|word| !(word.starts_with("init=") && RESIZERS.iter().any(|program| word.contains(program))))
        .map(|word| if word.starts_with("rootfstype=") { kind.clone() } else { word.to_owned() })
        .collect();
    if root_type != "ext4" && !words.contains(&kind) {
        words.push(kind);
    }
    words.push(format!("root={root_device}"));
    // The card may show up after the kernel first looks for its root.
    if !words.iter().any(|word| word == "rootwait") {
        words.push("rootwait".into());
    }
    words.join(" ") + "\n"
}

/// The image's fstab with root, boot and home on this card. Its options are kept; everything else stays as it is.
pub(super) fn fstab(text: &str, target: &Target, boot: BootMount) -> String {
    let ours = [
        ("/", target.root_device.as_str(), target.root_type.as_str(), "defaults,noatime", "1"),
        (boot.mount_point(), target.boot_device.as_str(), "vfat", "defaults", "2"),
        // `nofail`: without its home the node still reaches its controller, and can be repaired.
        ("/home", target.home_device.as_str(), target.home_type.as_str(), "defaults,noatime,nofail", "2"),
    ];
    let mut lines = Vec::new();
    let mut found = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let entry = match words.as_slice() {
            [device, point, _, rest @ ..] if !device.starts_with('#') => {
                ours.iter().find(|ours| ours.0 == *point).map(|ours| (ours, rest))
            }
            _ => None,
        };
        match entry {
            Some(((point, device, kind, options, pass), rest)) if !found.contains(point) => {
                let options = rest.first().unwrap_or(options);
                lines.push(format!("{device} {point} {kind} {options} 0 {pass}"));
                found.push(*point);
            }
            // A second line for a mount point would mount a device over ours that this card does not have.
            Some(_) => {}
            None => lines.push(line.to_owned()),
        }
    }
    for (point, device, kind, options, pass) in ours {
        if !found.contains(&point) {
            lines.push(format!("{device} {point} {kind} {options} 0 {pass}"));
        }
    }
    lines.join("\n") + "\n"
}

/// The image's hosts with the node's name where Debian puts it (hosts(5), 127.0.1.1).
pub(super) fn hosts(text: &str, host: &str) -> String {
    let own = format!("127.0.1.1\t{host}");
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("127.0.1.1")).collect();
    lines.push(&own);
    lines.join("\n") + "\n"
}

/// A node's id as a host name: ids may have underscores, which host names may not.
pub(super) fn host_name(node: &str) -> String {
    node.replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::{BootMount, cmdline, fstab, hosts};
    use crate::system::Target;

    #[test]
    fn the_command_line_names_our_root_and_no_resizer() {
        let text = "console=tty1 root=PARTUUID=aa-02 rootfstype=btrfs fsck.repair=yes rootwait quiet \
                    init=/usr/lib/raspi-config/init_resize.sh\n";
        assert_eq!(
            cmdline(text, "PARTUUID=00-02", "ext4"),
            "console=tty1 rootfstype=ext4 fsck.repair=yes rootwait quiet root=PARTUUID=00-02\n"
        );
        assert_eq!(cmdline("init=/sbin/init resize", "/dev/x", "ext4"), "init=/sbin/init root=/dev/x rootwait\n");
    }

    #[test]
    fn a_root_that_is_not_ext4_is_named() {
        assert_eq!(cmdline("quiet", "/dev/x", "f2fs"), "quiet rootfstype=f2fs root=/dev/x rootwait\n");
        let target = Target { root_type: "f2fs".into(), home_type: "btrfs".into(), ..Target::in_test() };
        let fstab = fstab("PARTUUID=aa-02 / ext4 noatime 0 1\n", &target, BootMount::Boot);
        assert!(fstab.contains("PARTUUID=00-02 / f2fs noatime 0 1\n"), "{fstab}");
        assert!(fstab.contains("PARTUUID=00-03 /home btrfs "), "{fstab}");
    }

    #[test]
    fn fstab_keeps_what_is_not_ours() {
        let text = "# static\nproc /proc proc defaults 0 0\nPARTUUID=aa-01 /boot/firmware vfat umask=0077 0 2\n\
                    PARTUUID=aa-02 / btrfs noatime 0 1\nLABEL=DATA /srv ext4 nofail 0 2\n";
        assert_eq!(BootMount::of_fstab(text), Some(BootMount::Firmware));
        assert_eq!(
            fstab(text, &Target::in_test(), BootMount::Firmware),
            "# static\nproc /proc proc defaults 0 0\nPARTUUID=00-04 /boot/firmware vfat umask=0077 0 2\n\
             PARTUUID=00-02 / ext4 noatime 0 1\nLABEL=DATA /srv ext4 nofail 0 2\n\
             PARTUUID=00-03 /home ext4 defaults,noatime,nofail 0 2\n"
        );
    }

    #[test]
    fn an_empty_fstab_gets_all_three() {
        assert_eq!(BootMount::of_fstab("#/dev/x /boot vfat\n"), None);
        assert_eq!(fstab("", &Target::in_test(), BootMount::Boot).lines().count(), 3);
    }

    #[test]
    fn the_host_name_is_the_nodes() {
        assert_eq!(
            hosts("127.0.0.1 localhost\n127.0.1.1 raspberrypi\n", "pi-01"),
            "127.0.0.1 localhost\n127.0.1.1\tpi-01\n"
        );
    }
}
