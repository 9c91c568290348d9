use super::*;
use crate::probe::supervise;
use crate::probe::tests::alone;
use kvm_bindings::kvm_cpuid_entry2;

#[test]
fn a_halt_is_judged_by_place_and_values() {
    for (index, routine) in ROUTINES.iter().enumerate() {
        let (end, expected) = (guest::end_of(index), routine.expected);
        assert_eq!(judge(index, end, expected), None);
        let found = [expected[0] ^ 1, expected[1], expected[2]];
        assert_eq!(
            judge(index, end, found),
            Some(GuestStop::WrongResult { expected: expected.to_vec(), found: found.to_vec() })
        );
        assert_eq!(judge(index, end - 1, expected), Some(GuestStop::StrayHalt { rip: end - 1 }));
        assert_eq!(judge(index, 0x6807, expected), Some(GuestStop::Exception { vector: 6 }));
    }
}

#[test]
fn a_loop_at_the_speed_of_an_emulation_is_too_slow() {
    // The emulation that this guards against: 1.9 million instructions a second.
    let emulated = Duration::from_secs_f64(f64::from(guest::LOOP_ITERATIONS) * 2.0 / 1.9e6);
    let error = judge_speed(emulated).unwrap_err();
    let KvmUnusable::TooSlow { took, limit, .. } = error else { panic!("{error:?}") };
    assert_eq!((took, limit), (emulated, LOOP_LIMIT));
    // A KVM that is nested in an emulated machine.
    assert!(judge_speed(Duration::from_micros(200)).is_ok());
    assert!(judge_speed(LOOP_LIMIT).is_ok());
}

#[test]
fn features_are_read_from_their_leaf() {
    let leaf = |function, index, ebx, ecx| kvm_cpuid_entry2 {
        function,
        index,
        ebx,
        ecx,
        ..Default::default()
    };
    let entries = [leaf(1, 0, 0, 1 << 26), leaf(7, 0, 1 << 8, 0), leaf(7, 1, 1 << 9, 1 << 13)];
    let cpuid = CpuId::from_entries(&entries).unwrap();
    assert!(has(&cpuid, guest::XSAVE));
    assert!(has(&cpuid, Feature::Leaf7Ebx(8)));
    // Present only in another leaf, or in another subleaf.
    assert!(!has(&cpuid, Feature::Leaf1Ecx(13)));
    assert!(!has(&cpuid, Feature::Leaf7Ebx(9)));
}

#[test]
fn long_mode_has_consistent_registers() {
    let mut sregs = kvm_sregs::default();
    enter_long_mode(&mut sregs, true);
    assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0), "64-bit code");
    assert_eq!((sregs.tr.s, sregs.tr.type_), (0, 11), "a busy TSS");
    assert_eq!(sregs.efer, 0x500);
    assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001);
    assert_eq!(sregs.cr4 & 1 << 18, 1 << 18);
    let mut plain = kvm_sregs::default();
    enter_long_mode(&mut plain, false);
    assert_eq!(plain.cr4, sregs.cr4 & !(1 << 18));
}

/// Replaces the timed loop by this code, and runs it.
fn run_instead(code: &'static [u8], deadline: Duration) -> KvmUnusable {
    let _alone = alone();
    supervise(deadline, move |kick, step| {
        step("set up a guest");
        let mut guest = Guest::new(kick)?;
        let start = guest::address_of(guest::LOOP) as usize;
        guest.memory.bytes()[start..start + code.len()].copy_from_slice(code);
        step("run it");
        guest.run(guest::LOOP).map(|took| panic!("this cannot end well, but did in {took:?}"))
    })
    .unwrap_err()
}

/// Whether the host has no KVM to run this with. Said aloud, for such a test has shown nothing.
fn no_kvm(error: &KvmUnusable) -> bool {
    use KvmUnusable::{Busy, NoDevice, NoDriver, NoPermission};
    let none = matches!(error, NoDevice | NoDriver | NoPermission | Busy);
    if none {
        eprintln!("SKIPPED, no KVM: {error}");
    }
    none
}

#[test]
fn a_guest_that_spins_is_interrupted_by_the_kick() {
    // 1: jmp 1b
    let error = run_instead(&[0xeb, 0xfe], Duration::from_millis(100));
    if !no_kvm(&error) {
        let KvmUnusable::Hung { after, left_behind, .. } = error else { panic!("{error:?}") };
        assert!(!left_behind && after >= Duration::from_millis(100), "{after:?}");
    }
}

#[test]
fn an_exception_is_named() {
    // ud2
    let error = run_instead(&[0x0f, 0x0b], Duration::from_secs(5));
    if !no_kvm(&error) {
        let KvmUnusable::CannotEmulate { stop, .. } = error else { panic!("{error:?}") };
        // A poor emulation may fail on the way to the handler.
        assert!(
            matches!(stop, GuestStop::Exception { vector: 6 } | GuestStop::InternalError { .. }),
            "{stop:?}"
        );
    }
}

#[test]
fn a_wrong_value_is_found() {
    // hlt, at once; then at the right place, without a result.
    let error = run_instead(&[0xf4], Duration::from_secs(5));
    if !no_kvm(&error) {
        let KvmUnusable::CannotEmulate { stop, .. } = error else { panic!("{error:?}") };
        assert_eq!(stop, GuestStop::StrayHalt { rip: guest::address_of(guest::LOOP) + 1 });
    }
    // jmp to the hlt at offset 20.
    let error = run_instead(&[0xeb, 18], Duration::from_secs(5));
    if !no_kvm(&error) {
        let KvmUnusable::CannotEmulate { stop, .. } = error else { panic!("{error:?}") };
        let expected = vec![u64::MAX, 0, 0];
        assert_eq!(stop, GuestStop::WrongResult { expected, found: vec![0; 3] });
    }
}
