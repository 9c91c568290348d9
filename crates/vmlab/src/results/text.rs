//! Text for people: what a guest wrote without what could harm a reader, times, and escapes.

use std::fmt::Write;

/// Text that a guest wrote, without what could move a terminal's cursor, break a document's syntax or
/// change the order in which characters are seen.
///
/// Escape sequences of terminals go, a carriage return is a line's end, and other control characters are
/// shown by their pictures (U+2400 and those behind it) where there is one, else as U+FFFD. XML 1.0 has a
/// place for everything that is left.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => {
                if !skip_escape(&mut chars) {
                    out.push('␛');
                }
            }
            '\r' => {
                chars.next_if_eq(&'\n');
                out.push('\n');
            }
            '\n' | '\t' => out.push(c),
            // Line ends to some readers and not to others.
            '\u{85}' | '\u{2028}' | '\u{2029}' => out.push('\n'),
            '\u{7f}' => out.push('␡'),
            '\0'..'\u{20}' => out.push(char::from_u32(0x2400 + c as u32).unwrap_or('\u{fffd}')),
            '\u{80}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            // What overrides or isolates a direction of writing.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Passes over the rest of an escape sequence (ECMA-48), which ends with its line at the latest, so that a
/// sequence without an end hides no more than that. `false` if there is none.
fn skip_escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> bool {
    match chars.peek() {
        Some('[') => {
            chars.next();
            while chars.next_if(|c| matches!(c, '\u{20}'..='\u{3f}')).is_some() {}
            chars.next_if(|c| matches!(c, '\u{40}'..='\u{7e}'));
            true
        }
        // OSC, DCS, SOS, PM and APC: strings, up to BEL or ST.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(c) = chars.next_if(|c| !matches!(c, '\n' | '\r')) {
                if c == '\u{7}' {
                    break;
                }
                if c == '\u{1b}' {
                    chars.next_if_eq(&'\\');
                    break;
                }
            }
            true
        }
        Some('\u{20}'..='\u{2f}') => {
            while chars.next_if(|c| matches!(c, '\u{20}'..='\u{2f}')).is_some() {}
            chars.next_if(|c| matches!(c, '\u{30}'..='\u{7e}'));
            true
        }
        Some('\u{30}'..='\u{7e}') => {
            chars.next();
            true
        }
        _ => false,
    }
}

/// The same in one line.
pub(super) fn one_line(text: &str) -> String {
    plain(text).trim().replace(['\n', '\t'], " ")
}

/// The last `count` lines, without empty lines at the end, and how many are before them.
pub(super) fn tail(text: &str, count: usize) -> (Vec<&str>, usize) {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let before = lines.len().saturating_sub(count);
    (lines[before..].to_vec(), before)
}

/// What explains a failure: `count` lines of it, without empty lines at the end, and in words what they are. Of a kernel's
/// report they are the first, as it begins with what happened and where; of all else the last.
pub(super) fn excerpt<'a>(what: &str, text: &'a str, count: usize) -> (String, Vec<&'a str>) {
    let (last, left_out) = tail(text, count);
    let more = counted(left_out, "line");
    match (left_out, what) {
        (0, _) => (what.to_owned(), last),
        (_, REPORT) => {
            (format!("{what}, without the last {more}"), text.lines().take(count).collect())
        }
        _ => (format!("{what}, without the first {more}"), last),
    }
}

/// What [`AttemptResult::evidence`](super::AttemptResult) calls a kernel's report.
pub(super) const REPORT: &str = "report";

/// Escapes what means something in XML and in HTML, in text as in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 16);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// The same in one line, for attributes and titles.
pub(super) fn escape_line(text: &str) -> String {
    escape(&one_line(text))
}

/// A time that a person reads.
pub(super) fn duration(ms: f64) -> String {
    let ms = sane(ms);
    // Compared after rounding, so that no time is shown as 60.0 s.
    let (tenths, seconds) = ((ms / 100.0).round(), (ms / 1000.0).round() as u64);
    match () {
        () if ms.round() < 1000.0 => format!("{ms:.0} ms"),
        () if tenths < 600.0 => format!("{:.1} s", tenths / 10.0),
        () if seconds < 3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        () => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Seconds as JUnit has them.
pub(super) fn seconds(ms: f64) -> String {
    format!("{:.3}", sane(ms) / 1000.0)
}

/// A time that may come from a file, as one that can be written and drawn.
pub(super) fn sane(ms: f64) -> f64 {
    // The sum makes 0 of -0, which is what no times add up to.
    if ms.is_finite() { ms.max(0.0) + 0.0 } else { 0.0 }
}

/// A moment in milliseconds since 1970 as ISO 8601 has it, in UTC.
pub(super) fn moment(ms: u64) -> String {
    /// The last second of year 9999: more digits are no timestamp any more.
    const LAST: u64 = 253_402_300_799;
    let seconds = (ms / 1000).min(LAST);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The Gregorian date of a day since 1970. Years are taken to begin in March, so that the day that only leap
/// years have is the last one.
fn date(days: u64) -> (u64, u64, u64) {
    /// Days in 400 years, in 100, in 4, and in one that is not a leap year.
    const SPANS: [u64; 4] = [146_097, 36_524, 1461, 365];
    // From the first of March of year 0 on.
    let mut rest = days + 719_468;
    let mut year = rest / SPANS[0] * 400;
    rest %= SPANS[0];
    let centuries = (rest / SPANS[1]).min(3);
    rest -= centuries * SPANS[1];
    year += centuries * 100 + rest / SPANS[2] * 4;
    rest %= SPANS[2];
    let single = (rest / SPANS[3]).min(3);
    rest -= single * SPANS[3];
    year += single;
    for (index, length) in [31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29].into_iter().enumerate()
    {
        if rest < length {
            let month = (index as u64 + 2) % 12 + 1;
            return (year + u64::from(month <= 2), month, rest + 1);
        }
        rest -= length;
    }
    (year, 2, 29)
}

/// `1 target`, `2 targets`.
pub(super) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Appends; writing to a string does not fail.
pub(super) fn add(out: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(what);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_gone_and_other_control_characters_are_shown() {
        for (text, expected) in [
            ("a\u{1b}[31;1mred\u{1b}[0m", "ared"),
            ("\u{1b}]0;title\u{7}x", "x"),
            ("\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\", "link"),
            ("\u{1b}]0;no end\nnext line", "\nnext line"),
            ("\u{1b}[12", ""),
            ("\u{1b}[12\nx", "\nx"),
            ("\u{1b}(Bx\u{1b}cy", "xy"),
            ("\u{1b}", "␛"),
            ("\u{1b}\u{1b}[0mx", "␛x"),
            ("\u{1b}é", "␛é"),
            ("a\r\nb\rc\u{2028}d\u{85}e", "a\nb\nc\nd\ne"),
            ("\0\u{7}\u{8}\u{1f}\u{7f}\t", "␀␇␈␟␡\t"),
            ("\u{9b}31m\u{fffe}\u{ffff}", "\u{fffd}31m\u{fffd}\u{fffd}"),
            ("\u{202e}cba\u{2066}", "\u{fffd}cba\u{fffd}"),
            ("grün 🦀", "grün 🦀"),
        ] {
            assert_eq!(plain(text), expected, "{text:?}");
        }
        assert_eq!(one_line(" a\r\n\tb\n"), "a  b");
    }

    #[test]
    fn moments_are_dates_of_the_gregorian_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_704_067_199, "2023-12-31T23:59:59Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_795_290_100, "2026-11-21T19:41:40Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (u64::MAX / 1000, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(moment(seconds * 1000), expected);
        }
    }

    #[test]
    fn durations_are_rounded_to_what_a_person_reads() {
        for (ms, expected) in [
            (0.0, "0 ms"),
            (999.4, "999 ms"),
            (999.6, "1.0 s"),
            (3449.0, "3.4 s"),
            (59_949.0, "59.9 s"),
            (59_960.0, "1 min 00 s"),
            (125_400.0, "2 min 05 s"),
            (3_599_600.0, "1 h 00 min"),
            (f64::NAN, "0 ms"),
            (-5.0, "0 ms"),
            (-0.0, "0 ms"),
        ] {
            assert_eq!(duration(ms), expected, "{ms}");
        }
        assert_eq!(seconds(1234.5678), "1.235");
        assert_eq!(seconds(f64::INFINITY), "0.000");
    }
}
