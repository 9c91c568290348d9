//! Pages of the kernel's trace buffer, as `trace_pipe_raw` gives them out (`Documentation/trace/ring-buffer-design.rst`,
//! `events/header_page` and `events/header_event` of tracefs).

/// In front of a page: the time of its first event, and how many bytes are used.
const PAGE_HEADER: usize = 16;

/// Of the used bytes' word, what is the length; above it are flags.
const LENGTH: u64 = (1 << 20) - 1;

/// Says that events before this page were overwritten.
const MISSED: u64 = 1 << 31;

/// Types of records that are no events.
const PADDING: u32 = 29;
const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;

/// Bits of the time since the record before.
const TIME_SHIFT: u32 = 27;

/// What was read of a page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Page<'a> {
    /// Events with their times.
    pub(super) events: Vec<(u64, &'a [u8])>,
    /// Whether events are missing before these.
    pub(super) missed: bool,
}

/// Takes a page apart. What makes no sense ends it.
pub(super) fn parse(page: &[u8]) -> Page<'_> {
    let mut found = Page::default();
    let (Some(mut time), Some(used)) = (word(page, 0), word(page, 8)) else { return found };
    found.missed = used & MISSED != 0;
    let end = PAGE_HEADER.saturating_add((used & LENGTH) as usize).min(page.len());
    let mut at = PAGE_HEADER;
    while at + 4 <= end {
        let Some(head) = half(page, at) else { break };
        let (kind, delta) = (head & 31, u64::from(head >> 5));
        let first = half(page, at + 4).unwrap_or(0);
        let extended = (u64::from(first) << TIME_SHIFT) + delta;
        let length = match kind {
            PADDING if delta == 0 => break,
            PADDING => 4 + first as usize,
            TIME_EXTEND => {
                time += extended;
                8
            }
            TIME_STAMP => {
                // The highest bits are those of the page.
                time = (time & !((1 << 59) - 1)) | extended;
                8
            }
            0 => {
                time += delta;
                let length = 4 + first as usize;
                match page.get(at + 8..(at + length).min(end)) {
                    Some(data) => found.events.push((time, data)),
                    None => break,
                }
                length
            }
            words => {
                time += delta;
                let length = 4 + 4 * words as usize;
                match page.get(at + 4..at + length) {
                    Some(data) => found.events.push((time, data)),
                    None => break,
                }
                length
            }
        };
        at += length;
    }
    found
}

/// Eight bytes as a number.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    bytes.try_into().ok().map(u64::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(time: u64, flags: u64, records: &[u32]) -> Vec<u8> {
        let mut page = time.to_ne_bytes().to_vec();
        page.extend((flags | (records.len() as u64 * 4)).to_ne_bytes());
        records.iter().for_each(|word| page.extend(word.to_ne_bytes()));
        page.resize(4096, 0xee);
        page
    }

    #[test]
    fn events_have_their_times() {
        let event = |delta: u32| delta << 5 | 2;
        let page = page(
            1000,
            0,
            &[
                event(0),
                1,
                2,
                event(5),
                3,
                4,
                1 << 5 | TIME_EXTEND,
                1,
                event(1),
                5,
                6,
                // A long one, which has its length in front of it.
                3 << 5,
                12,
                7,
                8,
                // One that was given up.
                1 << 5 | PADDING,
                8,
                0,
                event(1),
                9,
                10,
                PADDING,
                0,
                0,
            ],
        );
        let found = parse(&page);
        let far = 1000 + 5 + (1 << 27) + 1;
        let read: Vec<(u64, u32)> =
            found.events.iter().map(|(time, data)| (*time, half(data, 0).unwrap())).collect();
        assert_eq!(read, [(1000, 1), (1005, 3), (far + 1, 5), (far + 4, 7), (far + 5, 9)]);
        assert_eq!(found.events[3].1.len(), 8);
        assert!(!found.missed);
    }

    #[test]
    fn overwritten_events_are_noticed_and_nonsense_ends_a_page() {
        assert!(parse(&page(0, MISSED, &[1, 2])).missed);
        assert_eq!(parse(&[]), Page::default());
        // A record that is longer than the page.
        assert!(parse(&page(0, 0, &[0, u32::MAX - 8])).events.len() < 2);
        for end in 0..40 {
            parse(&page(0, 0, &[28, 1, 2, 3])[..end]);
        }
    }
}
