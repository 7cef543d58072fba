//! The scripts around the tests, on what cargo really prints.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result};
use integration_tests::process::workspace;

/// A workspace whose packages have a target of one name. Of its tests two fail in one target, one fails alone, one
/// aborts, and one is a doc test.
const FILES: [(&str, &str); 8] = [
    ("Cargo.toml", "[workspace]\nresolver = \"2\"\nmembers = [\"one\", \"other\"]\n"),
    ("one/Cargo.toml", "[package]\nname = \"one\"\nversion = \"0.1.0\"\nedition = \"2021\"\n"),
    (
        "one/src/lib.rs",
        "/// ```\n/// panic!();\n/// ```\npub fn documented() {}\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn fails() {\n        \
         panic!();\n    }\n    #[test]\n    fn passes() {}\n}\n",
    ),
    ("one/tests/aborts.rs", "#[test]\nfn aborts() {\n    std::process::abort();\n}\n"),
    ("one/tests/same.rs", "#[test]\nfn passes() {}\n"),
    ("other/Cargo.toml", "[package]\nname = \"other\"\nversion = \"0.1.0\"\nedition = \"2021\"\n"),
    ("other/src/lib.rs", ""),
    (
        "other/tests/same.rs",
        "#[test]\nfn first() {\n    panic!();\n}\n#[test]\nfn passes() {}\n#[test]\nfn second() {\n    panic!();\n}\n",
    ),
];

#[allow(clippy::disallowed_methods, reason = "scripts of this repository, run by a test without a runtime")]
fn program(name: impl AsRef<std::ffi::OsStr>) -> Command {
    Command::new(name)
}

/// Runs a line of shell in this folder, in which `$CARGO` is this cargo.
fn shell(folder: &Path, line: &str) -> Result<Output> {
    let mut command = program("sh");
    command.args(["-c", line]).current_dir(folder);
    command.env("CARGO", std::env::var_os("CARGO").context("not run by cargo")?);
    Ok(command.env("CARGO_TARGET_DIR", folder.join("target")).env("RUST_BACKTRACE", "0").output()?)
}

fn failed_tests(log: &Path) -> Result<String> {
    let output = program(workspace().join("scripts/failed-tests.sh")).arg(log).output()?;
    anyhow::ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn each_test_that_failed_is_named_with_the_command_that_runs_it_alone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (path, text) in FILES {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(path, text)?;
    }
    let log = dir.path().join("log");
    let ran = shell(dir.path(), "exec \"$CARGO\" test --workspace --offline --no-fail-fast > log 2>&1")?;
    assert!(!ran.status.success(), "{ran:?}");
    let told = failed_tests(&log)?;
    let commands: Vec<&str> = told.lines().filter_map(|line| line.strip_prefix("  cargo ")).collect();
    let expected = [
        "test -p one --lib -- tests::fails --exact",
        // An aborted run names no test.
        "test -p one --test aborts",
        "test -p other --test same -- first --exact",
        "test -p other --test same -- second --exact",
        "test -p one --doc -- \"one/src/lib.rs - documented (line 1)\"",
    ];
    assert_eq!(commands, expected, "{told}\nof\n{}", fs::read_to_string(&log)?);
    for command in commands {
        // Options of cargo stand before the two dashes.
        let (cargo, test) = command.split_once(" -- ").unwrap_or((command, ""));
        let alone = shell(dir.path(), &format!("\"$CARGO\" {cargo} --offline -- {test}"))?;
        let said = String::from_utf8_lossy(&alone.stdout);
        assert!(!alone.status.success() && said.contains("running 1 test\n"), "{command}: {alone:?}");
    }
    Ok(())
}

#[test]
fn nothing_is_said_when_nothing_failed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    fs::write(
        &log,
        "     Running tests/a.rs (target/debug/deps/a-1)\n\nrunning 1 test\ntest b ... ok\n\ntest result: ok. 1 passed\n",
    )?;
    assert_eq!(failed_tests(&log)?, "");
    Ok(())
}
