use super::*;
use std::error::Error;
use std::io;
use std::sync::Mutex;

/// Held by tests that count the process's descriptors and threads, or that change them.
static PROCESS: Mutex<()> = Mutex::new(());

pub(super) fn alone() -> std::sync::MutexGuard<'static, ()> {
    PROCESS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn good() -> KvmProof {
    KvmProof {
        iterations: 5000,
        took: Duration::from_micros(10),
        instructions: vec!["shlx", "int3"],
        xsetbv_lost: false,
        total: Duration::from_micros(2500),
    }
}

/// The names of what is open, without the handle that reads the directory.
fn open_files() -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The threads of the probe that exist now. The kernel cuts names to 15 bytes.
fn probe_threads() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path().join("comm")).ok())
        .filter(|name| name.trim_end() == "vmlab-kvm-probe")
        .count()
}

/// A joined thread can be seen in /proc for a moment more.
fn threads_end() -> bool {
    let end = Instant::now() + Duration::from_secs(2);
    while probe_threads() > 0 && Instant::now() < end {
        thread::yield_now();
    }
    probe_threads() == 0
}

#[test]
fn prove_ends_in_time_with_a_consistent_verdict() {
    let _alone = alone();
    let started = Instant::now();
    let verdict = prove();
    let took = started.elapsed();
    // The rest is for a host that does not let this thread run.
    assert!(took < DEADLINE + KICK_GRACE + Duration::from_secs(1), "{took:?}: {verdict:?}");
    match verdict {
        Ok(proof) => {
            assert!(proof.iterations > 0 && !proof.took.is_zero(), "{proof:?}");
            assert!(proof.took < proof.total && proof.total <= took, "{proof:?}");
            assert!(proof.instructions.contains(&"int3"), "{proof:?}");
            assert!(!(proof.xsetbv_lost && proof.instructions.contains(&"xsetbv")), "{proof:?}");
        }
        Err(KvmUnusable::TooSlow { iterations, took: slow, limit }) => {
            assert!(iterations > 0 && slow > limit && slow < took, "{slow:?} {limit:?} {took:?}");
        }
        Err(KvmUnusable::Hung { after, .. }) => assert!(after >= DEADLINE && after < took),
        Err(reason) => assert_eq!(reason.to_string().lines().count(), 1, "{reason}"),
    }
}

#[test]
fn prove_leaves_nothing_open_or_running() {
    let _alone = alone();
    let before = open_files();
    for _ in 0..10 {
        let verdict = prove();
        if let Err(KvmUnusable::Hung { left_behind, .. }) = &verdict {
            assert!(!left_behind, "{verdict:?}");
        }
    }
    assert_eq!(open_files(), before);
    assert!(threads_end());
}

#[test]
fn a_vm_is_made_where_kvm_is_proved_and_nothing_of_it_is_left() {
    let _alone = alone();
    let before = open_files();
    let proof = prove();
    let made = makes_a_vm();
    assert_eq!(open_files(), before);
    match &proof {
        Ok(_) => assert!(made.is_ok(), "{made:?}"),
        Err(KvmUnusable::NoDevice) => assert!(matches!(made, Err(KvmUnusable::NoDevice))),
        Err(KvmUnusable::NoPermission) => assert!(matches!(made, Err(KvmUnusable::NoPermission))),
        // It can do that much, or not.
        Err(_) => {}
    }
}

#[test]
fn a_result_is_handed_on() {
    let _alone = alone();
    let proof = supervise(Duration::from_secs(10), |kick, step| {
        step("first");
        assert!(!kick.is_sent());
        Ok(good())
    });
    assert_eq!(proof.unwrap(), good());
    let error = supervise(Duration::from_secs(10), |_, _| Err(KvmUnusable::NoDevice));
    assert!(matches!(error, Err(KvmUnusable::NoDevice)), "{error:?}");
}

#[test]
fn a_probe_that_obeys_the_kick_is_joined() {
    let _alone = alone();
    let deadline = Duration::from_millis(20);
    let error = supervise(deadline, |kick, step| {
        step("spin");
        while !kick.is_sent() {
            thread::yield_now();
        }
        Err(KvmUnusable::Hung { step: "spin", after: Duration::ZERO, left_behind: false })
    })
    .unwrap_err();
    let KvmUnusable::Hung { step, after, left_behind } = error else { panic!("{error:?}") };
    assert_eq!((step, left_behind), ("spin", false));
    assert!(after >= deadline);
    assert!(threads_end());
}

#[test]
fn a_probe_that_ignores_the_kick_is_left_behind() {
    let _alone = alone();
    let (release, held) = mpsc::channel::<()>();
    let deadline = Duration::from_millis(20);
    let started = Instant::now();
    let error = supervise(deadline, move |_, step| {
        step("stuck");
        let _ = held.recv();
        Ok(good())
    })
    .unwrap_err();
    assert!(started.elapsed() >= deadline + KICK_GRACE);
    assert_eq!(probe_threads(), 1);
    drop(release);
    let KvmUnusable::Hung { step, left_behind, .. } = error else { panic!("{error:?}") };
    assert_eq!((step, left_behind), ("stuck", true));
    assert!(threads_end());
}

#[test]
fn the_last_step_is_the_one_that_hangs() {
    let _alone = alone();
    let error = supervise(Duration::from_millis(20), |_, step| {
        step("one");
        step("two");
        thread::sleep(Duration::from_millis(200));
        Ok(good())
    });
    assert!(matches!(error, Err(KvmUnusable::Hung { step: "two", .. })), "{error:?}");
    assert!(threads_end());
}

#[test]
#[should_panic(expected = "a bug in the probe")]
fn a_panic_is_not_a_verdict() {
    let _alone = alone();
    let _ = supervise(Duration::from_secs(10), |_, _| panic!("a bug in the probe"));
}

#[test]
fn errors_of_opening_are_told_apart() {
    let open = |errno| KvmUnusable::from_open(io::Error::from_raw_os_error(errno));
    assert!(matches!(open(libc::ENOENT), KvmUnusable::NoDevice));
    assert!(matches!(open(libc::ENODEV), KvmUnusable::NoDriver));
    assert!(matches!(open(libc::ENXIO), KvmUnusable::NoDriver));
    assert!(matches!(open(libc::EACCES), KvmUnusable::NoPermission));
    assert!(matches!(open(libc::EPERM), KvmUnusable::NoPermission));
    assert!(matches!(open(libc::EBUSY), KvmUnusable::Busy));
    assert!(matches!(open(libc::EMFILE), KvmUnusable::Open(_)));
    let create = |errno| KvmUnusable::from_create_vm(io::Error::from_raw_os_error(errno));
    assert!(matches!(create(libc::EBUSY), KvmUnusable::Busy));
    assert!(matches!(create(libc::ENOMEM), KvmUnusable::CannotRun { step: "create a VM", .. }));
}

#[test]
fn messages_are_one_line_and_do_not_repeat_their_source() {
    let source = || io::Error::from_raw_os_error(libc::EMFILE);
    let ms = Duration::from_millis;
    let wrong = GuestStop::WrongResult { expected: vec![0x1f], found: vec![0] };
    let cases = [
        (KvmUnusable::NoDevice, "/dev/kvm does not exist (load the module"),
        (KvmUnusable::NoDriver, "/dev/kvm exists, but no driver answers"),
        (KvmUnusable::NoPermission, "sudo usermod -aG kvm $USER"),
        (KvmUnusable::Busy, "another hypervisor"),
        (KvmUnusable::Open(source()), "cannot open /dev/kvm"),
        (KvmUnusable::WrongApiVersion(13), "has API version 13, and only version 12"),
        (KvmUnusable::MissingCapability("KVM_CAP_X"), "lacks the capability KVM_CAP_X"),
        (
            KvmUnusable::CannotRun { step: "create a vCPU", source: source() },
            "KVM failed to create a vCPU",
        ),
        (
            KvmUnusable::CannotEmulate { instruction: "shlx", stop: wrong },
            "cannot execute shlx: the guest computed [0] instead of [1f]",
        ),
        (
            KvmUnusable::CannotEmulate {
                instruction: "int3",
                stop: GuestStop::InternalError { suberror: 1 },
            },
            "cannot execute int3: the guest ended with KVM_EXIT_INTERNAL_ERROR, suberror 1",
        ),
        (
            KvmUnusable::TooSlow { iterations: 5000, took: ms(5), limit: ms(2) },
            "slow emulation: 2.0 million instructions a second (5000 iterations took 5.0 ms, \
             more than 2.0 ms)",
        ),
        (
            KvmUnusable::Hung { step: "int3", after: ms(500), left_behind: false },
            "hangs: \"int3\" did not end within 500 ms",
        ),
        (
            KvmUnusable::Hung { step: "int3", after: ms(500), left_behind: true },
            "within 500 ms, and cannot be interrupted",
        ),
        (KvmUnusable::NotThisArchitecture { arch: "aarch64" }, "this is aarch64"),
    ];
    for (error, part) in cases {
        let message = error.to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
        assert!(!message.contains('\n') && !message.contains("  "), "{message:?}");
        if let Some(source) = error.source() {
            assert!(!message.contains(&source.to_string()), "{message:?}");
        }
    }
}

#[test]
fn a_proof_says_speed_and_cost() {
    assert_eq!(
        good().to_string(),
        "1000 million instructions a second (5000 iterations in 10µs), correct: shlx, int3; \
         proved in 2.5 ms"
    );
    let lost = KvmProof { xsetbv_lost: true, ..good() }.to_string();
    assert!(lost.contains("but the guest's xsetbv is lost"), "{lost}");
}
