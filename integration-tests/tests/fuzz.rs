//! Mutation tests for readers of untrusted input. Each loop changes good examples at random for FUZZ_SECONDS (1 here,
//! 60 in `make fuzz`) and reports its progress. Panics, endless loops and files outside the root are failures; accepted
//! input is none.

use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use chrono::DateTime;
use integration_tests::tree::list;
use integration_tests::{hostile, image};
use marco_archive::config_txt::{Conditions, ConfigTxt};
use marco_archive::{check_zip, unpack_tar, unpack_zip};
use marco_controller::schedule::Recurrence;
use marco_proto::v1::artifact::Kind;
use node_agent::identity::{JoinFile, JoinToken};

/// No input of a few kilobytes may take longer, on any machine.
const STUCK: Duration = Duration::from_secs(10);

/// xorshift64: reproducible variety, not secrecy.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit.max(1)).unwrap_or(u64::MAX)).unwrap_or_default()
    }

    /// Changes a few bytes; copies, removes or repeats pieces; or inserts a meaningful word.
    fn change(&mut self, bytes: &mut Vec<u8>, words: &[&[u8]]) {
        for _ in 0..=self.below(4) {
            let (at, other) = (self.below(bytes.len()), self.below(bytes.len()));
            let length = self.below(64).min(bytes.len() - at.max(other));
            match self.below(6) {
                0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << self.below(8)),
                1 => bytes.iter_mut().skip(at).take(length).for_each(|byte| *byte = self.next().to_le_bytes()[0]),
                2 => bytes.copy_within(other..other + length, at),
                3 => drop(bytes.drain(at..at + length)),
                4 => {
                    let piece = bytes.get(other..other + length).unwrap_or_default().to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => {
                    let word = words.get(self.below(words.len())).copied().unwrap_or_default();
                    let end = (at + word.len()).min(bytes.len());
                    bytes.splice(at..end, word.iter().copied());
                }
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
    }
}

/// Feeds mutated examples to a reader. `words`: meaningful pieces of its format.
fn fuzz(what: &str, examples: &[Vec<u8>], words: &[&[u8]], mut read: impl FnMut(&[u8]) -> Result<bool>) -> Result<()> {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(u64::try_from(seed)?);
    // xorshift stays 0 forever if it is seeded with 0.
    let mut random = Random(seed | 1);
    let (begun, mut rounds, mut taken) = (Instant::now(), 0_u64, 0_u64);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let mut input = examples.get(random.below(examples.len())).context("an example")?.clone();
        random.change(&mut input, words);
        let started = Instant::now();
        let again = format!("{what}: FUZZ_SEED={seed}, round {rounds}");
        // A panic must not end the loop before the input is saved.
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(&input)));
        let kept = || keep(what, &input);
        match read {
            Ok(Ok(well)) => taken += u64::from(well),
            Ok(Err(error)) => anyhow::bail!("{again}: {error:#}; the input is {}", kept()),
            Err(_) => anyhow::bail!("{again}: it panicked; the input is {}", kept()),
        }
        ensure!(started.elapsed() < STUCK, "{again}: it took {:?}; the input is {}", started.elapsed(), kept());
        rounds += 1;
    }
    #[allow(clippy::print_stdout, reason = "a measurement")]
    {
        println!("{what}: {rounds} inputs, {taken} of them taken, seed {seed}");
    }
    ensure!(rounds > 10, "{what}: only {rounds} inputs were tried");
    Ok(())
}

/// Saves an input, and returns its path.
fn keep(what: &str, input: &[u8]) -> String {
    let path = std::env::temp_dir().join(format!("marco-fuzz-{}", what.replace(' ', "-")));
    let written = std::fs::write(&path, input);
    written.map_or_else(|error| error.to_string(), |()| path.display().to_string())
}

/// Unpacks into a folder, and fails if any file appeared outside it.
fn stays_inside(unpack: impl FnOnce(&Path) -> bool) -> Result<bool> {
    let place = tempfile::tempdir()?;
    let root = place.path().join("a/b/root");
    std::fs::create_dir_all(&root)?;
    let well = unpack(&root);
    let strays: Vec<_> = list(place.path())?.into_iter().filter(|path| !path.starts_with("a/b/root")).collect();
    // The two strays are the folders `a` and `a/b` above the root.
    ensure!(strays.len() == 2, "it wrote {strays:?}");
    Ok(well)
}

fn archives(kind: Kind) -> Result<Vec<Vec<u8>>> {
    let small = |case: &hostile::Hostile| case.kind == kind && case.bytes.len() < 64 << 10;
    Ok(hostile::archives()?.into_iter().filter(small).map(|case| case.bytes).collect())
}

/// Corrects the checksums of headers. Without this hardly any mutation gets past the first check.
fn reseal(bytes: &mut [u8]) {
    for header in bytes.chunks_exact_mut(512) {
        if header.get(257..262) == Some(b"ustar") {
            header.iter_mut().skip(148).take(8).for_each(|byte| *byte = b' ');
            let sum: u32 = header.iter().copied().map(u32::from).sum();
            let digits = format!("{sum:06o}\0 ").into_bytes();
            header.iter_mut().skip(148).zip(digits).for_each(|(byte, digit)| *byte = digit);
        }
    }
}

#[test]
fn tarballs_stay_in_their_root() -> Result<()> {
    let words: [&[u8]; 9] = [
        b"../",
        b"/",
        b"ustar\x0000",
        b"00000000000\0",
        b"77777777777\0",
        b"\x80\xff",
        b"1",
        b"2",
        b"30 path=../../x\n",
    ];
    fuzz("tarballs", &archives(Kind::Image)?, &words, |bytes| {
        let mut bytes = bytes.to_vec();
        reseal(&mut bytes);
        // A sparse file may have any size: it takes no space.
        stays_inside(|root| unpack_tar(bytes.as_slice(), root, &mut |_| ()).is_ok())
    })
}

#[test]
fn zips_stay_in_their_root() -> Result<()> {
    let mut examples = archives(Kind::Bootcode)?;
    examples.extend(std::iter::repeat_with(|| image::make_bootcode("fuzz")).take(20).collect::<Result<Vec<_>>>()?);
    let words: [&[u8]; 8] =
        [b"../", b"/", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x08\0"];
    fuzz("zips", &examples, &words, |bytes| {
        let checked = check_zip(Cursor::new(bytes)).is_ok();
        let unpacked = stays_inside(|root| unpack_zip(Cursor::new(bytes), root).is_ok())?;
        // The check decides whether an upload is stored. Anything that passes it must also unpack on the node, and the
        // reverse.
        ensure!(checked == unpacked, "what was checked is not what is unpacked");
        Ok(checked)
    })
}

#[test]
fn config_txt_is_read_whatever_is_in_it() -> Result<()> {
    let examples =
        ["arm_64bit=1\n[pi4]\ninitramfs a followkernel\n[all]\nos_prefix=b0/\n# x\n[tryboot]\nos_prefix=b1/\n"];
    let words: [&[u8]; 6] = [b"[pi4]", b"[", b"]", b"=", b"\n", b"include x\n"];
    fuzz("config.txt", &examples.map(|text| text.as_bytes().to_vec()), &words, |bytes| {
        let config = ConfigTxt::parse(&String::from_utf8_lossy(bytes));
        let conditions = Conditions::default();
        let _ = (config.get("os_prefix", &conditions), config.initramfs(&conditions));
        Ok(!config.settings().is_empty())
    })
}

#[test]
fn crons_have_an_end() -> Result<()> {
    let examples = ["0 3 * * *", "*/15 2 1-7 * 1", "0 30 2 29 2 *", "0,30 2 L * *", "59 23 31 12 5#3"];
    let words: [&[u8]; 9] = [b"*", b"/", b"-", b",", b"L", b"W", b"#", b"?", b"99999999999"];
    let from = DateTime::from_timestamp(1_774_000_000, 0).context("a time")?;
    fuzz("crons", &examples.map(|text| text.as_bytes().to_vec()), &words, |bytes| {
        let Ok(recurrence) = Recurrence::parse(&String::from_utf8_lossy(bytes), "Europe/Madrid") else {
            return Ok(false);
        };
        let mut last = from;
        for fire in recurrence.fires_after(from).take(3) {
            ensure!(fire > last, "{fire} is not after {last}");
            last = fire;
        }
        Ok(true)
    })
}

#[test]
fn join_files_and_tokens_are_read_whatever_is_in_them() -> Result<()> {
    let examples =
        ["controllers = [\"a:1346\"]\nenroll = [\"a\"]\ntoken = \"mj1.0011223344.AAAA.BBBB\"\nname = \"pi-01\"\n"];
    let words: [&[u8]; 7] = [b"\"", b"[", b"=", b"\n", b"token", b"mj1.", b"."];
    let card = tempfile::tempdir()?;
    std::fs::create_dir(card.path().join("marco"))?;
    let file = card.path().join("marco/join.toml");
    fuzz("join files", &examples.map(|text| text.as_bytes().to_vec()), &words, |bytes| {
        std::fs::write(&file, bytes)?;
        let found = JoinFile::find(&[card.path().to_owned()]);
        if found.is_ok() {
            // A file that cannot be rewritten is an error. It must never lose its other keys.
            let _ = JoinFile::forget_token(&file);
        }
        let _ = JoinToken::parse(&String::from_utf8_lossy(bytes));
        Ok(found.is_ok())
    })
}
