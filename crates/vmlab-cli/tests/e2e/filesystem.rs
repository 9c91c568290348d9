//! Shares as filesystems: what programs may expect of one, in a guest over virtio-fs.
//!
//! Most of these tests have two halves. The one on the host starts a guest that runs this very program
//! again, and the other half is what it does there. Both are done on a plain directory of the host first,
//! so that what is expected is what the host's own kernel does.
mod exercise;
mod posix;
mod together;

use std::path::{Path, PathBuf};

use crate::common::{CLOUD, DEBIAN_6_12, Running, Site, VIRTIO_FS, is_root, need};

/// Says that this program runs in a guest, and which half of its test it is to be.
const HALF: &str = "VMLAB_TEST_HALF";

/// Where the guest has this program: the host's directory of it may be one that guests have of their own.
const PROGRAMS: &str = "/mnt/tests";

/// The half that is to be run here, in a guest.
fn half() -> Option<String> {
    std::env::var(HALF).ok()
}

/// Starts a guest in which a test of this program runs as one of its halves, and then the shell waits for its
/// stdin to end: the guest is still there to be compared with.
fn start(site: &Site, test: &str, half: &str, options: &[&str]) -> Running {
    let program = std::env::current_exe().unwrap();
    let (dir, name) = (program.parent().unwrap(), program.file_name().unwrap());
    let share = format!("{}:{PROGRAMS}:ro", dir.display());
    let options = [&VIRTIO_FS[..], &["--share", &share], options].concat();
    let script = format!(
        "{PROGRAMS}/{} --exact filesystem::{test} --nocapture || exit; echo half done; read x; exit 0",
        name.display()
    );
    site.run_with(DEBIAN_6_12, &options, ["sh", "-c", &script]).env(HALF, half).open_stdin().start()
}

/// Waits for the end of a half; gives what still runs.
fn done(running: &Running) {
    running.wait_stdout("1 passed");
    running.wait_stdout("half done");
}

/// The test's working directory.
fn here() -> PathBuf {
    std::env::current_dir().unwrap()
}

fn scratch(site: &Site) -> PathBuf {
    let dir = site.path().join("host");
    std::fs::create_dir(&dir).unwrap();
    dir
}

#[test]
fn random_operations_do_what_a_model_of_them_does() {
    const SEEDS: [u64; 2] = [1, 2];
    /// So many on each of the seeds.
    const COUNT: usize = 600;
    let run = |dir: &Path| {
        std::thread::scope(|scope| {
            for seed in SEEDS {
                let dir = dir.join(seed.to_string());
                scope.spawn(move || exercise::run(seed, COUNT, &dir));
            }
        });
    };
    if half().is_some() {
        return run(&here());
    }
    let site = Site::new();
    run(&scratch(&site));
    let test = "random_operations_do_what_a_model_of_them_does";
    let guest = start(&site, test, "exercise", &["--cpus", "2"]);
    done(&guest);
    // The guest still runs: what it keeps in its memory must be here all the same.
    for seed in SEEDS {
        exercise::compare(seed, COUNT, &site.cwd().join(seed.to_string()));
    }
    guest.finish().expect_code(0);
}

#[test]
fn what_posix_says_holds() {
    if half().is_some() {
        return posix::run(&here(), is_root_on_the_host());
    }
    let site = Site::new();
    posix::run(&scratch(&site), is_root());
    let test = "what_posix_says_holds";
    let half = if is_root() { "root" } else { "user" };
    let guest = start(&site, test, half, &[]);
    done(&guest);
    guest.finish().expect_code(0);
}

/// Whether files can belong to different users.
fn is_root_on_the_host() -> bool {
    half().is_some_and(|half| half == "root")
}

#[test]
fn what_the_host_does_in_a_directory_does_not_disturb_the_guest() {
    if half().is_some() {
        return together::work_among_others(&here());
    }
    let site = Site::new();
    let test = "what_the_host_does_in_a_directory_does_not_disturb_the_guest";
    let guest = start(&site, test, "guest", &["--cpus", "2"]);
    guest.wait_stdout(together::BEGUN);
    let rounds = together::disturb(&site.cwd(), || guest.stdout.bytes());
    done(&guest);
    guest.finish().expect_code(0);
    assert!(rounds > 10, "the host did nothing");
    let left: Vec<_> =
        site.cwd().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn two_guests_append_to_one_file_and_see_each_others_files() {
    let halves = ["one", "two"];
    if let Some(half) = half() {
        let other = halves.iter().find(|other| **other != half).unwrap();
        return together::meet(&here(), &half, other);
    }
    let site = Site::new();
    let test = "two_guests_append_to_one_file_and_see_each_others_files";
    let guests = halves.map(|half| start(&site, test, half, &[]));
    for guest in &guests {
        done(guest);
    }
    together::all_is_there(&site.cwd(), &halves);
    for guest in guests {
        guest.finish().expect_code(0);
    }
}

#[test]
fn make_test_works_under_kernels_that_have_only_virtio_fs() {
    need("make", "make");
    need("cc", "gcc");
    for kernel in CLOUD {
        let site = Site::new();
        let file = |name: &str, text: &str| std::fs::write(site.cwd().join(name), text).unwrap();
        file("twice.h", "int twice(int x);\n");
        file("twice.c", "#include \"twice.h\"\nint twice(int x) { return 2 * x; }\n");
        file("test.c", "#include \"twice.h\"\nint main(void) { return twice(21) != 42; }\n");
        file(
            "Makefile",
            "test: program\n\t./program\n\t@echo passed under $$(uname -r) > report\n\n\
             program: test.o twice.o\n\t$(CC) -o $@ $^\n\n%.o: %.c twice.h\n\t$(CC) -g -c -o $@ $<\n",
        );
        // Once all of it, once nothing but the test, and once what has changed.
        let command = "make test && echo again && make test && \
            sed -i 's/2/3/' twice.c && ! make test";
        let outcome = site.run_with(kernel, &[], ["sh", "-c", command]).output();
        outcome.expect_code(0).expect_stderr(&["Error 1"]);
        let text = outcome.stdout_text();
        let (first, rest) = text.split_once("again\n").unwrap();
        assert!(first.contains("-o program test.o twice.o\n./program\n"), "{kernel}: {text}");
        let (second, rest) = rest.split_once("./program\n").unwrap();
        assert_eq!(second, "", "{kernel}: it is built again: {text}");
        assert!(!rest.contains("test.c") && rest.contains("twice.c"), "{kernel}: {text}");
        // What was built there is up to date here, so times of files are the same.
        let asked = std::process::Command::new("make")
            .args(["-q", "program"])
            .current_dir(site.cwd())
            .status()
            .unwrap();
        assert!(asked.success(), "{kernel}: make on the host would build again");
        let report = std::fs::read_to_string(site.cwd().join("report")).unwrap();
        assert!(report.starts_with("passed under ") && report.contains("cloud"), "{report}");
    }
}
