//! Facts found in an image, stored with its digest. NULL until it was examined.

use super::Statements;

pub(super) const IMAGE_FACTS: Statements = Statements {
    name: "m0070_image_facts",
    statements: &[
        // No later check can read the image again: it is gigabytes, compressed, and may be at another controller.
        "ALTER TABLE blobs ADD COLUMN facts TEXT",
    ],
};
