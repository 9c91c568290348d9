//! `action.yml` and `scripts/action.sh`, as GitHub's runner would use them.

mod runner;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use vmlab::targets::{self, System, TargetCommand};

use crate::common::{DEBIAN_6_12, Outcome, Site, is_root, kernel, vmlab_bin};
use crate::kernels::small_package;
use runner::{action, entries, expression, load, repo, uses};

/// What shells take apart, and GitHub's own expressions.
const HOSTILE: &str =
    "x\"; $(touch pwned) `touch pwned` ' \\ \\\\ & ${HOME} ${{ inputs.name }} %0A \u{e9}";

/// Variables that runners or shells set themselves.
const RUNNERS_OWN: [&str; 10] = [
    "BASH_SOURCE",
    "GITHUB_OUTPUT",
    "HOME",
    "ID",
    "IFS",
    "LC_ALL",
    "PWD",
    "RUNNER_TEMP",
    "VERSION_ID",
    "XDG_CACHE_HOME",
];

/// All variables with capital letters that a shell script reads.
fn read_by(script: &str) -> BTreeSet<String> {
    let code = script.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut found = BTreeSet::new();
    for line in code {
        for (at, _) in line.match_indices('$') {
            let name = line[at + 1..].trim_start_matches(['{', '#']);
            let end =
                name.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
            let name = &name[..end.unwrap_or(name.len())];
            if name.starts_with(|c: char| c.is_ascii_uppercase()) {
                found.insert(name.to_owned());
            }
        }
    }
    found
}

#[test]
fn the_script_reads_what_the_steps_give() {
    let action = action();
    let script = std::fs::read_to_string(repo().join("scripts/action.sh")).unwrap();
    let mut given = BTreeSet::new();
    let mut inputs = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for step in action["runs"]["steps"].as_vec().unwrap() {
        if let Some(run) = step["run"].as_str() {
            assert!(!run.contains("${{"), "an input in shell code: {run}");
            assert_eq!(step["shell"].as_str(), Some("bash"));
        }
        ids.extend(step["id"].as_str());
        for (name, value) in entries(&step["env"]) {
            given.insert(name.to_owned());
            let expression = expression(value.as_str().unwrap()).unwrap();
            let Some(input) = expression.strip_prefix("inputs.") else { continue };
            assert_eq!(name, format!("INPUT_{}", input.to_uppercase()));
            inputs.insert(input.to_owned());
        }
    }
    let declared: BTreeSet<_> =
        entries(&action["inputs"]).into_iter().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(inputs, declared);
    let mut read = read_by(&script);
    assert!(read.contains("INPUT_KERNEL_SHA256"), "{read:?}");
    for own in RUNNERS_OWN {
        read.remove(own);
    }
    assert_eq!(read, given);
    for (name, output) in entries(&action["outputs"]) {
        let value = expression(output["value"].as_str().unwrap()).unwrap();
        let (id, written) =
            value.strip_prefix("steps.").and_then(|rest| rest.split_once(".outputs.")).unwrap();
        assert!(ids.contains(id), "{name}");
        assert!(script.contains(&format!("output {written} ")), "{name}");
    }
    for (name, input) in entries(&action["inputs"]) {
        assert!(input["description"].as_str().is_some_and(|text| text.len() > 10), "{name}");
    }
}

#[test]
fn the_example_names_inputs_and_outputs_that_there_are() {
    let action = action();
    let declared = |of: &str| -> BTreeSet<String> {
        entries(&action[of]).into_iter().map(|(name, _)| name.to_owned()).collect()
    };
    let (inputs, outputs) = (declared("inputs"), declared("outputs"));
    let path = repo().join("docs/ci/example.yml");
    let example = load(&path);
    let mut used = 0;
    for (_, job) in entries(&example["jobs"]) {
        for step in job["steps"].as_vec().unwrap() {
            if step["uses"].as_str().is_some_and(|name| name.starts_with("OWNER/vmlab@")) {
                used += 1;
                for (name, _) in entries(&step["with"]) {
                    assert!(inputs.contains(name), "{name}");
                }
            }
            // The same rule for those who copy it.
            assert!(!step["run"].as_str().unwrap_or_default().contains("${{"));
        }
    }
    assert!(used >= 2);
    let text = std::fs::read_to_string(path).unwrap();
    for (at, before) in text.match_indices("steps.vmlab.outputs.") {
        let name = text[at + before.len()..].split([' ', '}', '\n', '/']).next().unwrap();
        assert!(outputs.contains(name), "{name}");
    }
}

/// A part of the script alone.
fn sourced(site: &Site, code: &str, env: &[(&str, &str)]) -> Outcome {
    let mut run = site.host_sh(&format!(". \"$SCRIPT\"\n{code}"));
    run.command.env("SCRIPT", repo().join("scripts/action.sh")).envs(env.iter().copied());
    run.output()
}

#[test]
fn inputs_are_strings_in_the_file_that_is_made_of_them() {
    let site = Site::new();
    let every: String = (1..=127u8).map(char::from).chain("äöü\u{2028}🦀".chars()).collect();
    let command = format!("{HOSTILE}\n{every}\r\n'''\"\"\"\t");
    let mut env = vec![
        ("INPUT_NAME", HOSTILE),
        ("INPUT_COMMAND", &command),
        ("INPUT_UEFI", "false"),
        ("INPUT_KERNEL_ARGS", "quiet a=b"),
        ("INPUT_MEMORY", "512M"),
        ("INPUT_CPUS", "2"),
        ("INPUT_TIMEOUT", "90s"),
    ];
    let file = site.cwd().join("vmlab.toml");
    let described = |arguments: &str, env: &[(&str, &str)]| {
        let code = format!("describe {arguments} >vmlab.toml");
        sourced(&site, &code, env).expect_code(0);
        targets::load(&file).unwrap().targets
    };
    let found = described("'' /a/kernel", &env);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, HOSTILE);
    assert_eq!(found[0].run.command, TargetCommand::Script(command.clone()));
    assert_eq!(found[0].vm.append, ["quiet", "a=b"]);
    assert_eq!(found[0].verdict.timeout.unwrap().as_secs(), 90);
    assert_eq!(found[0].vm.topology.unwrap().cpus(), Some(2));

    let found = described("'' debian:6.1 debian:6.12", &env);
    let kernels: Vec<_> = found
        .iter()
        .map(|target| match &target.system {
            System::Kernel { spec, .. } => spec.clone().unwrap(),
            System::Image { .. } => panic!("{target:?}"),
        })
        .collect();
    assert_eq!(kernels, ["debian:6.1", "debian:6.12"]);

    for (name, value) in &mut env {
        if *name == "INPUT_UEFI" {
            *value = "true";
        }
        if *name == "INPUT_KERNEL_ARGS" {
            *value = "";
        }
    }
    let found = described("/an/image.qcow2", &env);
    assert!(matches!(&found[0].system, System::Image { .. }), "{found:?}");
    assert!(!site.cwd().join("pwned").exists());
}

#[test]
fn a_command_passes_and_its_outputs_are_written() {
    kernel(DEBIAN_6_12);
    let site = Site::new();
    let command = "printf '%s\\n' 'it'\"'\"'s \"quoted\"' '$(touch pwned)' \"$(uname -s)\" >got\n\
        env | grep -c -e ^INPUT_ -e ^PROGRAM= >>got; pwd >>got\n";
    let name = HOSTILE;
    let done = uses(
        &site,
        &[("command", command), ("kernel", DEBIAN_6_12), ("name", name), ("memory", "512M")],
        &[],
    );
    done.outcome.expect_code(0);
    let got = std::fs::read_to_string(site.cwd().join("got")).unwrap();
    let cwd = site.cwd();
    assert_eq!(got, format!("it's \"quoted\"\n$(touch pwned)\nLinux\n0\n{}\n", cwd.display()));
    assert!(!site.cwd().join("pwned").exists());
    assert_eq!(done.outputs["exit_code"], "0");
    let json = std::fs::read_to_string(&done.outputs["json"]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["targets"][0]["name"], name);
    assert_eq!(json["suite"], "cwd");
    for name in ["junit", "html"] {
        let path = Path::new(&done.outputs[name]);
        assert!(path.starts_with(&done.outputs["reports"]), "{:?}", done.outputs);
        assert!(path.metadata().unwrap().len() > 100);
    }
    assert!(done.summary.contains("✅"), "{}", done.summary);
    assert!(!done.log.contains("::error"), "{}", done.log);
    let left = site.path().join("temp").read_dir().unwrap().count();
    assert_eq!(left, 1, "more than the reports");
}

#[test]
fn a_commands_failure_is_the_steps() {
    kernel(DEBIAN_6_12);
    let site = Site::new();
    let command = "echo '::error::of the guest'; echo '  \"exit_code\": 9,'; exit 7";
    let done = uses(
        &site,
        &[("command", command), ("kernel", DEBIAN_6_12), ("memory", "512M"), ("reports", "out")],
        &[],
    );
    done.outcome.expect_code(7);
    assert_eq!(done.outputs["exit_code"], "7");
    let annotations: Vec<_> = done.log.lines().filter(|line| line.starts_with("::error")).collect();
    assert_eq!(
        annotations,
        ["::error title=vmlab::the command ended with exit code 7"],
        "{}",
        done.log
    );
    assert!(done.summary.contains("❌"), "{}", done.summary);
    assert_eq!(Path::new(&done.outputs["reports"]), site.cwd().join("out"));
    assert!(site.cwd().join("out/junit.xml").exists());
}

#[test]
fn the_targets_of_a_file_are_chosen() {
    let site = Site::new();
    let text = "[[matrix]]\nname = \"{n}\"\nkernel = \"debian:6.12\"\ncommand = \"true\"\n\
        vars = { n = [\"a1\", \"a2\", \"a3\", \"b1\"] }\n";
    std::fs::create_dir(site.cwd().join("sub")).unwrap();
    std::fs::write(site.cwd().join("sub/t.toml"), text).unwrap();
    let listed = |inputs: &[(&str, &str)]| {
        let all = [&[("working_directory", "sub"), ("args", "\n  --list \n")], inputs].concat();
        let done = uses(&site, &all, &[]);
        done.outcome.expect_code(0).stdout_text()
    };
    assert_eq!(listed(&[("file", "t.toml")]), "a1\na2\na3\nb1\n");
    assert_eq!(listed(&[("file", "t.toml"), ("filter", "^a"), ("jobs", "2")]), "a1\na2\na3\n");
    let parts: String =
        ["1/2", "2/2"].map(|part| listed(&[("file", "t.toml"), ("shard", part)])).concat();
    let mut parts: Vec<_> = parts.lines().collect();
    parts.sort_unstable();
    assert_eq!(parts, ["a1", "a2", "a3", "b1"]);
    // Without a file it is the usual one.
    std::fs::rename(site.cwd().join("sub/t.toml"), site.cwd().join("sub/vmlab.toml")).unwrap();
    assert_eq!(listed(&[("filter", "b")]), "b1\n");
}

#[test]
fn what_cannot_be_run_is_an_annotation() {
    let site = Site::new();
    for (inputs, wanted) in [
        (&[("kernel", DEBIAN_6_12)][..], "a kernel or an image needs a command"),
        (&[("command", "true"), ("file", "x.toml")], "there is a command and a file"),
        (&[("command", "true"), ("kernel", "host"), ("kernel_url", "file:///x")], "a kernel_url"),
        (&[("command", "true"), ("image", "x"), ("image_url", "file:///x")], "an image_url"),
        (&[("command", "true"), ("cpus", "1\nimage = \"x\"")], "cpus is no number: 1%0Aimage = "),
        (&[("working_directory", "no such")], "the working directory cannot be entered: no such"),
        (&[("command", "true"), ("kernel_url", "ftp://x/y")], "not a URL of https, http or file"),
        (&[("command", "true"), ("kernel_url", "http://x/y")], "without kernel_sha256"),
        (&[("command", "true"), ("image_url", "file:///no/such")], "cannot be downloaded"),
        // Of vmlab itself.
        (&[("file", "no-such.toml")], "vmlab ended with code 125 before it had results"),
    ] {
        let done = uses(&site, inputs, &[]);
        done.outcome.expect_code(125);
        let annotations: Vec<_> =
            done.log.lines().filter(|line| line.starts_with("::error title=vmlab::")).collect();
        assert_eq!(annotations.len(), 1, "{}", done.log);
        assert!(annotations[0].contains(wanted), "{wanted}: {}", done.log);
    }
}

/// Serves a file once, by HTTP on a port of its own.
fn serve(content: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/pool/linux-image.deb?x=1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).unwrap();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&content).unwrap();
    });
    url
}

#[test]
fn a_kernel_is_downloaded_and_checked() {
    let site = Site::new();
    let package = site.path().join("k.deb");
    let release = small_package(&site, &package);
    let content = std::fs::read(&package).unwrap();
    let sum = site.host_sh("sha256sum <../k.deb").output().expect_code(0).stdout_text();
    let sum = sum.split(' ').next().unwrap().to_uppercase();
    let cache = site.path().join("cache");
    let env = [("VMLAB_CACHE_DIR", cache.to_str().unwrap())];
    let inputs = |url: &str, sum: &str| {
        let url = url.to_owned();
        let sum = sum.to_owned();
        [("command", "uname -r >got".to_owned()), ("kernel_url", url), ("kernel_sha256", sum)]
    };
    let run = |inputs: &[(&str, String)]| {
        let inputs: Vec<_> = inputs.iter().map(|(name, value)| (*name, value.as_str())).collect();
        uses(&site, &inputs, &env)
    };
    let done = run(&inputs(&serve(content), &sum));
    done.outcome.expect_code(0);
    let got = std::fs::read_to_string(site.cwd().join("got")).unwrap();
    assert_eq!(got, format!("{release}\n"));

    let url = format!("file://{}", package.display());
    let wrong = run(&inputs(&url, &sum.replace(|c: char| c.is_ascii_digit(), "0")));
    wrong.outcome.expect_code(125);
    assert!(wrong.log.contains(&format!("its SHA-256 is {}", sum.to_lowercase())), "{}", wrong.log);
    assert!(wrong.outputs["exit_code"].is_empty());
}

/// A program for a `PATH` of the test's own.
fn program(dir: &Path, name: &str, script: &str) {
    std::fs::create_dir_all(dir).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// `PATH` with this directory in front.
fn path_with(dir: &Path) -> String {
    format!("{}:{}", dir.display(), std::env::var("PATH").unwrap())
}

#[test]
fn it_is_built_once_and_kept() {
    let site = Site::new();
    let bin = site.path().join("bin");
    // What cargo would do, in less time.
    program(
        &bin,
        "cargo",
        &format!(
            "[ \"$1\" != --version ] || {{ echo 'cargo 1.95.0 (x)'; exit; }}\n\
             printf '%s\\n' \"$PWD\" \"$@\" >>{0}/called\n\
             while [ $# -gt 1 ]; do [ \"$1\" != --target-dir ] || dir=$2; shift; done\n\
             mkdir -p \"$dir/release\" && ln -s {1} \"$dir/release/vmlab\"",
            site.path().display(),
            vmlab_bin().display()
        ),
    );
    let (path, cache) = (path_with(&bin), site.path().join("cache"));
    let env = [("PATH", &*path), ("XDG_CACHE_HOME", cache.to_str().unwrap())];
    std::fs::write(site.cwd().join("vmlab.toml"), "[[target]]\nname = \"x\"\ncommand = \"true\"\n")
        .unwrap();
    let inputs = [("vmlab", ""), ("args", "--list"), ("install", "false")];
    let first = uses(&site, &inputs, &env);
    first.outcome.expect_code(0);
    assert!(first.log.contains("::group::Build vmlab\n"), "{}", first.log);
    let called = std::fs::read_to_string(site.path().join("called")).unwrap();
    let words: Vec<_> = called.lines().collect();
    assert_eq!(words[0], repo().to_str().unwrap());
    assert_eq!(words[1..6], ["build", "--release", "--locked", "-p", "vmlab-cli"]);
    let program = &first.outputs["vmlab"];
    assert!(program.starts_with(cache.to_str().unwrap()) && Path::new(program).exists());
    let again = uses(&site, &inputs, &env);
    again.outcome.expect_code(0);
    assert_eq!(std::fs::read_to_string(site.path().join("called")).unwrap(), called);
    // A failing build says so, and nothing is run.
    std::fs::remove_dir_all(&cache).unwrap();
    self::program(
        &bin,
        "cargo",
        "[ \"$1\" != --version ] || echo 'cargo 1.95.0 (x)'; [ \"$1\" = --version ]",
    );
    let failed = uses(&site, &inputs, &env);
    failed.outcome.expect_code(125);
    assert!(failed.log.contains("::error title=vmlab::vmlab could not be built"), "{}", failed.log);
}

#[test]
fn kvm_is_opened_where_it_is_closed() {
    let site = Site::new();
    std::fs::set_permissions(site.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let bin = site.path().join("bin");
    let device = site.cwd().join("kvm");
    std::fs::write(&device, "").unwrap();
    program(&bin, "udevadm", &format!("echo \"$@\" >>{}/udev", site.cwd().display()));
    // For root every device is open, so root becomes someone else.
    program(&bin, "sudo", "exec \"$@\"");
    std::fs::set_permissions(site.cwd(), PermissionsExt::from_mode(0o777)).unwrap();
    let opened = |prefix: &str| {
        let script = repo().join("scripts/action.sh");
        let mut run = site.host_sh(&format!(
            "{prefix} bash -c '. \"$1\"; open_kvm \"$2\" \"$3\"; echo done' - \"$SCRIPT\" \"$PWD/kvm\" \"$PWD\""
        ));
        // A copy, as the sources may be where only root can read.
        let copied = site.path().join("scripts");
        std::fs::create_dir_all(&copied).unwrap();
        for name in ["action.sh", "lib.sh"] {
            std::fs::copy(script.with_file_name(name), copied.join(name)).unwrap();
        }
        run.command.env("SCRIPT", copied.join("action.sh")).env("PATH", path_with(&bin));
        run.output().expect_code(0).stdout_text()
    };
    let other = match is_root() {
        true => "setpriv --reuid=65534 --regid=65534 --clear-groups",
        false => "",
    };
    std::fs::set_permissions(&device, PermissionsExt::from_mode(0o000)).unwrap();
    // No udev of the test's opens it, and that is said.
    assert!(
        opened(other)
            .ends_with("kvm cannot be opened: processors are emulated, which is slower.\ndone\n")
    );
    let rule = site.cwd().join("99-vmlab-kvm.rules");
    let text = std::fs::read_to_string(&rule).unwrap();
    assert!(text.contains("KERNEL==\"kvm\"") && text.contains("MODE=\"0666\""), "{text}");
    let udev = std::fs::read_to_string(site.cwd().join("udev")).unwrap();
    assert_eq!(udev, "control --reload-rules\ntrigger --name-match=kvm\nsettle\n");
    std::fs::remove_file(&rule).unwrap();
    std::fs::set_permissions(&device, PermissionsExt::from_mode(0o666)).unwrap();
    assert_eq!(opened(other), "done\n");
    assert!(!rule.exists());
    std::fs::remove_file(&device).unwrap();
    assert!(opened(other).ends_with("kvm: processors are emulated, which is slower.\ndone\n"));
}

/// Of nobody.
const ARCHIVE: &str = "https://archive.example/debian";

#[test]
fn debians_kernels_are_offered_on_other_systems() {
    let site = Site::new();
    let bin = site.path().join("bin");
    program(&bin, "sudo", "exec \"$@\"");
    let apt = site.cwd().join("apt");
    for name in ["sources.list.d", "preferences.d"] {
        std::fs::create_dir_all(apt.join(name)).unwrap();
    }
    let path = path_with(&bin);
    let env = [("PATH", path.as_str()), ("INPUT_DEBIAN_ARCHIVE", ARCHIVE)];
    let offer = || sourced(&site, "offer_debian apt", &env).expect_code(0).stdout_text();
    assert_eq!(offer(), "");
    let source = apt.join("sources.list.d/vmlab-debian.sources");
    let text = std::fs::read_to_string(&source).unwrap();
    assert!(text.contains(&format!("URIs: {ARCHIVE}\n")), "{text}");
    assert!(text.contains("Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"), "{text}");
    assert!(apt.join("preferences.d/vmlab-debian").exists());
    // Once is enough.
    std::fs::write(&source, format!("URIs: {ARCHIVE}\n")).unwrap();
    offer();
    assert_eq!(std::fs::read_to_string(&source).unwrap(), format!("URIs: {ARCHIVE}\n"));

    for (kernel, file, wanted) in [
        ("", "", false),
        ("debian:6.12", "", true),
        ("ubuntu:24.04", "", false),
        ("", "mine.toml", true),
    ] {
        std::fs::write(site.cwd().join("mine.toml"), "kernel = [\"debian:6.1\"]").unwrap();
        let env = [("INPUT_KERNEL", kernel), ("INPUT_FILE", file)];
        let asked = sourced(&site, "wants_debian && echo yes || echo no", &env);
        let wanted = if wanted { "yes\n" } else { "no\n" };
        assert_eq!(asked.expect_code(0).stdout_text(), wanted, "{kernel} {file}");
    }
}
