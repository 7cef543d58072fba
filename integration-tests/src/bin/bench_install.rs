//! `make bench-install`: compares the steps of the 2015 installer (wget from the mirror, gunzip, tar, sync) with the
//! agent's installation of the same root file system, in one run.
#![allow(clippy::print_stdout, reason = "what it prints is the point of it")]

#[path = "bench_install/bed.rs"]
mod bed;
#[path = "bench_install/rootfs.rs"]
mod rootfs;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bed::{Bed, Kind};
use chrono::{DateTime, Utc};
use integration_tests::fleet::update;
use integration_tests::process::{Process, Recipe, binary};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact;
use tokio::process::Command;

const USAGE: &str = "usage: marco-bench-install [--bytes N] [--runs N] [--rate BYTES_PER_SECOND] [--mirror HOST:PORT]";
/// Timeout of one installation.
const LIMIT: Duration = seconds(900);

struct Options {
    bytes: u64,
    runs: usize,
    rate: u64,
    /// `HOST:PORT` of another server than the controller's mirror. It has the controller's certificate, and the image
    /// under /tar.
    mirror: Option<String>,
}

/// Cost of one installation.
#[derive(Debug, Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
    /// Bytes written to the device; `None` on tmpfs.
    written: Option<u64>,
    peak_disk: u64,
    /// Peak memory of the agent in bytes; 0 for the steps of 2015.
    memory: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    match bench().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("the bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options { bytes: 600_000_000, runs: 3, rate: 15_000_000, mirror: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().context(USAGE)?;
        match flag.as_str() {
            "--bytes" => options.bytes = value.parse().context(USAGE)?,
            "--runs" => options.runs = value.parse().context(USAGE)?,
            "--rate" => options.rate = value.parse().context(USAGE)?,
            "--mirror" => options.mirror = Some(value),
            _ => bail!(USAGE),
        }
    }
    Ok(options)
}

async fn bench() -> Result<()> {
    let options = options()?;
    ensure!(rustix::process::geteuid().is_root(), "mounting file systems needs root");
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let dir = fleet.dir().to_owned();
    println!("making a root file system of this machine's /usr");
    let images = rootfs::make(&dir, options.bytes).await?;
    let megabytes = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.len() / 1_000_000);
    println!(
        "{} MB in {} files; {} MB as .tar.gz, {} MB as .tar.zst",
        images.size / 1_000_000,
        images.files,
        megabytes(&images.gzip)?,
        megabytes(&images.zstd)?
    );
    for (name, file) in [("bench", &images.gzip), ("bench-zstd", &images.zstd)] {
        push(&mut fleet.artifacts(), name, artifact::Kind::Image, artifact::Purpose::Unspecified, file).await?;
    }
    let mirror = options.mirror.clone().unwrap_or_else(|| fleet.addresses().mirror.to_string());
    for kind in [Kind::Tmpfs, Kind::Card(options.rate)] {
        let mut costs: [Vec<Cost>; 3] = Default::default();
        let [old, gzip, zstd] = &mut costs;
        for run in 0..options.runs {
            // Alternating runs spread the machine's other load over all three alike.
            let bed = Bed::new(&dir, kind).await?;
            old.push(steps_of_2015(&bed, &mirror, &fleet.certs()).await.context("the steps of 2015")?);
            bed.remove().await?;
            for (image, costs) in [("bench", &mut *gzip), ("bench-zstd", &mut *zstd)] {
                let bed = Bed::new(&dir, kind).await?;
                let place = if kind == Kind::Tmpfs { "t" } else { "c" };
                let cost = our_own(&fleet, &bed, &format!("{place}{run}-{image}-"), image).await;
                costs.push(cost.with_context(|| format!("installing {image}"))?);
                bed.remove().await?;
            }
        }
        show(kind, &costs);
    }
    fleet.went_well();
    Ok(())
}

/// Installs on the mounted card with the steps of the 2015 installer.
async fn steps_of_2015(bed: &Bed, mirror: &str, certs: &Path) -> Result<Cost> {
    // The counter of the device also has the writes of making the file system, so the difference counts.
    let (written, peak) = (bed.written()?, bed.watch()?);
    let script = format!(
        "set -e; cd '{bed}'; TIMEFORMAT='%3R %3U %3S'; time {{ \
         wget -q --certificate '{certs}/admin.crt' --private-key '{certs}/admin.key' --ca-certificate '{certs}/ca.crt' \
         'https://{mirror}/tar/bench.tar.gz'; gunzip -f bench.tar.gz; mkdir root; \
         tar -xf bench.tar -C root; sync -f .; }}",
        bed = bed.folder().display(),
        certs = certs.display(),
    );
    // bash, because its `time` prints user and system time of the whole pipeline.
    let output = Command::new("bash").args(["-c", &script]).output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    let times: Vec<f64> = said.lines().last().context("no times")?.split(' ').filter_map(|t| t.parse().ok()).collect();
    let [wall, user, system] = times.as_slice() else { bail!("no times: {said}") };
    let written = bed.written()?.zip(written).map(|(after, before)| after - before);
    Ok(Cost { wall: *wall, cpu: user + system, written, peak_disk: peak.end().await?, memory: 0 })
}

/// Updates a virtual Pi on this file system with the real agent. The wall time comes from the agent's log: from the
/// installer's connection for the image to the end of the sync. All other figures cover the whole update, with the
/// installer's boot files and the reboot into the installer.
async fn our_own(fleet: &Fleet, bed: &Bed, prefix: &str, image: &str) -> Result<Cost> {
    let (log, token) = (fleet.dir().join(format!("{prefix}agent.log")), fleet.dir().join("token"));
    fs::write(&token, fleet.token(1).await?)?;
    let arguments = [
        ("--dir", bed.folder().join("pis").display().to_string()),
        ("--count", "1".to_owned()),
        ("--prefix", prefix.to_owned()),
        ("--controller", fleet.addresses().api.to_string()),
        ("--enroll", fleet.addresses().enroll.to_string()),
        ("--token-file", token.display().to_string()),
    ];
    let arguments = arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    let mut agent: Process =
        Recipe::new(binary("marco-agent")?, ["simulate".to_owned()].into_iter().chain(arguments), log.clone())
            .start()?;
    let id = wait_until(seconds(60), "the virtual Pi is connected", async || {
        let nodes = fleet.list_nodes().await?;
        let node = nodes.into_iter().find(|node| node.connected && node.name.contains(prefix));
        Ok(node.map(|node| node.name.trim_start_matches("nodes/").to_owned()))
    })
    .await?;
    let pid = agent.id().context("the agent is gone")?;
    let (cpu, written, peak) = (cpu(pid)?, bed.written()?, bed.watch()?);
    let operation = fleet.create(update(&[id], image, "")).await?;
    let began = said_at(&log, "phase=\"connecting\"").await?;
    let ended = said_at(&log, "installed execution").await?;
    let cost = Cost {
        wall: (ended - began).as_seconds_f64(),
        cpu: self::cpu(pid)? - cpu,
        written: bed.written()?.zip(written).map(|(after, before)| after - before),
        peak_disk: peak.end().await?,
        memory: highest_memory(pid)?,
    };
    fleet.ends(&operation.name, LIMIT, marco_proto::v1::operation::State::Succeeded).await?;
    agent.terminate(seconds(30)).await?;
    Ok(cost)
}

/// Time of the first log line that contains `words`; waits for it.
async fn said_at(log: &Path, words: &str) -> Result<DateTime<Utc>> {
    let line = wait_until(LIMIT, &format!("the agent says {words}"), async || {
        let text = tokio::fs::read_to_string(log).await?;
        // Otherwise the wait would last until its timeout.
        ensure!(!text.contains("installation failed"), "{text}");
        Ok(text.lines().find(|line| line.contains(words)).map(str::to_owned))
    })
    .await?;
    let time = line.split_whitespace().next().context("a line without a time")?;
    Ok(DateTime::parse_from_rfc3339(time)?.to_utc())
}

/// Seconds of processor time of a process, in user and kernel mode (proc(5): utime and stime).
fn cpu(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name and may contain blanks; it ends at the last parenthesis.
    let (_, numbers) = text.rsplit_once(") ").context("no statistics of the agent")?;
    let ticks: u32 = numbers.split(' ').skip(11).take(2).filter_map(|word| word.parse::<u32>().ok()).sum();
    // USER_HZ is 100 on every architecture that these tools run on.
    Ok(f64::from(ticks) / 100.0)
}

/// Peak memory of a process in bytes.
fn highest_memory(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no highest memory")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

fn median(costs: &[Cost], of: impl Fn(&Cost) -> f64) -> f64 {
    let mut values: Vec<f64> = costs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    // The median, because a single slow run says more about the machine than about the installer.
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[expect(clippy::as_conversions, reason = "megabytes for people")]
fn show(kind: Kind, [old, gzip, zstd]: &[Vec<Cost>; 3]) {
    let place = match kind {
        Kind::Tmpfs => "tmpfs".to_owned(),
        Kind::Card(rate) => format!("ext4 on a disk that writes {} MB/s", rate / 1_000_000),
    };
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!("\n{place}, medians of {} runs", old.len());
    println!("{:24}{:>14}{:>22}{:>22}", "", "steps of 2015", "marco-agent, gzip", "marco-agent, zstd");
    let row = |what: &str, of: &dyn Fn(&Cost) -> f64| {
        let base = median(old, of);
        let mut line = format!("{what:24}{base:>14.2}");
        for costs in [gzip, zstd] {
            let value = median(costs, of);
            line.push_str(&format!("{:>22}", format!("{value:.2} ({:.2})", value / base)));
        }
        println!("{line}");
    };
    row("wall, s", &|cost| cost.wall);
    row("processor, s", &|cost| cost.cpu);
    if old.iter().all(|cost| cost.written.is_some()) {
        row("written, MB", &|cost| cost.written.map_or(f64::NAN, mb));
    }
    row("peak of the disk, MB", &|cost| mb(cost.peak_disk));
    let memory = |costs: &[Cost]| median(costs, |cost| mb(cost.memory));
    println!("{:24}{:>14}{:>22.1}{:>22.1}", "peak of memory, MB", "-", memory(gzip), memory(zstd));
}
