//! What a guest can make a reader keep.

use super::super::extent::{MAX_REPORT_BYTES, MAX_REPORT_LINES};
use super::super::line::MAX_LINE;
use super::super::reader::{MAX_EVENTS, MAX_OPEN};
use super::super::title::MAX_TITLE;
use super::{EventReader, RECORDED, events};

/// Pseudo-random numbers (xorshift64), the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

fn within_bounds(reader: &EventReader) {
    let (line, open, lines) = reader.held();
    assert!(line <= MAX_LINE && open <= MAX_OPEN && lines <= MAX_OPEN * MAX_REPORT_LINES);
    assert!(reader.events().len() <= MAX_EVENTS);
    for event in reader.events() {
        let bytes: usize = event.report.iter().map(String::len).sum();
        assert!(event.report.len() <= MAX_REPORT_LINES && bytes <= MAX_REPORT_BYTES);
        assert!(event.title.len() <= MAX_TITLE && event.count > 0, "{}", event.title);
    }
}

#[test]
fn anything_at_all_is_read_within_bounds() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let words: Vec<&[u8]> = RECORDED
        .iter()
        .flat_map(|(_, console)| console.split_inclusive(|b| b" :\n[]()+/".contains(b)))
        .collect();
    for _ in 0..60 {
        let mut reader = EventReader::all();
        for _ in 0..40 {
            let mut piece = Vec::new();
            for _ in 0..random.below(200) {
                match random.below(8) {
                    0 => piece.push(u8::try_from(random.below(256)).unwrap()),
                    1 => piece.extend_from_slice("é\u{1b}[\u{202e}漢".as_bytes()),
                    2 => piece.extend_from_slice(b"\n[    1.000000] "),
                    _ => piece.extend_from_slice(words[random.below(words.len())]),
                }
            }
            reader.feed(&piece);
            within_bounds(&reader);
        }
        reader.finish();
        within_bounds(&reader);
    }
}

#[test]
fn damaged_reports_are_read_within_bounds() {
    let mut random = Random(88_172_645_463_325_252);
    for round in 0..600 {
        let mut console = RECORDED[round % RECORDED.len()].1.to_vec();
        for _ in 0..=random.below(40) {
            let (at, length) = (random.below(console.len()), random.below(9));
            let end = (at + length).min(console.len());
            let byte = u8::try_from(random.below(256)).unwrap();
            let size = random.below(9);
            console.splice(at..end, std::iter::repeat_n(byte, size));
        }
        let mut reader = EventReader::all();
        console.chunks(1 + random.below(4000)).for_each(|piece| reader.feed(piece));
        reader.finish();
        within_bounds(&reader);
    }
}

#[test]
fn a_line_or_a_report_without_an_end_costs_no_more_than_its_limit() {
    let mut reader = EventReader::all();
    reader.feed(b"[    1.000000] BUG: KASAN: use-after-free in f+0x1/0x2\n");
    for _ in 0..MAX_REPORT_LINES * 4 {
        reader.feed(b"[    1.000000]  f+0x1/0x2 and a long text behind it, so that bytes are many");
        reader.feed(&[b'x'; 100]);
        reader.feed(b"\n");
    }
    within_bounds(&reader);
    reader.feed(&[b'y'; MAX_LINE * 3]);
    within_bounds(&reader);
    reader.feed(b"\n[    2.000000] Kernel panic - not syncing: still read\n");
    reader.finish();
    within_bounds(&reader);
    assert_eq!(reader.events().last().unwrap().title, "kernel panic: still read");
}

#[test]
fn more_events_and_callers_than_anyone_needs_are_not_kept() {
    let mut reader = EventReader::all();
    for n in 0..MAX_EVENTS * 2 {
        // Letters, for numbers are no part of titles.
        let name: String =
            format!("{n:x}").bytes().map(|b| char::from(b'a' + (b & 31) - 1)).collect();
        let text =
            format!("[    1.{n:06}][T{n}] WARNING: CPU: 0 PID: 1 at a.c:1 f_{name}+0x1/0x2\n");
        reader.feed(text.as_bytes());
        within_bounds(&reader);
    }
    reader.finish();
    assert_eq!((reader.events().len(), reader.lost()), (MAX_EVENTS, MAX_EVENTS as u64));
}

#[test]
fn short_lines_are_limited_too_and_so_is_a_line_that_comes_at_once() {
    let mut reader = EventReader::all();
    reader.feed(b"[    1.000000] kernel BUG at a.c:1!\n");
    reader.feed("[    1.000000]  f+0x1/0x2\n".repeat(MAX_REPORT_LINES * 2).as_bytes());
    let long = "x".repeat(MAX_LINE * 2);
    reader.feed(format!("[    1.000000] Kernel panic - not syncing: {long}\n").as_bytes());
    reader.finish();
    within_bounds(&reader);
    assert_eq!(reader.events()[0].report.len(), MAX_REPORT_LINES);
    assert!(reader.events()[1].report[0].len() <= MAX_LINE);
}

#[test]
fn what_was_killed_is_kept_after_a_long_list_of_processes() {
    let tasks = "[    1.000000] [    123]     0   123      640      128    61440        0             0 sh\n";
    let found = events(format!(
        "[    1.000000] perl invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0\n{}\
         [    1.000000] Out of memory: Killed process 124 (perl) total-vm:1kB\n",
        tasks.repeat(3000)
    ));
    let report = &found[0].report;
    assert!(report[0].starts_with("perl invoked oom-killer") && report[1].ends_with(" sh"));
    assert!(report.last().unwrap().starts_with("Out of memory: Killed process 124"));
}

#[test]
fn a_title_is_short() {
    let long = "漢".repeat(1000);
    let found = events(format!("[    1.000000] Kernel panic - not syncing: {long}\n"));
    assert!(found[0].title.len() <= MAX_TITLE && found[0].title.starts_with("kernel panic: 漢"));
}
