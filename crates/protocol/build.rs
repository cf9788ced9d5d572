//! Generates messages, client and server of `husk.agent.v1` from `proto/agent.proto`, and messages from `proto/cri.proto`.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=../../proto");
    let out_dir =
        PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    Codegen::new()
        .out_dir(&out_dir)
        .inputs(["../../proto/agent.proto", "../../proto/cri.proto"])
        .include("../../proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated files begin with inner attributes, which `include!` does not take: they must be modules.
    std::fs::write(
        out_dir.join("modules.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\npub mod cri;\n",
    )
}
