//! Tests of other languages in VMs, as `docs/other-tests.md` has them: run as their tools run them.

use std::os::unix::fs::PermissionsExt;

use crate::common::{DEBIAN_6_12, Site, kernel, need};

/// Go builds a test program below `/tmp` and runs it by `-exec` in the directory of the package.
#[test]
fn programs_that_go_has_built_run_in_a_vm() {
    let site = Site::new();
    let build = tempfile::Builder::new().prefix("go-build").tempdir_in("/tmp").unwrap();
    let dir = build.path().join("b001");
    std::fs::create_dir(&dir).unwrap();
    let program = dir.join("pkg.test");
    let script = "#!/bin/sh\necho \"$*\"; uname -r; cat go.mod; echo written > out; \
        case \"$*\" in *fail*) echo '--- FAIL: TestX'; exit 1;; esac; echo PASS\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(site.cwd().join("go.mod"), "module example.com/pkg\n").unwrap();
    let program = program.to_str().unwrap();
    let run = |flags: &[&str]| {
        let words = ["runner", "-k", kernel(DEBIAN_6_12), "-m", "512M", program];
        site.vmlab([&words[..], &["-test.paniconexit0", "-test.timeout=10m0s"], flags].concat())
            .output()
    };
    let outcome = run(&["-test.v=true"]);
    let text = outcome.expect_code(0).stdout_text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "-test.paniconexit0 -test.timeout=10m0s -test.v=true");
    assert!(lines[1].starts_with("6.12."), "{text}");
    assert_eq!(lines[2..], ["module example.com/pkg", "PASS"]);
    assert_eq!(std::fs::read_to_string(site.cwd().join("out")).unwrap(), "written\n");
    let failed = run(&["-test.run=fail"]);
    let text = failed.expect_code(1).stdout_text();
    assert!(text.ends_with("--- FAIL: TestX\n"), "{text}");
}

/// With `GOTMPDIR` in what is shared, `vmlab run` does as well, and what a program writes beside itself, such as what
/// it has covered, is Go's.
#[test]
fn programs_of_go_may_write_beside_themselves() {
    let site = Site::new();
    let dir = site.cwd().join(".gotmp/go-build1/b001");
    std::fs::create_dir_all(&dir).unwrap();
    let program = dir.join("pkg.test");
    std::fs::write(&program, "#!/bin/sh\necho 'mode: set' > \"${1#*=}\"; uname -r\n").unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let cover = dir.join("_cover_.out");
    let flag = format!("-test.coverprofile={}", cover.display());
    let outcome = site.run(&["-m", "512M"], [program.to_str().unwrap(), &flag]).output();
    let text = outcome.expect_code(0).stdout_text();
    assert!(text.starts_with("6.12."), "{text}");
    assert_eq!(std::fs::read_to_string(cover).unwrap(), "mode: set\n");
}

/// Python's tests, of the host's Python: pytest is run in the same way.
#[test]
fn pythons_tests_run_in_a_vm() {
    need("python3", "python3");
    let site = Site::new();
    let tests = "import os, unittest\n\
        class Kernel(unittest.TestCase):\n\
        \x20   def test_release(self):\n\
        \x20       self.assertTrue(os.uname().release.startswith('6.12.'))\n\
        \x20       open('report.xml', 'w').write('<report/>')\n\
        \x20   def test_environment(self):\n\
        \x20       self.assertNotIn('FAIL', os.environ)\n";
    std::fs::write(site.cwd().join("test_kernel.py"), tests).unwrap();
    let command = ["python3", "-m", "unittest", "-v"];
    let outcome = site.run(&["-m", "512M"], command).output();
    outcome.expect_code(0).expect_stderr(&["test_release", "Ran 2 tests", "OK"]);
    let report = std::fs::read_to_string(site.cwd().join("report.xml")).unwrap();
    assert_eq!(report, "<report/>");
    let failed = site.run(&["-m", "512M"], command).env("FAIL", "1").output();
    failed.expect_code(1).expect_stderr(&["FAIL: test_environment", "FAILED (failures=1)"]);
}
