//! Copies of cards, and cards that moved into another board.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Fleet, Pi};
use crate::process::{Process, Recipe, binary, run, tool};
use crate::wait::seconds;

/// A copied card in a board, run by an agent process of its own.
#[derive(Debug)]
pub struct Copied {
    /// The copy, seen from outside.
    pub pi: Pi,
    process: Process,
}

impl Copied {
    /// Kills its agent process (`-9`).
    pub async fn kill(&mut self) -> Result<()> {
        self.process.kill().await
    }
}

impl Fleet {
    /// Copies a Pi's card into another board and switches that on. Its agent talks to the controller with this number.
    /// A virtual board takes its serial number from the number in its id: `PREFIX` + `01` gets the first Pi's serial
    /// number.
    pub async fn copy_card(&self, id: &str, prefix: &str, controller: usize) -> Result<Copied> {
        let number = std::fs::read_dir(self.dir())?.count();
        let dir = self.dir().join(format!("copies-{number}"));
        let board = dir.join(format!("{prefix}01"));
        std::fs::create_dir(&dir)?;
        let (from, to) = (self.pi(id).dir().display().to_string(), board.display().to_string());
        // With modes and owners, as a real copy of a card has them.
        run(&tool("cp")?, &["-a", &from, &to], seconds(60)).await?.success()?;
        // A virtual card's device name contains the board's id. A real card's name stays the same in each board, so the
        // copy gets such a name.
        let (cmdline, plain) = (board.join("boot/cmdline.txt"), "root=/dev/mmcblk0p2");
        let words = std::fs::read_to_string(&cmdline).context("the copied command line")?;
        let words = words.split_whitespace().map(|word| if word.starts_with("root=") { plain } else { word });
        std::fs::write(&cmdline, words.collect::<Vec<_>>().join(" "))?;
        let addresses = self.controllers.get(controller).context("there is no such controller")?.addresses;
        let time = |time: Duration| format!("{}ms", time.as_millis());
        let arguments = [
            "simulate".to_owned(),
            "--count=1".to_owned(),
            format!("--dir={}", dir.display()),
            format!("--prefix={prefix}"),
            format!("--controller={}", addresses.api),
            format!("--enroll={}", addresses.enroll),
            format!("--boot-time={}", time(self.builder.boot_time)),
            format!("--shutdown-time={}", time(self.builder.shutdown_time)),
        ];
        let process = Recipe::new(binary("marco-agent")?, arguments, dir.join("agent.log")).start()?;
        Ok(Copied { pi: Pi::new(board), process })
    }
}
