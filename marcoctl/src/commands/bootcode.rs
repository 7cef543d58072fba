//! `marcoctl bootcode`.

use anyhow::Context as _;

use crate::args::{BootcodeCommand, BuildBootcode};
use crate::bootcode::{self, Built, Listed};
use crate::failure::Failure;
use crate::output::{Out, bytes, fields, table};

/// Runs the command. It needs no controller.
pub(super) async fn run(command: BootcodeCommand, out: &mut Out) -> Result<(), Failure> {
    let BootcodeCommand::Build(flags) = command;
    let built = tokio::task::spawn_blocking(move || build(&flags)).await.context("the build was given up")??;
    out.value(&built, text)
}

fn build(flags: &BuildBootcode) -> Result<Built, Failure> {
    Ok(bootcode::build(flags)?)
}

fn text(built: &Built) -> String {
    let modules = built.modules.iter().filter_map(|path| path.rsplit('/').next());
    let mut text = fields(&[
        ("bootcode", built.file.clone()),
        ("sha256", built.sha256.clone()),
        ("size", bytes(built.size)),
        ("kernel", format!("{} ({})", built.kernel, built.arch)),
        ("boards", built.boards.join(", ")),
        ("modules", modules.map(|name| name.trim_end_matches(".ko")).collect::<Vec<_>>().join(" ")),
    ]);
    let row = |file: &Listed| vec![file.name.clone(), file.size.to_string(), file.sha256.clone()];
    text.push_str(&format!("\n{}\n", table(&["FILE", "SIZE", "SHA256"], built.files.iter().map(row))));
    text.push_str(&format!("\n{}\n", table(&["IN THE INITRAMFS", "SIZE", "SHA256"], built.initramfs.iter().map(row))));
    if !built.missing_firmware.is_empty() {
        text.push_str(&format!(
            "\nnote: not in the source, and needed only by network adapters on USB or boards that have them: {}\n",
            built.missing_firmware.join(" ")
        ));
    }
    for note in &built.notes {
        text.push_str(&format!("\nnote: {note}\n"));
    }
    text
}
