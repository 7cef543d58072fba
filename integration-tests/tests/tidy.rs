//! Rules of the code base: allowed dependencies between modules, file sizes and names. If a rule prevents something
//! good, change it here and give the reason in `docs/decisions/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use integration_tests::process::workspace;
use integration_tests::tree::list;

/// Modules that assemble the others and may use all of them.
const ROOTS: [&str; 3] = ["main", "lib", "config"];

/// Modules that depend on no other of ours, and that every module may use.
const ANYBODYS: [&str; 9] =
    ["backoff", "calendar", "cause", "durable", "folders", "listen", "notify", "settings", "step"];

/// Allowed dependencies of the controller's modules.
const CONTROLLER: [(&str, &[&str]); 15] = [
    ("api", &["identity", "store", "sessions", "artifacts", "operation", "rollout", "schedule", "clock", "watchdog"]),
    ("artifacts", &[]),
    ("clock", &[]),
    ("discovery", &[]),
    ("dispatcher", &["store", "sessions", "clock", "operation", "rollout", "watchdog"]),
    ("identity", &["store", "clock"]),
    ("mirror", &["identity", "artifacts", "store"]),
    ("operation", &[]),
    ("rollout", &[]),
    ("schedule", &[]),
    ("scheduler", &["store", "schedule", "clock", "watchdog"]),
    ("sessions", &["operation", "store"]),
    // Opened first by the root: the database and the certificates.
    ("startup", &["clock", "config", "identity", "store"]),
    ("store", &["operation", "rollout", "schedule"]),
    ("watchdog", &["store", "sessions"]),
];

/// Allowed dependencies of the agent's modules.
const AGENT: [(&str, &[&str]); 17] = [
    ("bootpart", &["system"]),
    ("discovery", &[]),
    ("download", &[]),
    ("executor", &["journal", "job", "system", "bootpart", "download", "install"]),
    ("health", &[]),
    ("identity", &["discovery", "system"]),
    ("init", &[]),
    ("install", &["discovery", "identity", "session", "download", "system", "bootpart", "job", "supervise"]),
    ("job", &[]),
    ("journal", &["health", "job"]),
    ("logbook", &["bootpart", "system"]),
    ("network", &["system"]),
    (
        "run",
        &[
            "discovery",
            "identity",
            "session",
            "journal",
            "job",
            "executor",
            "health",
            "system",
            "download",
            "config",
            "install",
            "bootpart",
        ],
    ),
    ("session", &["discovery", "health", "identity", "journal", "job", "system"]),
    ("simulate", &["run", "system", "config", "discovery", "identity"]),
    ("supervise", &[]),
    // The virtual Pi lays out its card with the code that writes real cards.
    ("system", &["bootpart", "health", "supervise"]),
];

/// Words confined to some places: the word, the package, and the modules or files that may contain it.
const KEPT: [(&str, &str, &[&str]); 8] = [
    ("marco_proto::v1", "controller", &["api"]),
    ("marco_proto::v1", "node-agent", &["session", "identity", "download"]),
    ("sea_orm", "controller", &["store"]),
    ("tokio::process", "node-agent", &["system"]),
    ("tokio::process", "controller", &[]),
    // PID 1 of an initramfs reaps every process, also those that tokio waits for, so it starts processes itself. That of a
    // system on trial has no runtime.
    ("std::process::Command", "node-agent", &["init", "supervise"]),
    ("Utc::now", "controller", &["clock"]),
    // Ends the present session whatever its epoch. A sweep knows an older picture, so it calls `end_one`.
    ("sessions.end(", "controller", &["api/node.rs"]),
];

/// Lines of the log that these files write without `of_peer!`, which cuts and limits what a peer brings about. They hold
/// no text of a peer, and none can have them written at will: by the operators' changes, at the start, by the clock.
const OWN_LINES: [(&str, usize); 13] = [
    ("api/agent/unstored.rs", 2),
    ("api/artifact.rs", 1),
    ("api/artifact/bytes.rs", 4),
    ("api/artifact/judge.rs", 4),
    ("api/node.rs", 1),
    ("api/operation.rs", 1),
    // Calls that panicked.
    ("api/peers.rs", 1),
    ("identity/calls.rs", 2),
    ("identity/expiry.rs", 2),
    ("identity/peer_log.rs", 1),
    // `log`, which asks `may_log` itself.
    ("identity/record.rs", 1),
    // Once for each shortage of files, and for a handshake that panicked.
    ("identity/tls/incoming.rs", 2),
    ("identity/upkeep.rs", 6),
];

/// Names without meaning, which collect unrelated code.
const EMPTY_NAMES: [&str; 8] = ["common", "core", "helper", "helpers", "misc", "models", "util", "utils"];

/// A source file: its path below `src`, and its code without comments and tests.
struct Source {
    path: PathBuf,
    code: String,
}

impl Source {
    /// The top-level module that the file belongs to.
    fn module(&self) -> String {
        let first = self.path.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
        first.unwrap_or_default().trim_end_matches(".rs").to_owned()
    }
}

fn sources(package: &str) -> Result<Vec<Source>> {
    let folder = workspace().join(package).join("src");
    let root = fs::read_to_string(folder.join("lib.rs"))?;
    // Modules that `lib.rs` declares for tests only may use everything.
    let (_, for_tests) = split_tests(&root);
    let mut sources = Vec::new();
    for path in list(&folder)? {
        let is_test = path.iter().map(|part| part.to_string_lossy()).any(|part| {
            let name = part.trim_end_matches(".rs");
            name == "tests" || for_tests.iter().any(|module| module == name)
        });
        if path.extension().is_some_and(|ending| ending == "rs") && !is_test {
            let (code, _) = split_tests(&fs::read_to_string(folder.join(&path))?);
            sources.push(Source { path, code });
        }
    }
    Ok(sources)
}

/// Splits off comments and tests. Returns the code, and the names of the modules that exist for tests only.
fn split_tests(text: &str) -> (String, Vec<String>) {
    let (mut code, mut for_tests) = (Vec::new(), Vec::new());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            code.push(line.split("//").next().unwrap_or_default());
            continue;
        }
        // A test module in its own file is one line; an inline one ends the file.
        let module = lines.next().and_then(|next| next.trim().strip_suffix(';'));
        match module.and_then(|declaration| declaration.rsplit(' ').next()) {
            Some(name) => for_tests.push(name.to_owned()),
            None => break,
        }
    }
    (code.join("\n"), for_tests)
}

/// The top-level modules that follow a prefix such as `crate::` in code.
fn named_after(prefix: &str, code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        // The prefix may also be the end of a longer name, such as `mycrate::`.
        let (before, after) = code.split_at(at);
        let alone = before.chars().next_back().is_none_or(|last| !last.is_alphanumeric() && last != '_');
        let rest = after.strip_prefix(prefix).unwrap_or_default();
        if !alone {
            continue;
        }
        match rest.strip_prefix('{') {
            Some(group) => found.extend(first_words_of_group(group)),
            None => found.extend(first_word(rest)),
        }
    }
    found
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    // A capitalised word is a type of the crate's root, not a module.
    (!word.is_empty() && word.starts_with(char::is_lowercase)).then_some(word)
}

/// The first words of a group: `a, b::c, d::{e, f}}; ...` gives a, b and d.
fn first_words_of_group(group: &str) -> Vec<String> {
    let (mut depth, mut at_start, mut words) = (1, true, Vec::new());
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => at_start = true,
            _ if character.is_whitespace() => {}
            _ => {
                if at_start && depth == 1 {
                    words.extend(first_word(group.split_at(at).1));
                }
                at_start = false;
            }
        }
        if depth == 0 {
            break;
        }
    }
    words
}

/// All uses of modules that the table does not allow.
fn forbidden(sources: &[Source], allowed: &[(&str, &[&str])]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        let own = source.module();
        if ROOTS.contains(&own.as_str()) {
            continue;
        }
        let may = match allowed.iter().find(|(module, _)| *module == own) {
            Some((_, may)) => may,
            None if ANYBODYS.contains(&own.as_str()) => &[].as_slice(),
            None => {
                found.push(format!("{}: module {own} is not in the table", source.path.display()));
                continue;
            }
        };
        for used in named_after("crate::", &source.code) {
            // Names that are no module of the table are the crate's own types and functions.
            let is_module = allowed.iter().any(|(module, _)| *module == used) || ROOTS.contains(&used.as_str());
            if is_module && used != own && !may.contains(&used.as_str()) {
                found.push(format!("{}: {own} knows {used}", source.path.display()));
            }
        }
    }
    found
}

#[test]
fn who_may_know_whom_is_held_in_the_controller() -> Result<()> {
    let sources = sources("controller")?;
    // If the sources move, the search finds nothing and would pass.
    assert!(sources.len() > 5, "the sources are somewhere else");
    let found = forbidden(&sources, &CONTROLLER);
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

#[test]
fn who_may_know_whom_is_held_in_the_agent() -> Result<()> {
    let sources = sources("node-agent")?;
    assert!(sources.len() > 5, "the sources are somewhere else");
    let found = forbidden(&sources, &AGENT);
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

#[test]
fn controller_and_agent_do_not_know_each_other() -> Result<()> {
    for (package, others) in [
        ("controller", ["node_agent", "node-agent"].as_slice()),
        ("node-agent", &["marco_controller", "marco-controller"]),
        ("marcoctl", &["node-agent", "marco-controller"]),
        ("archive", &["node-agent", "marco-controller", "marco-proto"]),
    ] {
        let manifest = fs::read_to_string(workspace().join(package).join("Cargo.toml"))?;
        // Dev-dependencies follow this section, so that they are checked too.
        let (_, dependencies) = manifest.split_once("[dependencies]").context("no dependencies")?;
        for other in others {
            assert!(!dependencies.contains(other), "{package} depends on {other}");
        }
    }
    Ok(())
}

#[test]
fn what_belongs_to_one_place_stays_there() -> Result<()> {
    let mut found = Vec::new();
    for (word, package, places) in KEPT {
        for source in sources(package)? {
            let own = source.module();
            let at_home = places.iter().any(|place| own == *place || source.path == Path::new(place));
            if !at_home && source.code.contains(word) {
                found.push(format!("{package}/src/{}: {word}", source.path.display()));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

/// Otherwise a peer fills the disk with lines, or writes into an operator's terminal.
#[test]
fn lines_about_peers_are_cut_and_limited() -> Result<()> {
    let mut written = Vec::new();
    for source in sources("controller")?.iter().filter(|s| ["api", "identity", "mirror"].contains(&&*s.module())) {
        let count: usize = ["info!(", "warn!(", "error!("].iter().map(|line| source.code.matches(line).count()).sum();
        if count > 0 {
            written.push((source.path.display().to_string(), count));
        }
    }
    written.sort();
    let allowed = OWN_LINES.map(|(file, count)| (file.to_owned(), count));
    assert_eq!(written, allowed, "use of_peer! and cut(), or say in OWN_LINES why no peer brings the line about");
    Ok(())
}

/// Postgres may abort a transaction in favour of another one (`40001`, `40P01`). Then its beginner must retry it, so
/// each transaction is in a function `..._once`, which only its retry loop calls.
#[test]
fn every_transaction_of_the_store_is_one_that_is_done_again() -> Result<()> {
    let (mut begun, mut found) = (0, Vec::new());
    for source in sources("controller")?.iter().filter(|source| source.module() == "store") {
        for (at, _) in source.code.match_indices("self.begin()") {
            begun += 1;
            let before = source.code.get(..at).unwrap_or_default();
            let name = before.rsplit_once("fn ").and_then(|(_, rest)| rest.split(['(', '<']).next());
            if !name.is_some_and(|name| name.ends_with("_once")) {
                found.push(format!("{}: {name:?}", source.path.display()));
            }
        }
        // A public `..._once` could be called without its retry loop.
        for (at, _) in source.code.match_indices("_once(") {
            let before = source.code.get(..at).unwrap_or_default();
            let line = before.lines().next_back().unwrap_or_default();
            if line.contains("pub") {
                found.push(format!("{}: others call {line}", source.path.display()));
            }
        }
    }
    assert!(begun > 50, "{begun} were found");
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

/// After an outage nobody could be heard. So each function of the store that takes silence for something asks the guard.
#[test]
fn silence_counts_only_where_the_guard_was_asked() -> Result<()> {
    let (mut judging, mut found) = (0, Vec::new());
    for source in sources("controller")?.iter().filter(|source| source.module() == "store") {
        for function in source.code.split("fn ").skip(1) {
            let name = function.split(['(', '<']).next().unwrap_or_default();
            // A deadline that is over, and a node or a controller that is away for so long.
            let silent = ["deadline <= ?", "deadline) <= ?", "disconnect_time <= ?", "goodbye_time <= ?"];
            let dead = function.contains("NOT EXISTS") && function.contains("self.lives(");
            if !dead && !silent.iter().any(|word| function.contains(word)) {
                continue;
            }
            judging += 1;
            // `Gone` is made by the guard.
            if !["self.may_judge(", "gone: Gone"].iter().any(|guard| function.contains(guard)) {
                found.push(format!("{}: {name}", source.path.display()));
            }
        }
    }
    assert!(judging >= 5, "{judging} were found");
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

#[test]
fn files_are_short_and_lie_where_their_names_say() -> Result<()> {
    let root = workspace();
    let mut found = Vec::new();
    for package in ["archive", "controller", "integration-tests", "marcoctl", "node-agent", "proto", "syscalls"] {
        for path in list(&root.join(package))? {
            if path.extension().is_none_or(|ending| ending != "rs") {
                continue;
            }
            let shown = format!("{package}/{}", path.display());
            let lines = fs::read_to_string(root.join(package).join(&path))?.lines().count();
            if lines > 500 {
                found.push(format!("{shown} has {lines} lines: split it"));
            }
            // Two conventions for one thing would make files harder to find.
            if path.file_name().is_some_and(|name| name == "mod.rs") {
                found.push(format!("{shown}: name it after its folder, beside it"));
            }
            let empty = path
                .iter()
                .map(|part| part.to_string_lossy())
                .find(|part| EMPTY_NAMES.contains(&part.trim_end_matches(".rs")));
            if let Some(name) = empty {
                found.push(format!("{shown}: {name} says nothing"));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

#[test]
fn no_package_has_a_name_that_says_nothing() -> Result<()> {
    let manifest = fs::read_to_string(workspace().join("Cargo.toml"))?;
    let members = manifest.lines().find(|line| line.starts_with("members")).context("no members")?;
    for package in members.split('"').skip(1).step_by(2) {
        let own = fs::read_to_string(workspace().join(package).join("Cargo.toml"))?;
        let name = own.lines().find_map(|line| line.strip_prefix("name = ")).context("no name")?.trim_matches('"');
        assert!(!EMPTY_NAMES.iter().any(|empty| name.split('-').any(|part| part == *empty)), "{name}");
    }
    Ok(())
}

#[test]
fn uses_are_found_however_they_are_written() {
    let (code, for_tests) = split_tests(
        "use crate::store::Store;\n#[cfg(test)]\nmod testing;\n\
         use crate::{clock::Clock, operation::{Action, Update}, Root};\n\
         // crate::comment::No\nfn f() { crate::api::g(); mycrate::other::h(); }\n\
         #[cfg(test)]\nmod tests { use crate::tests_only::T; }\n",
    );
    assert_eq!(for_tests, ["testing"]);
    let found: Vec<String> = named_after("crate::", &code).into_iter().collect();
    assert_eq!(found, ["api", "clock", "operation", "store"]);

    let source = Source { path: PathBuf::from("operation/state.rs"), code: "use crate::store::Store;".to_owned() };
    assert_eq!(forbidden(&[source], &CONTROLLER), ["operation/state.rs: operation knows store"]);
    let source = Source { path: PathBuf::from("helpers.rs"), code: String::new() };
    assert_eq!(forbidden(&[source], &CONTROLLER), ["helpers.rs: module helpers is not in the table"]);
}
