//! Programs of the host.

use std::ffi::OsStr;
use std::path::PathBuf;

use rustix::fs::{Access, access};

/// Where system programs are on distributions whose ordinary users do not have them in `PATH`.
pub const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Looks for a program in the absolute directories of `PATH`, then where system programs are.
pub fn find_program(name: &str) -> Option<PathBuf> {
    find_in(std::env::var_os("PATH").as_deref(), name)
}

fn find_in(path: Option<&OsStr>, name: &str) -> Option<PathBuf> {
    let listed = path.into_iter().flat_map(std::env::split_paths);
    listed
        .chain(SYSTEM_DIRS.iter().map(PathBuf::from))
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|file| file.is_file() && access(file, Access::EXEC_OK).is_ok())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_program_is_an_executable_file_in_an_absolute_directory() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
        for dir in [&a, &b, &c] {
            std::fs::create_dir(dir).unwrap();
        }
        std::fs::create_dir(a.join("vmlab-tool")).unwrap();
        std::fs::write(b.join("vmlab-tool"), "").unwrap();
        let path = std::env::join_paths([".".into(), a, b, c.clone()]).unwrap();
        assert_eq!(find_in(Some(&path), "vmlab-tool"), None);
        let tool = c.join("vmlab-tool");
        std::fs::write(&tool, "").unwrap();
        std::fs::set_permissions(&tool, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(find_in(Some(&path), "vmlab-tool"), Some(tool));
        assert_eq!(find_in(None, "vmlab-tool"), None);
    }
}
