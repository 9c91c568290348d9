//! What is said of files that are wrong: all of each message.

use std::time::{Duration, Instant};

use super::{message, try_read};
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
        try_read(&format!("{text}{key}\n"), kind).is_ok()
    };
    for key in ["timeout = 1", "kernel-args = 'x'", "cpus = 1", "tags = []", "env = {}"] {
        assert!(said(Vmlab, key) && !said(Vmtest, key), "{key}");
    }
    for key in ["kernel_args = 'x'", "vm = { num_cpus = 1 }", "rootfs = '/x'", "kvm_cpu_args = 'x'"]
    {
        assert!(said(Vmlab, key) && said(Vmtest, key), "{key}");
    }
}

/// A mistake made very many times is told some times, and costs no more than reading it.
#[test]
fn very_many_mistakes_take_no_time() {
    let keys = |prefix: &str, count: usize| -> String {
        (0..count).map(|number| format!("{prefix}{number} = 1\n")).collect()
    };
    let target = "[[target]]\nname = 'x'\nkernel = './k'\ncommand = 'true'\n";
    let many = format!("{target}{}", keys("x", 200_000));
    let unknown_defaults =
        format!("[defaults]\n{}{target}{}", keys("x", 90_000), keys("y", 90_000));
    let targets: String =
        (0..5000).map(|number| target.replace('x', &number.to_string())).collect();
    let inherited = format!("[defaults]\n{}{targets}", keys("x", 5000));
    let env = format!(
        "[defaults.env]\n{}{target}[target.env]\n{}[target.x]\n",
        keys("x", 90_000),
        keys("y", 90_000)
    );
    for (kind, text) in [
        (FileKind::Vmtest, &many),
        (FileKind::Vmlab, &many),
        (FileKind::Vmlab, &unknown_defaults),
        (FileKind::Vmlab, &inherited),
        (FileKind::Vmlab, &env),
    ] {
        let start = Instant::now();
        let message = try_read(text, kind).unwrap_err().to_string();
        let took = start.elapsed();
        // It is a second for a program that is not optimised; what is quadratic takes minutes.
        assert!(took < Duration::from_secs(20), "{took:?}: {message}");
        assert!(message.lines().count() < 150, "{message}");
    }
    assert!(
        try_read(&many, FileKind::Vmtest).unwrap_err().to_string().ends_with("80 more problems")
    );
}
