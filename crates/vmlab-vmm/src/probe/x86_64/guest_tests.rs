use super::*;

/// What the hardware reads at a guest address.
fn word(memory: &[u8], address: u64) -> u64 {
    let start = address as usize;
    u64::from_le_bytes(memory[start..start + 8].try_into().unwrap())
}

/// The memory of a guest before it runs.
fn loaded() -> Vec<u8> {
    let mut memory = vec![0; MEMORY_SIZE];
    load(&mut memory);
    memory
}

/// Walks the page tables as a processor does, for addresses below 2 MiB.
fn translate(memory: &[u8], linear: u64) -> u64 {
    let mut table = PML4;
    for shift in [39, 30, 21] {
        let entry = word(memory, table + (linear >> shift & 0x1ff) * 8);
        assert_eq!(entry & 3, 3, "present and writable");
        if entry & LARGE_PAGE != 0 {
            assert_eq!(shift, 21, "only the last level may map a page");
            return (entry & !0x1f_ffff) | linear & 0x1f_ffff;
        }
        table = entry & !0xfff;
    }
    panic!("no page at {linear:#x}");
}

#[test]
fn memory_is_mapped_at_its_own_addresses() {
    let memory = loaded();
    for address in [0, PML4, CODE, RESULTS, STACK_TOP - 8, MEMORY_SIZE as u64 - 1] {
        assert_eq!(translate(&memory, address), address);
    }
}

#[test]
fn gdt_has_the_descriptors_that_the_selectors_name() {
    let gdt = gdt();
    assert_eq!(gdt.len() * 8 - 1, usize::from(GDT_LIMIT));
    assert_eq!(gdt[0], 0);
    let access = |selector: u16| gdt[usize::from(selector) / 8] >> 40 & 0xff;
    assert_eq!(access(CODE_SELECTOR), 0x9b);
    assert_eq!(gdt[usize::from(CODE_SELECTOR) / 8] >> 53 & 3, 1, "L set, D clear");
    assert_eq!(access(DATA_SELECTOR), 0x93);
    assert_eq!(access(TSS_SELECTOR), 0x8b);
    let tss = gdt[usize::from(TSS_SELECTOR) / 8];
    assert_eq!(tss >> 16 & 0xff_ffff, TSS);
    assert_eq!(tss & 0xffff, u64::from(TSS_LIMIT));
    assert_eq!(word(&loaded(), GDT + u64::from(TSS_SELECTOR)), tss);
}

#[test]
fn each_vector_has_a_gate_to_code() {
    let memory = loaded();
    for vector in 0..VECTORS {
        let (low, high) = (word(&memory, IDT + vector * 16), word(&memory, IDT + vector * 16 + 8));
        assert_eq!(low >> 40 & 0xff, 0x8e, "a present interrupt gate");
        assert_eq!(low >> 16 & 0xffff, u64::from(CODE_SELECTOR));
        let handler = low & 0xffff | (low >> 48) << 16 | high << 32;
        if vector == BREAKPOINT_VECTOR {
            assert_eq!(memory[handler as usize..][..11], BREAKPOINT_CODE);
        } else {
            assert_eq!(memory[handler as usize], HLT);
            assert_eq!(exception_at(handler + 1).map(u64::from), Some(vector));
        }
    }
    assert_eq!(IDT_LIMIT, 511);
}

#[test]
fn exceptions_are_told_by_their_address_only() {
    assert_eq!(exception_at(FAULTS), None);
    assert_eq!(exception_at(FAULTS + 1), Some(0));
    assert_eq!(exception_at(FAULTS + VECTORS), Some(31));
    assert_eq!(exception_at(FAULTS + VECTORS + 1), None);
    assert_eq!(exception_at(0), None);
    assert!((0..ROUTINES.len()).all(|index| exception_at(end_of(index)).is_none()));
}

#[test]
fn routines_fit_end_in_a_halt_and_have_their_index() {
    let memory = loaded();
    for (index, routine) in ROUTINES.iter().enumerate() {
        assert!((routine.code.len() as u64) < CODE_STRIDE);
        assert_eq!(routine.code.last(), Some(&HLT), "{}", routine.instruction);
        assert!(memory[address_of(index) as usize..].starts_with(routine.code));
    }
    assert!(address_of(ROUTINES.len()) <= RESULTS);
    assert_eq!(ROUTINES[LOOP].instruction, "dec/jnz");
    assert_eq!(ROUTINES[XSETBV].instruction, "xsetbv");
    assert_eq!(&ROUTINES[LOOP].code[1..5], LOOP_ITERATIONS.to_le_bytes());
    // The breakpoint's routine expects the address after its int3 (0xcc).
    let int3 = ROUTINES.iter().position(|routine| routine.instruction == "int3").unwrap();
    assert_eq!(memory[ROUTINES[int3].expected[1] as usize - 1], 0xcc);
}

#[test]
fn results_are_read_and_cleared() {
    let mut memory = loaded();
    let start = RESULTS as usize;
    memory[start] = 7;
    memory[start + 15] = 1;
    memory[start + 23] = 2;
    assert_eq!(results(&memory), [7, 1 << 56, 2 << 56]);
    clear_results(&mut memory);
    assert_eq!(results(&memory), [0; 3]);
    assert_eq!(memory, loaded());
}
