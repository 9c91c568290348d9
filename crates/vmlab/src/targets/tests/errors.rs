//! What is said of files that are wrong: all of each message.

use super::message;
use crate::targets::FileKind::{self, Vmlab, Vmtest};

/// Files, and what is said of each, in `errors.txt`: a file begins with `=== ` and its kind, what is said of
/// it with `---`.
#[test]
fn what_is_wrong_is_said_with_its_place() {
    let cases = include_str!("errors.txt");
    let write = std::env::var_os("VMLAB_WRITE_ERRORS").is_some();
    let mut written = String::new();
    let mut count = 0;
    let mut wrong = Vec::new();
    for case in cases.split("=== ").skip(1) {
        let (head, rest) = case.split_once('\n').unwrap();
        let (text, expected) = rest.split_once("---\n").unwrap_or((rest, ""));
        let kind = if head.starts_with("vmtest") { Vmtest } else { Vmlab };
        let found = message(text, kind);
        written.push_str(&format!("=== {head}\n{text}---\n{found}\n\n"));
        if found.trim_end() != expected.trim_end() {
            wrong.push(format!("{head}:\n{found}"));
        }
        count += 1;
    }
    if write {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/targets/tests/errors.txt");
        std::fs::write(path, written).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(count > 50, "{count} cases only");
}

#[test]
fn too_many_targets_are_refused_before_they_are_made() {
    let values: Vec<String> = (0..30).map(|number| number.to_string()).collect();
    let values = values.join(", ");
    let axes = ["a", "b", "c", "d", "e", "f"].map(|axis| format!("{axis} = [{values}]"));
    let text = format!("[[matrix]]\nname = 'x'\ncommand = 'c'\nvars = {{ {} }}\n", axes.join(", "));
    assert!(message(&text, Vmlab).contains("stands for more than 10000 targets"));
    let half = format!(
        "[[matrix]]\nname = 'NAME'\ncommand = 'c'\nvars = {{ {} }}\ncpus = [1, 2, 3, 4, 5, 6, 7]\n",
        axes[..2].join(", ")
    );
    let more = format!("{half}include = [{{ cpus = 8 }}, {{ cpus = [9, 10, 11, 12] }}]\n");
    assert!(message(&more, Vmlab).contains("this matrix stands for more than 10000 targets"));
    let both = half.replace("NAME", "a") + &half.replace("NAME", "b");
    assert!(message(&both, Vmlab).contains("the file has more than 10000 targets"));
}

#[test]
fn vmtest_files_have_vmtests_keys_only() {
    let said = |kind: FileKind, key: &str| {
        let text = "[[target]]\nname = 'a'\nkernel = './k'\ncommand = 'c'\n";
        super::try_read(&format!("{text}{key}\n"), kind).is_ok()
    };
    for key in ["timeout = 1", "kernel-args = 'x'", "cpus = 1", "tags = []", "env = {}"] {
        assert!(said(Vmlab, key) && !said(Vmtest, key), "{key}");
    }
    for key in ["kernel_args = 'x'", "vm = { num_cpus = 1 }", "rootfs = '/x'", "kvm_cpu_args = 'x'"]
    {
        assert!(said(Vmlab, key) && said(Vmtest, key), "{key}");
    }
}
