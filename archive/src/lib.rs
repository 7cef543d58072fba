//! Rules for the contents of an archive. One guard checks zips and tarballs twice: at the push (controller) and at
//! unpacking (agent). Both use the same code, so they cannot disagree.
//!
//! Every function here blocks: call it from a blocking thread. Memory use is bounded for any input.

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
