//! What an archive may contain. One guard for publishers' zips and tarballs, used where they are pushed (controller) and
//! again where they are unpacked (agent), so that the two cannot disagree.
//!
//! Everything here blocks: call it from a blocking thread. Memory is bounded whatever the archive says.

pub mod boot_set;
pub mod compression;
pub mod config_txt;
pub mod disk;
mod error;
pub mod facts;
pub mod firmware;
pub mod first_boot;
pub mod foreign;
pub mod switch;
mod tar;
mod zip;

pub use boot_set::{check_installer_set, check_system_set};
pub use compression::{Compression, Packing};
pub use disk::{Examined, check_image, examine_image};
pub use error::{Error, Reason, Refused};
pub use facts::Facts;
pub use tar::{TarSummary, check_tar, unpack_tar};
pub use zip::{ZipFile, ZipSummary, check_zip, unpack_zip};
