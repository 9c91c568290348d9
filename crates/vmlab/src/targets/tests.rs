//! Tests of whole files.

mod errors;
mod matrix;
mod schema;
mod select;
mod vmlab;
mod vmtest;

use std::path::Path;

use proptest::prelude::*;

use super::file::read;
use super::{FileKind, Target, TargetFileError};

/// The directory that files in tests are in.
const DIR: &str = "/home/me/project";

fn try_read(text: &str, kind: FileKind) -> Result<Vec<Target>, TargetFileError> {
    let name = match kind {
        FileKind::Vmlab => "vmlab.toml",
        FileKind::Vmtest => "vmtest.toml",
    };
    read(text, kind, Path::new(name), Path::new(DIR))
}

/// The targets of a `vmlab.toml`.
fn vmlab(text: &str) -> Vec<Target> {
    try_read(text, FileKind::Vmlab).unwrap_or_else(|error| panic!("{error}"))
}

/// The targets of a `vmtest.toml`.
fn vmtest(text: &str) -> Vec<Target> {
    try_read(text, FileKind::Vmtest).unwrap_or_else(|error| panic!("{error}"))
}

/// What is said of a file that is wrong.
fn message(text: &str, kind: FileKind) -> String {
    try_read(text, kind).map(|targets| panic!("{targets:#?}")).unwrap_err().to_string()
}

fn names(targets: &[Target]) -> Vec<&str> {
    targets.iter().map(|target| target.name.as_str()).collect()
}

/// Pieces of files: put together in any order they are often nearly right.
const PIECES: &[&str] = &[
    "[[target]]\n",
    "[[matrix]]\n",
    "[defaults]\n",
    "[shares.a]\n",
    "[target.vm]\n",
    "[target.vm.mounts]\n",
    "[disks.x]\n",
    "name",
    "kernel",
    "image",
    "command",
    "vars",
    "include",
    "exclude",
    "env",
    "shares",
    "vm",
    "cpus",
    "num_cpus",
    "memory",
    "mounts",
    "fail-on",
    "timeout",
    "topology",
    "host",
    "guest",
    "uefi",
    " = ",
    " = ",
    " = ",
    "\n",
    "\n",
    "\"{fs}\"",
    "\"a\"",
    "\"./x\"",
    "\"/\"",
    "'''\n",
    "[",
    "]",
    "{",
    "}",
    ",",
    ".",
    "1",
    "-9223372036854775808",
    "99999999999999999999",
    "0xff",
    "1.5",
    "true",
    "1979-05-27",
    "\"\\u0000\"",
    "\u{e4}",
    "\u{1f980}",
    "\r\n",
    "\t",
    "#",
    "\"",
    "\"debian:6.12\"",
    "[\"a\", \"b\"]",
    "{ fs = [\"x\", 1] }",
    "[{ fs = \"x\" }]",
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_is_too_strange(text in any::<String>()) {
        for kind in [FileKind::Vmlab, FileKind::Vmtest] {
            let _ = try_read(&text, kind).map_err(|error| error.to_string());
        }
    }

    #[test]
    fn no_file_is_too_strange(pieces in prop::collection::vec(prop::sample::select(PIECES), 0..40)) {
        let text = pieces.concat();
        for kind in [FileKind::Vmlab, FileKind::Vmtest] {
            let _ = try_read(&text, kind).map_err(|error| error.to_string());
        }
    }

    #[test]
    fn no_key_takes_everything(
        key in prop::sample::select(super::table::TargetTable::KEYS),
        value in prop::sample::select(PIECES),
        table in prop::sample::select(&["target", "matrix"][..]),
    ) {
        let text = format!("[[{table}]]\nname = \"a\"\ncommand = \"b\"\nkernel = \"./c\"\n{key} = {value}\n");
        for kind in [FileKind::Vmlab, FileKind::Vmtest] {
            let _ = try_read(&text, kind).map_err(|error| error.to_string());
        }
    }
}
