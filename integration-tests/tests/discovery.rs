//! Discovery of controllers in networks of namespaces: real programs, each method alone, and impostors.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use integration_tests::netlab::Lab;
use integration_tests::process::{Output, Process, binary, tool, workspace};
use integration_tests::{seconds, wait_until};
use rcgen::{CertificateParams, KeyPair};
use sha2::{Digest as _, Sha256};

/// Timeout of a controller's start and of an agent's enrolment; each search takes up to ten seconds.
const SETTLE: std::time::Duration = seconds(90);

/// A name that every controller of this project answers to. Agents verify it.
const NAME: &str = "controller.marco.internal";

/// A controller on a host of the lab. Declare it after the lab, so that it is dropped before.
struct Controller {
    process: Process,
    host: u8,
    port: u16,
    folder: PathBuf,
}

impl Controller {
    /// Starts a controller. Without further arguments it listens on the default ports of all addresses.
    async fn start(lab: &Lab, host: u8, folder: &Path, further: &[&str]) -> Result<Self> {
        let folder = folder.join(format!("controller-{host}-{}", further.join("").replace([':', '/', '[', ']'], "")));
        fs::create_dir_all(&folder)?;
        let (data, certs) = (folder.join("data").display().to_string(), folder.join("certs").display().to_string());
        let mut arguments = vec!["serve", "--data-dir", &data, "--certs", &certs];
        arguments.extend_from_slice(further);
        let listen = further.iter().skip_while(|argument| **argument != "--listen").nth(1);
        let port = listen.and_then(|listen| listen.rsplit(':').next()).map_or(Ok(1346), str::parse)?;
        let recipe = lab.recipe(host, &binary("marco-controller")?, &arguments, folder.join("log"))?;
        let mut controller = Self { process: recipe.start()?, host, port, folder };
        let log = controller.folder.join("log");
        wait_until(SETTLE, "the controller says where it listens", || {
            let (alive, log) = (controller.process.check_alive(), log.clone());
            async move {
                alive?;
                Ok(fs::read_to_string(log)?.contains("Try: grpcurl").then_some(()))
            }
        })
        .await?;
        Ok(controller)
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("log"))?)
    }

    fn certs(&self) -> String {
        self.folder.join("certs").display().to_string()
    }

    async fn marcoctl(&self, lab: &Lab, arguments: &[&str]) -> Result<String> {
        let (address, certs) = (format!("localhost:{}", self.port), self.certs());
        let mut all = vec!["--controller", &address, "--certs", &certs];
        all.extend_from_slice(arguments);
        lab.run(self.host, &binary("marcoctl")?, &all).await?.success()
    }

    /// Writes a token for nine nodes to a file, and returns its path.
    async fn token(&self, lab: &Lab) -> Result<String> {
        let file = self.folder.join("token");
        fs::write(&file, self.marcoctl(lab, &["tokens", "create", "--max-uses", "9"]).await?)?;
        Ok(file.display().to_string())
    }

    /// Waits until a node is connected.
    async fn is_connected(&self, lab: &Lab, node: &str) -> Result<()> {
        wait_until(SETTLE, &format!("{node} is connected"), async || {
            let list = self.marcoctl(lab, &["--output", "json", "nodes", "list"]).await?;
            let list: serde_json::Value = serde_json::from_str(&list)?;
            let nodes = list.get("nodes").and_then(serde_json::Value::as_array).context("no list")?;
            let connected = nodes
                .iter()
                .any(|found| found["name"] == format!("nodes/{node}").as_str() && found["connected"] == true);
            Ok(connected.then_some(()))
        })
        .await
    }

    /// The first 16 digits of the CA's pin: the hint that discovery carries.
    fn hint(&self) -> Result<String> {
        let key = fs::read_to_string(self.folder.join("data/pki/ca.key"))?;
        let key = KeyPair::from_pem(&key)?;
        let pin = Sha256::digest(rcgen::PublicKeyData::subject_public_key_info(&key));
        Ok(hex::encode(pin).chars().take(16).collect())
    }
}

async fn discover(lab: &Lab, host: u8, further: &[&str]) -> Result<Output> {
    let mut arguments = vec!["discover"];
    arguments.extend_from_slice(further);
    lab.run(host, &binary("marco-agent")?, &arguments).await
}

/// The sorted output of `discover`.
async fn found(lab: &Lab, host: u8) -> Result<Vec<String>> {
    let printed = discover(lab, host, &[]).await?.success()?;
    let mut lines: Vec<String> = printed.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

/// Starts a virtual Pi without any controller's address.
fn start_pi(lab: &Lab, host: u8, folder: &Path, id: &str, token: &str) -> Result<Process> {
    let dir = folder.join(format!("pis-{id}")).display().to_string();
    let arguments = ["simulate", "--count", "1", "--prefix", id, "--dir", &dir, "--token-file", token];
    lab.recipe(host, &binary("marco-agent")?, &arguments, folder.join(format!("{id}.log")))?.start()
}

/// Runs `marco-agent enroll` without any controller's address, for a machine with its identity in `folder/ID`.
async fn enroll(lab: &Lab, host: u8, folder: &Path, id: &str, token: &str) -> Result<Output> {
    let state = folder.join(id);
    fs::create_dir_all(&state)?;
    let file = state.join("agent.toml");
    let state = state.display().to_string();
    fs::write(&file, format!("state_dir = {state:?}\nidentity_dir = {state:?}\nname = {id:?}\n"))?;
    let file = file.display().to_string();
    lab.run(host, &binary("marco-agent")?, &["--config", &file, "enroll", "--token-file", token]).await
}

/// The path of a Python script that plays a foreign program.
fn script(name: &str) -> String {
    workspace().join("integration-tests/tests/discovery").join(name).display().to_string()
}

async fn ask(lab: &Lab, host: u8, group: &str, datagram: &str) -> Result<Vec<String>> {
    let printed = lab.run(host, &tool("python3")?, &[&script("old_client.py"), group, datagram]).await?.success()?;
    Ok(printed.lines().map(str::to_owned).collect())
}

/// Starts an impostor that claims to be a controller of that CA.
async fn start_rogue(lab: &Lab, host: u8, folder: &Path, hint: &str, ways: &str) -> Result<(Process, PathBuf)> {
    // The impostor has a certificate with the right name, but not from the right CA.
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new([NAME.to_owned()])?.self_signed(&key)?;
    let path = |name: &str| folder.join(name).display().to_string();
    fs::write(path("rogue.crt"), certificate.pem())?;
    fs::write(path("rogue.key"), key.serialize_pem())?;
    let script = script("rogue.py");
    let (address, certificate, key) = (lab.address(host), path("rogue.crt"), path("rogue.key"));
    let arguments = [script.as_str(), &address, &certificate, &key, hint, ways];
    let log = folder.join("rogue.log");
    let rogue = lab.recipe(host, &tool("python3")?, &arguments, log.clone())?.start()?;
    wait_until(SETTLE, "the rogue listens", async || Ok(fs::read_to_string(&log)?.contains("ready").then_some(())))
        .await?;
    Ok((rogue, log))
}

#[tokio::test]
async fn each_way_alone_leads_to_the_controller() -> Result<()> {
    // A fresh network for each method: nodes remember controllers, and so would answer without a search.
    // With one method at a time the other cannot hide its failure.
    for ways in ["mdns", "marcopolo"] {
        let folder = tempfile::tempdir()?;
        let lab = Lab::new(2)?;
        let controller = Controller::start(&lab, 1, folder.path(), &["--discovery", ways]).await?;
        assert_eq!(found(&lab, 2).await?, ["10.77.0.1"], "{ways}");
        assert_eq!(found(&lab, 1).await?, ["10.77.0.1"], "{ways}: on the controller's own machine");
        assert_eq!(discover(&lab, 2, &["--first"]).await?.success()?, "10.77.0.1\n", "{ways}");
        let token = controller.token(&lab).await?;
        let enrolled = enroll(&lab, 2, folder.path(), "pi-enrolled", &token).await?.success()?;
        assert_eq!(enrolled, "nodes/pi-enrolled is enrolled\n", "{ways}");
        let _pi = start_pi(&lab, 2, folder.path(), "pi-", &token)?;
        controller.is_connected(&lab, "pi-01").await?;
    }
    Ok(())
}

#[tokio::test]
async fn where_nobody_answers_discover_exits_with_1() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(2)?;
    // The controller runs, so silence means that discovery is off and not that the network is broken.
    let _controller = Controller::start(&lab, 1, folder.path(), &["--discovery", "off"]).await?;
    for further in [[].as_slice(), &["--first"]] {
        let nobody = discover(&lab, 2, further).await?;
        assert_eq!((nobody.status.code(), nobody.stdout.as_str()), (Some(1), ""), "{nobody:?}");
        assert!(nobody.stderr.contains("no controller answered"), "{nobody:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_question_is_asked_three_times_a_group_two_hops_far() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(2)?;
    let log = folder.path().join("heard.log");
    let arguments = [script("listener.py"), lab.address(1)];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut listener = lab.recipe(1, &tool("python3")?, &arguments, log.clone())?.start()?;
    wait_until(SETTLE, "it listens", || {
        let (alive, log) = (listener.check_alive(), log.clone());
        async move {
            alive?;
            Ok(fs::read_to_string(log)?.contains("ready").then_some(()))
        }
    })
    .await?;
    assert_eq!(discover(&lab, 2, &[]).await?.status.code(), Some(1));
    let heard = fs::read_to_string(&log)?;
    let mut groups = Vec::new();
    let mut last = f64::NEG_INFINITY;
    for line in heard.lines().skip(1) {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        // The listener prints time, group, hops and the datagram.
        let [seconds, group, hops, question] = words.as_slice() else { anyhow::bail!("{line}") };
        let seconds: f64 = seconds.parse()?;
        assert!(seconds - last > 0.9, "{heard}");
        last = seconds;
        groups.push(*group);
        assert_eq!(*hops, "2", "{heard}");
        let question: serde_json::Value = serde_json::from_str(question)?;
        assert_eq!(question, serde_json::json!({"Command": "Request-For", "Params": "marcobootstrap"}));
    }
    let (first, second) = ("224.0.0.112", "224.0.0.113");
    assert_eq!(groups, [first, first, first, second, second, second], "{heard}");
    Ok(())
}

#[tokio::test]
async fn any_browser_reads_the_record_and_ports_are_taken_from_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(2)?;
    // Other ports than the defaults, so that an agent must take them from the record.
    let ports = ["--listen", "0.0.0.0:2346", "--enroll-listen", "0.0.0.0:2347", "--mirror-listen", "0.0.0.0:2345"];
    let controller = Controller::start(&lab, 1, folder.path(), &ports).await?;
    let printed = lab.run(2, &tool("python3")?, &[&script("browse.py"), &lab.address(2)]).await?.success()?;
    let ca = format!("ca={}", controller.hint()?);
    assert_eq!(printed.lines().collect::<Vec<_>>(), ["2346", "v=1", "enroll=2347", "mirror=2345", ca.as_str()]);
    let token = controller.token(&lab).await?;
    let _pi = start_pi(&lab, 2, folder.path(), "pi-", &token)?;
    controller.is_connected(&lab, "pi-01").await
}

#[tokio::test]
async fn old_clients_are_answered_as_they_were() -> Result<()> {
    const OK: &str = r#"10.77.0.1 {"Command":"OK","Params":{}}"#;
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(2)?;
    let _controller = Controller::start(&lab, 1, folder.path(), &["--discovery", "marcopolo"]).await?;
    for group in ["224.0.0.112", "224.0.0.113"] {
        for word in ["Request-For", "Request-for"] {
            let question = format!(r#"{{"Command": "{word}", "Params": "marcobootstrap"}}"#);
            assert_eq!(ask(&lab, 2, group, &question).await?, [OK], "{word} to {group}");
        }
    }
    let group = "224.0.0.112";
    for word in ["Marco", "Discover"] {
        let answers = ask(&lab, 2, group, &format!(r#"{{"Command": "{word}", "Params": {{}}}}"#)).await?;
        let [answer] = answers.as_slice() else { anyhow::bail!("{answers:?}") };
        let answer: serde_json::Value = serde_json::from_str(answer.trim_start_matches("10.77.0.1 "))?;
        assert_eq!(answer["Command"], "Polo");
        assert!(answer["Params"]["hostname"].as_str().is_some_and(|name| !name.is_empty()), "{answer}");
    }
    // Datagrams that the old daemon ignored, or that are malformed: an answer would be an error.
    for silence in [
        r#"{"Command": "Request-For", "Params": "statusmonitor"}"#,
        r#"{"Command": "Request-For", "Params": {"service": "marcobootstrap"}}"#,
        r#"{"Command": "Marco""#,
        "Marco",
        "",
        "\u{ff}\u{1}",
    ] {
        assert_eq!(ask(&lab, 2, group, silence).await?, [""; 0], "{silence:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_node_finds_its_own_controller_among_several() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(3)?;
    for (round, ways) in ["mdns", "marcopolo"].iter().enumerate() {
        let folder = folder.path().join(ways);
        let _foreign = Controller::start(&lab, 1, &folder, &["--discovery", ways]).await?;
        let own = Controller::start(&lab, 2, &folder, &["--discovery", ways]).await?;
        assert_eq!(found(&lab, 3).await?, ["10.77.0.1", "10.77.0.2"], "{ways}");
        let first = discover(&lab, 3, &["--first"]).await?.success()?;
        assert_eq!(first.lines().count(), 1, "{first}");
        let token = own.token(&lab).await?;
        let id = format!("pi-{round}-");
        let _pi = start_pi(&lab, 3, &folder, &id, &token)?;
        own.is_connected(&lab, &format!("{id}01")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_rogue_costs_time_and_never_trust() -> Result<()> {
    // The impostor answers the same question as the controller, and at once. In the mixed pair, it answers the method
    // that is asked first.
    for (rogue_ways, ways) in [("marcopolo", "marcopolo"), ("mdns", "marcopolo"), ("mdns", "mdns")] {
        let folder = tempfile::tempdir()?;
        let lab = Lab::new(3)?;
        let controller = Controller::start(&lab, 1, folder.path(), &["--discovery", ways]).await?;
        let token = controller.token(&lab).await?;
        let (_rogue, log) = start_rogue(&lab, 2, folder.path(), &controller.hint()?, rogue_ways).await?;
        let answerers = found(&lab, 3).await?;
        assert_eq!(answerers, ["10.77.0.1", "10.77.0.2"], "{rogue_ways}, {ways}");

        let enrolled = enroll(&lab, 3, folder.path(), "pi-enrolled", &token).await?;
        let shown = format!("{rogue_ways}, {ways}: {enrolled:?}");
        assert_eq!(enrolled.success().context(shown.clone())?, "nodes/pi-enrolled is enrolled\n", "{shown}");
        let _pi = start_pi(&lab, 3, folder.path(), "pi-", &token)?;
        controller.is_connected(&lab, "pi-01").await?;
        let met = fs::read_to_string(log)?;
        // The control: the impostor must have been reached, otherwise the test proves nothing.
        if rogue_ways != ways {
            assert!(met.contains("connection from 10.77.0.3"), "the rogue was never asked: {met}");
        }
        assert!(!met.contains("handshake done"), "{met}");
    }
    Ok(())
}

#[tokio::test]
async fn a_network_that_comes_up_later_is_asked_then() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(2)?;
    // The cables are out before the programs start, as on a network that comes up late.
    lab.unplug(1)?;
    let controller = Controller::start(&lab, 1, folder.path(), &[]).await?;
    let token = controller.token(&lab).await?;
    lab.unplug(2)?;
    let mut pi = start_pi(&lab, 2, folder.path(), "pi-", &token)?;
    let log = folder.path().join("pi-.log");
    wait_until(SETTLE, "the agent finds nobody", async || {
        Ok(fs::read_to_string(&log)?.contains("none was found on the network").then_some(()))
    })
    .await?;
    pi.check_alive()?;
    let asked = |log: &Path| -> Result<bool> { Ok(fs::read_to_string(log)?.contains("the network was asked")) };
    assert!(!asked(&log)?, "time is lost in asking a network that is down");
    lab.plug(1)?;
    lab.plug(2)?;
    controller.is_connected(&lab, "pi-01").await
}

#[tokio::test]
async fn controllers_of_one_machine_share_the_port_and_one_that_cannot_goes_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lab = Lab::new(3)?;
    let _one = Controller::start(&lab, 1, folder.path(), &[]).await?;
    let ports = ["--listen", "[::]:2346", "--enroll-listen", "[::]:2347", "--mirror-listen", "[::]:2345"];
    let other = Controller::start(&lab, 1, folder.path(), &ports).await?;
    let question = r#"{"Command": "Request-For", "Params": "marcobootstrap"}"#;
    assert_eq!(ask(&lab, 3, "224.0.0.112", question).await?.len(), 2);
    assert!(!other.log()?.contains("WARN"), "{}", other.log()?);

    // Another program binds the port without sharing it.
    let hold = "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('', 1337))\n\
                print('held', flush=True)\ntime.sleep(600)";
    let log = folder.path().join("holder.log");
    let _holder = lab.recipe(2, &tool("python3")?, &["-c", hold], log.clone())?.start()?;
    wait_until(SETTLE, "the port is held", async || Ok(fs::read_to_string(&log)?.contains("held").then_some(())))
        .await?;
    let without = Controller::start(&lab, 2, folder.path(), &[]).await?;
    wait_until(SETTLE, "it says what it cannot do", async || Ok(without.log()?.contains("UDP 1337").then_some(())))
        .await?;
    let found = found(&lab, 3).await?;
    ensure!(found.contains(&lab.address(2)), "mDNS does not work either: {found:?}");
    assert_eq!(without.log()?.matches("WARN").count(), 1, "{}", without.log()?);
    Ok(())
}
