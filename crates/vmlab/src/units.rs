//! Sizes and times, as people write them.

use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

/// Bytes in a mebibyte.
pub const MIB: u64 = 1024 * 1024;

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a size: a number with K, M, G or T (powers of 1024), such as 512M")]
pub struct BytesError(String);

impl std::str::FromStr for Bytes {
    type Err = BytesError;

    /// Reads `512M`, `2G`, `1.5GiB`; a number alone is mebibytes, as for QEMU's `-m`.
    fn from_str(text: &str) -> Result<Self, BytesError> {
        let bad = || BytesError(text.to_owned());
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "k" | "kb" | "kib" => 10,
            "" | "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(bad()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Bytes).ok_or_else(bad);
        }
        let number: f64 = number.parse().map_err(|_| bad())?;
        let bytes = number * (1u64 << shift) as f64;
        if bytes.is_finite() && bytes < u64::MAX as f64 {
            Ok(Bytes(bytes as u64))
        } else {
            Err(bad())
        }
    }
}

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0 >= 1 << shift) {
            None => write!(f, "{} bytes", self.0),
            Some((shift, unit)) if self.0.trailing_zeros() >= *shift => {
                write!(f, "{} {unit}", self.0 >> shift)
            }
            Some((shift, unit)) => {
                write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64)
            }
        }
    }
}

/// Text that is not a time.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a time: a number with ms, s, m or h, such as 90s")]
pub struct DurationError(String);

/// Reads `90`, `90s`, `1.5m`, `2h`, `300ms`; a number alone is seconds.
///
/// # Errors
/// When it is none of these, or no time at all.
pub fn duration(text: &str) -> Result<Duration, DurationError> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit.trim() {
        "ms" => Some(0.001),
        "" | "s" => Some(1.0),
        "m" | "min" => Some(60.0),
        "h" => Some(3600.0),
        _ => None,
    };
    let number = number.parse::<f64>().ok();
    let time = number.zip(seconds).and_then(|(n, s)| Duration::try_from_secs_f64(n * s).ok());
    time.filter(|time| !time.is_zero()).ok_or_else(|| DurationError(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let read = |text: &str| duration(text).ok();
        assert_eq!(read("90"), Some(Duration::from_secs(90)));
        assert_eq!(read("1.5m"), Some(Duration::from_secs(90)));
        assert_eq!(read("300ms"), Some(Duration::from_millis(300)));
        assert_eq!(read("2h"), Some(Duration::from_secs(7200)));
        for bad in ["", "0", "-1", "s", "5 days", "1e9", "999999999999999999999h"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let read = |text: &str| text.parse::<Bytes>().map(|b| b.0).ok();
        assert_eq!(read("512M"), Some(512 * MIB));
        assert_eq!(read("512"), Some(512 * MIB));
        assert_eq!(read("2g"), Some(2048 * MIB));
        assert_eq!(read("1.5GiB"), Some(1536 * MIB));
        assert_eq!(read("64K"), Some(65536));
        for bad in
            ["", "M", "-1", "5 apples", "99999999999999999999G", "18446744073709551615T", "1e3"]
        {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_are_written_shortly() {
        assert_eq!(Bytes(512 * MIB).to_string(), "512 MiB");
        assert_eq!(Bytes(1536 * MIB).to_string(), "1.5 GiB");
        assert_eq!(Bytes(7).to_string(), "7 bytes");
    }
}
