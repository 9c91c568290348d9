//! The guest of the proof: its tables, its code, and the results that a processor computes.
//!
//! The first 2 MiB of guest-physical memory are mapped at the same addresses by one large page, of
//! which the first [`MEMORY_SIZE`] bytes exist. Everything has a page of its own.

use crate::long_mode::{LARGE_PAGE, PRESENT, WRITABLE};

/// Size of the guest's memory in bytes.
pub(super) const MEMORY_SIZE: usize = 0x10000;

pub(super) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
pub(super) const GDT: u64 = 0x4000;
/// An empty task state segment: a processor in long mode must have one.
pub(super) const TSS: u64 = 0x4800;
pub(super) const IDT: u64 = 0x5000;
/// What `int3` calls.
const BREAKPOINT: u64 = 0x6000;
/// A `hlt` for each vector, so that the instruction pointer tells which exception was raised.
const FAULTS: u64 = 0x6800;
const CODE: u64 = 0x7000;
/// Where each routine leaves its values.
const RESULTS: u64 = 0x8000;
/// The routine for `xsave` saves to the page at 0x9000.
pub(super) const STACK_TOP: u64 = 0xf000;

/// Distance in bytes between the routines.
const CODE_STRIDE: u64 = 0x100;

/// The exception vectors that processors define.
const VECTORS: u64 = 32;
const BREAKPOINT_VECTOR: u64 = 3;

pub(super) const CODE_SELECTOR: u16 = 0x08;
pub(super) const DATA_SELECTOR: u16 = 0x10;
pub(super) const TSS_SELECTOR: u16 = 0x18;
/// Limits as the descriptors below have them.
pub(super) const GDT_LIMIT: u16 = 5 * 8 - 1;
pub(super) const IDT_LIMIT: u16 = (VECTORS * 16 - 1) as u16;
pub(super) const TSS_LIMIT: u32 = 0x67;

/// Iterations of the timed loop. Enough to tell an emulation, which needs some 7 ms, from a
/// processor (microseconds, with the entry and the exit), and not longer than that.
pub(super) const LOOP_ITERATIONS: u32 = 5_000;

/// A value in which every nibble differs.
const PATTERN: u64 = 0x0123_4567_89ab_cdef;
const PATTERN_2: u64 = 0xfedc_ba98_7654_3210;

/// A bit of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feature {
    /// Leaf 1, ECX, this bit.
    Leaf1Ecx(u32),
    /// Leaf 7, subleaf 0, EBX, this bit.
    Leaf7Ebx(u32),
}

/// XSAVE, XRSTOR and XSETBV.
pub(super) const XSAVE: Feature = Feature::Leaf1Ecx(26);

/// A piece of guest code that ends in `hlt`, with the values that it must leave in [`RESULTS`].
pub(super) struct Routine {
    /// The instruction under test.
    pub(super) instruction: &'static str,
    /// What the processor must have, for the code to run at all.
    pub(super) feature: Option<Feature>,
    pub(super) code: &'static [u8],
    pub(super) expected: [u64; 3],
}

/// `dec; jnz`, the loop that is timed; the first of [`ROUTINES`].
pub(super) const LOOP: usize = 0;

/// `xsetbv`, which sets XCR0 to [`XCR0`] for the routine after it.
pub(super) const XSETBV: usize = 4;

/// What the guest sets XCR0 to: x87 and SSE state.
pub(super) const XCR0: u64 = 3;

/// The routines in the order in which they run.
pub(super) const ROUTINES: [Routine; 6] = [
    Routine {
        instruction: "dec/jnz",
        feature: None,
        code: &{
            let n = LOOP_ITERATIONS.to_le_bytes();
            [
                0xb9, n[0], n[1], n[2], n[3], //                   mov ecx, LOOP_ITERATIONS
                0xff, 0xc9, //                                  1: dec ecx
                0x75, 0xfc, //                                     jnz 1b
                0x48, 0xf7, 0xd1, //                               not rcx
                0x48, 0x89, 0x0c, 0x25, 0x00, 0x80, 0x00, 0x00, // mov [0x8000], rcx
                0xf4, //                                           hlt
            ]
        },
        expected: [u64::MAX, 0, 0],
    },
    Routine {
        instruction: "shlx",
        // BMI2.
        feature: Some(Feature::Leaf7Ebx(8)),
        code: &[
            0x48, 0xbb, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, // mov rbx, PATTERN
            0xb9, 0x0c, 0x00, 0x00, 0x00, //                               mov ecx, 12
            0xc4, 0xe2, 0xf1, 0xf7, 0xc3, //                               shlx rax, rbx, rcx
            0x48, 0x89, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, //             mov [0x8000], rax
            0xf4, //                                                       hlt
        ],
        expected: [PATTERN << 12, 0, 0],
    },
    Routine {
        instruction: "cmpxchg16b",
        feature: Some(Feature::Leaf1Ecx(13)),
        code: &[
            0x31, 0xc0, //                                                 xor eax, eax
            0x31, 0xd2, //                                                 xor edx, edx
            0x48, 0xbb, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, // mov rbx, PATTERN
            0x48, 0xb9, 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, // mov rcx, PATTERN_2
            0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x80, 0x00,
            0x00, // lock cmpxchg16b [0x8000]
            0x0f, 0x94, 0xc0, //                                           setz al
            0x48, 0x89, 0x04, 0x25, 0x10, 0x80, 0x00, 0x00, //             mov [0x8010], rax
            0xf4, //                                                       hlt
        ],
        expected: [PATTERN, PATTERN_2, 1],
    },
    Routine {
        instruction: "int3",
        feature: None,
        code: &[
            0xbb, 0x00, 0x10, 0x00, 0x00, //                   mov ebx, 0x1000
            0xcc, //                                           int3
            0x48, 0x01, 0xd8, //                               add rax, rbx
            0x48, 0x89, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, // mov [0x8000], rax
            0x48, 0x89, 0x14, 0x25, 0x08, 0x80, 0x00, 0x00, // mov [0x8008], rdx
            0xf4, //                                           hlt
        ],
        // The handler's value and the one from before, and the address after `int3`.
        expected: [0x1ddc, address_of(3) + 6, 0],
    },
    Routine {
        instruction: "xsetbv",
        feature: Some(XSAVE),
        code: &[
            0x31, 0xc9, //                   xor ecx, ecx
            0x31, 0xd2, //                   xor edx, edx
            0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, XCR0
            0x0f, 0x01, 0xd1, //             xsetbv
            0xf4, //                         hlt
        ],
        // What it has set, KVM is asked for.
        expected: [0, 0, 0],
    },
    Routine {
        instruction: "xsave/xrstor",
        feature: Some(XSAVE),
        code: &[
            0x31, 0xd2, //                                                 xor edx, edx
            0xb8, 0x03, 0x00, 0x00, 0x00, //                               mov eax, XCR0
            0x48, 0xbb, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, // mov rbx, PATTERN
            0x66, 0x48, 0x0f, 0x6e, 0xc3, //                               movq xmm0, rbx
            0x0f, 0xae, 0x24, 0x25, 0x00, 0x90, 0x00, 0x00, //             xsave [0x9000]
            0x66, 0x0f, 0xef, 0xc0, //                                     pxor xmm0, xmm0
            0x0f, 0xae, 0x2c, 0x25, 0x00, 0x90, 0x00, 0x00, //             xrstor [0x9000]
            0x66, 0x48, 0x0f, 0x7e, 0xc0, //                               movq rax, xmm0
            0x48, 0x89, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, //             mov [0x8000], rax
            0xf4, //                                                       hlt
        ],
        expected: [PATTERN, 0, 0],
    },
];

/// The handler of vector 3.
const BREAKPOINT_CODE: [u8; 11] = [
    0xb8, 0xdc, 0x0d, 0x00, 0x00, // mov eax, 0xddc
    0x48, 0x8b, 0x14, 0x24, //       mov rdx, [rsp]
    0x48, 0xcf, //                   iretq
];

const HLT: u8 = 0xf4;

/// The guest address of the routine with this index.
pub(super) const fn address_of(routine: usize) -> u64 {
    CODE + routine as u64 * CODE_STRIDE
}

/// The instruction pointer after the last instruction of the routine with this index.
pub(super) fn end_of(routine: usize) -> u64 {
    address_of(routine) + ROUTINES[routine].code.len() as u64
}

/// The exception that ends with a halt before `rip`, if it is one of ours.
pub(super) fn exception_at(rip: u64) -> Option<u8> {
    let vector = rip.checked_sub(FAULTS + 1).filter(|&vector| vector < VECTORS)?;
    u8::try_from(vector).ok()
}

/// The paging entries that map 2 MiB at address 0, as address and value.
pub(super) fn page_tables() -> [(u64, u64); 3] {
    [
        (PML4, PDPT | PRESENT | WRITABLE),
        (PDPT, PAGE_DIRECTORY | PRESENT | WRITABLE),
        (PAGE_DIRECTORY, PRESENT | WRITABLE | LARGE_PAGE),
    ]
}

/// The global descriptor table (Intel SDM volume 3, 3.4.5 and 8.2.3), accessed bits set.
pub(super) fn gdt() -> [u64; 5] {
    // The base of the TSS below 16 MiB; its other bits are zero.
    let tss = u64::from(TSS_LIMIT) | TSS << 16 | 0x8b << 40;
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, tss, 0]
}

/// The interrupt descriptor table: a 64-bit interrupt gate for each vector (Intel SDM volume 3,
/// 6.14.1).
pub(super) fn idt() -> Vec<u64> {
    (0..VECTORS)
        .flat_map(|vector| {
            let handler = if vector == BREAKPOINT_VECTOR { BREAKPOINT } else { FAULTS + vector };
            let low = handler & 0xffff
                | u64::from(CODE_SELECTOR) << 16
                | 0x8e << 40
                | (handler >> 16 & 0xffff) << 48;
            [low, handler >> 32]
        })
        .collect()
}

/// Writes tables and code into the guest's memory, which is all zero.
pub(super) fn load(memory: &mut [u8]) {
    for (address, entry) in page_tables() {
        write(memory, address, &entry.to_le_bytes());
    }
    for (table, entries) in [(GDT, gdt().to_vec()), (IDT, idt())] {
        for (address, entry) in (table..).step_by(8).zip(entries) {
            write(memory, address, &entry.to_le_bytes());
        }
    }
    write(memory, BREAKPOINT, &BREAKPOINT_CODE);
    write(memory, FAULTS, &[HLT; VECTORS as usize]);
    for (index, routine) in ROUTINES.iter().enumerate() {
        write(memory, address_of(index), routine.code);
    }
}

/// Sets the results to zero, as the routines expect them.
pub(super) fn clear_results(memory: &mut [u8]) {
    write(memory, RESULTS, &[0; 24]);
}

/// The values that a routine has left.
pub(super) fn results(memory: &[u8]) -> [u64; 3] {
    let mut words = memory[RESULTS as usize..].chunks_exact(8).map(|word| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        u64::from_le_bytes(bytes)
    });
    std::array::from_fn(|_| words.next().unwrap_or_default())
}

/// Copies `bytes` to a guest address; all of them are constants inside the memory.
fn write(memory: &mut [u8], address: u64, bytes: &[u8]) {
    let start = address as usize;
    memory[start..start + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
