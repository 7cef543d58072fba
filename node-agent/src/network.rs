//! The installer's network. Every wired interface with a carrier gets an address, fixed or by DHCP, with no limit on
//! the retries. An installed system configures its network itself.
//!
//! The DHCP client is busybox's udhcpc, with this program as its script. It sends its default client id, the MAC
//! address as option 61. The usual systems send the same, so the node keeps its address.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use crate::cause::chain;
use crate::settings::Network;
use crate::system::SystemError;
use crate::system::command::{run, start};

pub mod hook;

const NET: &str = "/sys/class/net";
const BUSYBOX: &str = "/bin/busybox";
/// Interval at which interfaces and carriers are checked.
const LOOK: Duration = Duration::from_millis(500);
/// Pause before a client that ended is started again.
const PAUSE: Duration = Duration::from_secs(2);
/// Time limit of `ip`, which takes no time.
const COMMAND_TIME: Duration = Duration::from_secs(10);
/// Interval of the warning about a missing carrier.
const COMPLAIN: Duration = Duration::from_secs(30);

/// Brings the network up and keeps it up until the future is dropped.
pub async fn keep_up(settings: Network) {
    if let Err(error) = ip(&["link", "set", "dev", "lo", "up"]).await {
        tracing::warn!(error = %chain(&error), "loopback not up");
    }
    let mut clients = HashMap::new();
    let mut looked_at = Vec::new();
    let mut complained = None;
    loop {
        // Checked again and again: drivers load late, and a cable may be plugged in later.
        let interfaces = wired(Path::new(NET), settings.interface.as_deref());
        for interface in &interfaces {
            if !looked_at.contains(interface) {
                match ip(&["link", "set", "dev", interface, "up"]).await {
                    Ok(()) => looked_at.push(interface.clone()),
                    Err(error) => tracing::warn!(interface, error = %chain(&error), "interface not up"),
                }
            }
            if has_carrier(Path::new(NET), interface) && !clients.contains_key(interface) {
                tracing::info!(interface, "carrier");
                clients.insert(interface.clone(), tokio::spawn(serve(interface.clone(), settings.clone())));
            }
        }
        let silent = complained.is_none_or(|last: tokio::time::Instant| last.elapsed() > COMPLAIN);
        if clients.is_empty() && silent {
            complained = Some(tokio::time::Instant::now());
            tracing::warn!(?interfaces, "no wired network interface has a carrier yet");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Configures an interface and keeps it configured.
async fn serve(interface: String, settings: Network) {
    let mut last = String::new();
    loop {
        let done = match &settings.address {
            Some(address) => fixed(&interface, address, &settings).await,
            None => dhcp(&interface).await,
        };
        match done {
            Ok(()) if settings.address.is_some() => {
                tracing::info!(interface, address = settings.address, "network is up");
                return;
            }
            Ok(()) => tracing::warn!(interface, "DHCP client ended, starting it again"),
            // Only a new error: a node may wait for its network for days, and the log on the card is bounded.
            Err(error) if chain(&error) != last => {
                last = chain(&error);
                tracing::warn!(interface, error = last, "no address yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Runs the client until it ends, and logs each new lease.
async fn dhcp(interface: &str) -> Result<(), SystemError> {
    // `-f`: in the foreground, so that its end is noticed. `-t 4 -T 2 -A 4`: four requests, two seconds apart, then
    // again after four seconds, without end.
    let command = [BUSYBOX, "udhcpc", "-f", "-i", interface, "-s", hook::PROGRAM, "-t", "4", "-T", "2", "-A", "4"];
    let mut client = start(&command)?;
    let mut last = String::new();
    loop {
        tokio::select! {
            // Cancel-safe: the exit status of an ended client stays available.
            ended = client.wait() => {
                let ended = ended.map_err(SystemError::io("wait for", BUSYBOX))?;
                return if ended.success() { Ok(()) } else {
                    Err(SystemError::Command { program: "udhcpc".into(), message: ended.to_string() })
                };
            }
            () = tokio::time::sleep(LOOK) => {
                let lease = hook::lease(interface);
                if lease != last {
                    tracing::info!(interface, lease, "network is up");
                    last = lease;
                }
            }
        }
    }
}

async fn fixed(interface: &str, address: &str, settings: &Network) -> Result<(), SystemError> {
    let gateway = settings.gateway.map(|gateway| gateway.to_string());
    let dns: Vec<String> = settings.dns.iter().map(ToString::to_string).collect();
    configure(interface, address, gateway.as_deref(), &dns).await
}

/// Sets address, router and name servers of an interface.
async fn configure(interface: &str, address: &str, gateway: Option<&str>, dns: &[String]) -> Result<(), SystemError> {
    // An address of an earlier lease would stay beside the new one.
    ip(&["addr", "flush", "dev", interface]).await?;
    // `+` derives the broadcast address from the prefix.
    ip(&["addr", "add", address, "broadcast", "+", "dev", interface]).await?;
    if let Some(gateway) = gateway {
        ip(&["route", "replace", "default", "via", gateway, "dev", interface]).await?;
    }
    if !dns.is_empty() {
        let text: String = dns.iter().map(|server| format!("nameserver {server}\n")).collect();
        std::fs::write("/etc/resolv.conf", text).map_err(SystemError::io("write", "/etc/resolv.conf"))?;
    }
    Ok(())
}

async fn ip(arguments: &[&str]) -> Result<(), SystemError> {
    let command: Vec<&str> = [BUSYBOX, "ip"].iter().chain(arguments).copied().collect();
    run(&command, COMMAND_TIME).await
}

/// Wired interfaces with a device behind them, sorted. With `named` only that one, once it exists.
fn wired(net: &Path, named: Option<&str>) -> Vec<String> {
    let entries = std::fs::read_dir(net).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| {
            let folder = entry.path();
            let wireless = folder.join("wireless").exists() || folder.join("phy80211").exists();
            folder.join("device").exists() && !wireless
        })
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| named.is_none_or(|named| named == name))
        .collect();
    names.sort();
    names
}

/// True if the interface has a carrier. The file cannot be read while the interface is down.
fn has_carrier(net: &Path, interface: &str) -> bool {
    std::fs::read_to_string(net.join(interface).join("carrier")).is_ok_and(|carrier| carrier.trim() == "1")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{has_carrier, wired};

    #[test]
    fn only_wired_interfaces_with_a_device_are_used() {
        let net = tempfile::tempdir().unwrap();
        for folder in ["eth0/device", "wlan0/device", "wlan0/phy80211", "lo", "usb0/device"] {
            fs::create_dir_all(net.path().join(folder)).unwrap();
        }
        fs::write(net.path().join("eth0/carrier"), "1\n").unwrap();
        fs::write(net.path().join("usb0/carrier"), "0\n").unwrap();
        assert_eq!(wired(net.path(), None), ["eth0", "usb0"]);
        assert_eq!(wired(net.path(), Some("usb0")), ["usb0"]);
        assert!(has_carrier(net.path(), "eth0") && !has_carrier(net.path(), "usb0") && !has_carrier(net.path(), "lo"));
    }
}
