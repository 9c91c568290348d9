//! What a VM is to go on from. The input: a byte that says whether a state's head is put in front (if it is even),
//! and bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmlab_vmm::x86_64::fuzzing;

/// The magic number and the version.
const HEAD: &[u8] = b"vmlab-vm\x02\0\0\0";

fuzz_target!(|data: &[u8]| {
    let Some((how, rest)) = data.split_first() else { return };
    let head = if how % 2 == 0 { HEAD } else { b"" };
    let Ok(written) = fuzzing::state(&[head, rest].concat()) else { return };
    // What it has read, it writes in one way only.
    let again = fuzzing::state(&written).expect("its own state is none");
    assert_eq!(written, again);
});
