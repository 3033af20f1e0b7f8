//! The load generator, run against a daemon.

use super::process::{Ended, run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Cargo builds it beside the tests: they are in `deps`, it is in `examples`.
pub fn program() -> PathBuf {
    let exe = std::env::current_exe().expect("own path");
    let profile = exe.parent().and_then(Path::parent).expect("the folder of the profile");
    let found = profile.join("examples").join("vubench");
    assert!(
        found.exists(),
        "{} is missing: cargo test or cargo build --example vubench builds it",
        found.display()
    );
    found
}

pub fn command(socket: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(program());
    c.arg("--socket").arg(socket).args(args);
    c.stdin(std::process::Stdio::null());
    c
}

/// Runs it to its end; the last line it printed is its result.
pub fn vubench(socket: &Path, args: &[&str]) -> (Ended, Value) {
    let ended = run(command(socket, args));
    let last = ended.out.lines().last().unwrap_or_default();
    let result = serde_json::from_str(last).unwrap_or(Value::Null);
    (ended, result)
}

/// A number of a result.
#[track_caller]
pub fn number(result: &Value, key: &str) -> u64 {
    result[key].as_u64().unwrap_or_else(|| panic!("no {key} in {result}"))
}
