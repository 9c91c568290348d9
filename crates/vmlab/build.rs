//! Builds the agent, a static binary that the library embeds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

const PROFILE: &str = "agent";

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let workspace = manifest.join("../..");
    for dir in
        ["crates/vmlab-agent", "crates/vmlab-copy", "crates/vmlab-wire", "Cargo.lock", "Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", workspace.join(dir).display());
    }
    // Linked for the build's own C library, but statically: the guest has its own root. Only a named
    // target keeps these flags away from build scripts and macros.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("set by cargo");
    let target = format!("{arch}-unknown-linux-gnu");
    // Beside the directories of the profiles, so that debug and release builds share one agent, and
    // apart from them, because the cargo that runs this holds their lock.
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let target_dir = out.ancestors().nth(4).unwrap_or(&out).join("vmlab-agent");
    let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
    cargo
        .args(["build", "--package", "vmlab-agent", "--profile", PROFILE, "--target", &target])
        .arg("--manifest-path")
        .arg(workspace.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // What is set for the outer build is not for this one; clippy's wrapper builds nothing.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET");
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the agent could not be built");
    let agent = target_dir.join(&target).join(PROFILE).join("vmlab-agent");
    assert!(is_static(&agent), "{} is not static", agent.display());
    println!("cargo::rustc-env=VMLAB_AGENT={}", agent.display());
    // Half a megabyte, whose hash would otherwise be taken at each run.
    let content = std::fs::read(&agent).expect("the agent is there");
    let hash: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    println!("cargo::rustc-env=VMLAB_AGENT_SHA256={hash}");
}

/// Whether an ELF file asks for no interpreter: the guest has none when the agent starts.
fn is_static(path: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    let file = std::fs::read(path).expect("the agent is there");
    let u16_at = |at: usize| u16::from_le_bytes([file[at], file[at + 1]]) as usize;
    let offset = u64::from_le_bytes(file[32..40].try_into().expect("eight bytes")) as usize;
    let (size, count) = (u16_at(54), u16_at(56));
    let kind = |header: usize| {
        let at = offset + header * size;
        u32::from_le_bytes(file[at..at + 4].try_into().expect("four bytes"))
    };
    (0..count).all(|header| kind(header) != PT_INTERP)
}
