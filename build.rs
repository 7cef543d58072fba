//! Compiles `proto/` with protox, so no `protoc` has to be installed.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files: Vec<PathBuf> = ["access", "agent", "artifact", "node", "operation", "schedule"]
        .iter()
        .map(|name| PathBuf::from(format!("proto/marco/bootstrap/v1/{name}.proto")))
        .collect();
    println!("cargo:rerun-if-changed=proto/marco");

    let descriptors = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        // `bytes` fields become `Bytes`, so image bytes are passed on without a copy.
        .bytes(".")
        // tonic's generated `connect` would clash with the RPC of that name. The callers create channels themselves.
        .build_transport(false)
        .codec_path("crate::codec::Codec")
        .compile_fds(descriptors)?;
    Ok(())
}
