//! `marcoctl image`.

use crate::args::ImageCommand;
use crate::failure::Failure;
use crate::image::{self, Packed};
use crate::output::{Out, bytes, clean, fields};

/// Runs the command. It needs no controller.
pub(super) async fn run(command: ImageCommand, out: &mut Out) -> Result<(), Failure> {
    let ImageCommand::Pack(flags) = command;
    let packed = image::pack(flags).await?;
    out.value(&packed, text)
}

fn text(packed: &Packed) -> String {
    let mut text = fields(&[
        ("image", packed.file.clone()),
        ("size", bytes(packed.size)),
        ("unpacked", bytes(packed.unpacked_bytes)),
        ("entries", packed.entries.to_string()),
    ]);
    for skipped in &packed.skipped {
        text.push_str(&format!("left out: {}\n", clean(skipped)));
    }
    text
}
