//! Tests of the module from Rust, by the C library's functions.

use std::ffi::{c_char, c_int, c_long};

unsafe extern "C" {
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn read(fd: c_int, buffer: *mut u8, length: usize) -> c_long;
}

/// What the module's file has in it.
pub fn number() -> Option<String> {
    let mut buffer = [0; 32];
    // SAFETY: the path is a string with a NUL at its end, and as many bytes are read as there is room for.
    let length = unsafe { read(open(c"/proc/good".as_ptr(), 0), buffer.as_mut_ptr(), buffer.len()) };
    let read = buffer.get(..usize::try_from(length).ok()?)?;
    Some(String::from_utf8_lossy(read).trim().to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_number_is_a_number() {
        let number = super::number().expect("/proc/good can be read");
        number.parse::<i64>().unwrap();
    }
}
