//! The initramfs that a guest boots with: a cpio archive in the "newc" format
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel).

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io::{self, Write};

/// The magic number of a newc header.
const MAGIC: &str = "070701";

/// The name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Names and contents are padded to this many bytes.
const ALIGNMENT: u64 = 4;

/// The whole archive is padded to a multiple of this, which lets another one follow it.
const BLOCK: u64 = 512;

/// The longest name that the kernel unpacks, in bytes with its NUL (`PATH_MAX`).
const NAME_LEN_MAX: usize = 4096;

/// File types in the mode of an entry (`include/uapi/linux/stat.h`).
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Where the guest finds the modules that it has to load.
pub const MODULES_DIR: &str = "modules";

/// The list of the modules in their load order, in the archive.
pub const MODULES_LIST: &str = "modules/list";

/// Why an archive could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitramfsError {
    /// A name is empty, absolute, too long, or would leave the archive's root.
    #[error("{name:?} cannot be a name in an initramfs; give a relative path without `..`")]
    BadName {
        /// The name.
        name: String,
    },
    /// A name was added twice.
    #[error("{name:?} is in the initramfs already")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A file is larger than the format's 32-bit fields can say.
    #[error("{name:?} has {len} bytes, and a file in an initramfs has less than 4 GiB")]
    TooLarge {
        /// The name.
        name: String,
        /// The length of the content, in bytes.
        len: usize,
    },
    /// A module's parameters would not survive in the list of modules.
    #[error("the parameters of module {module:?} have a line break in them: {params:?}")]
    BadParams {
        /// The module.
        module: String,
        /// Its parameters.
        params: String,
    },
    /// The archive could not be written.
    #[error("cannot write the initramfs")]
    Write(#[source] io::Error),
}

/// Writes a newc archive. The same calls make the same bytes: there are no times, owners are root,
/// and inode numbers count up from 1.
///
/// Directories are to be added before what is in them, because the kernel creates none by itself.
#[derive(Debug)]
pub struct InitramfsBuilder<W: Write = Vec<u8>> {
    out: W,
    written: u64,
    inode: u32,
    names: BTreeSet<String>,
}

impl InitramfsBuilder {
    /// An empty archive in memory.
    pub fn new() -> Self {
        Self::to_writer(Vec::new())
    }
}

impl Default for InitramfsBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl<W: Write> InitramfsBuilder<W> {
    /// An empty archive that is written to `out` as it grows. It is written in small pieces, so a
    /// file should be wrapped in a `BufWriter`.
    pub fn to_writer(out: W) -> Self {
        InitramfsBuilder { out, written: 0, inode: 0, names: BTreeSet::new() }
    }

    /// Adds a directory with the permission bits `mode`.
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<&mut Self, InitramfsError> {
        self.entry(name, S_IFDIR | mode & 0o7777, 2, (0, 0), &[])
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(
        &mut self,
        name: &str,
        mode: u32,
        content: &[u8],
    ) -> Result<&mut Self, InitramfsError> {
        self.entry(name, S_IFREG | mode & 0o7777, 1, (0, 0), content)
    }

    /// Adds a symbolic link that points to `target`.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<&mut Self, InitramfsError> {
        self.entry(name, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes())
    }

    /// Adds a character device with the permission bits `mode`.
    pub fn char_device(
        &mut self,
        name: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<&mut Self, InitramfsError> {
        self.entry(name, S_IFCHR | mode & 0o7777, 1, (major, minor), &[])
    }

    /// Ends the archive and returns what it was written to.
    pub fn finish(mut self) -> Result<W, InitramfsError> {
        self.inode = 0;
        self.raw_entry(TRAILER, 0, 0, 1, (0, 0), &[])?;
        self.pad(BLOCK)?;
        self.out.flush().map_err(InitramfsError::Write)?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> Result<&mut Self, InitramfsError> {
        let usable = name.len() < NAME_LEN_MAX
            && name != TRAILER
            && !name.contains('\0')
            && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !usable {
            return Err(InitramfsError::BadName { name: name.to_owned() });
        }
        if !self.names.insert(name.to_owned()) {
            return Err(InitramfsError::Duplicate { name: name.to_owned() });
        }
        self.inode += 1;
        self.raw_entry(name, self.inode, mode, links, device, content)?;
        Ok(self)
    }

    fn raw_entry(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        links: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), InitramfsError> {
        let len = u32::try_from(content.len())
            .map_err(|_| InitramfsError::TooLarge { name: name.to_owned(), len: content.len() })?;
        let name_len = name.len() as u32 + 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check
        let fields = [inode, mode, 0, 0, links, 0, len, 0, 0, major, minor, name_len, 0];
        let mut header = String::with_capacity(110 + name.len() + 1);
        header.push_str(MAGIC);
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        header.push_str(name);
        header.push('\0');
        self.write(header.as_bytes())?;
        self.pad(ALIGNMENT)?;
        self.write(content)?;
        self.pad(ALIGNMENT)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), InitramfsError> {
        self.out.write_all(bytes).map_err(InitramfsError::Write)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, alignment: u64) -> Result<(), InitramfsError> {
        let padding = self.written.next_multiple_of(alignment) - self.written;
        self.write(&[0; BLOCK as usize][..padding as usize])
    }
}

/// A module that the guest loads before it reaches its root.
#[derive(Debug, Clone, Copy)]
pub struct BootModule<'a> {
    /// The module's name without an extension, like `virtio_pci`.
    pub name: &'a str,
    /// The uncompressed module, an ELF file.
    pub content: &'a [u8],
    /// Its parameters, like `foo=1 bar=2`; empty for none.
    pub params: &'a str,
    /// Neighbours of the same wave may be loaded at once.
    pub wave: usize,
}

/// Builds the initramfs of a kernel target, uncompressed, for the guest would have to unpack it at
/// the speed of an emulator.
///
/// It holds the agent as `/init`, empty directories to mount on, `/dev/console` and `/dev/null`, and
/// the modules as `/modules/NN-NAME.ko` with `/modules/list`: one line a module in load order, the
/// file's name and, after a space, the parameters. An empty line is between two waves. `on_demand` are
/// modules for what is only known in the guest, such as the filesystem of a disk: each with a list
/// `/modules/for-NAME` of the same kind, and all their files once.
pub fn build_initramfs(
    agent: &[u8],
    modules: &[BootModule<'_>],
    on_demand: &[(&str, Vec<BootModule<'_>>)],
) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = InitramfsBuilder::new();
    for directory in ["dev", "proc", "sys", "run", "newroot", MODULES_DIR] {
        archive.directory(directory, 0o755)?;
    }
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.char_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, agent)?;

    let mut list = String::new();
    for (index, module) in modules.iter().enumerate() {
        let params = module.params.trim();
        if params.contains(['\n', '\r', '\0']) {
            return Err(InitramfsError::BadParams {
                module: module.name.to_owned(),
                params: params.to_owned(),
            });
        }
        if module.name.contains(|c: char| c == '/' || c.is_whitespace()) {
            return Err(InitramfsError::BadName { name: module.name.to_owned() });
        }
        if index > 0 && modules[index - 1].wave != module.wave {
            list.push('\n');
        }
        let file = format!("{index:02}-{}.ko", module.name);
        archive.file(&format!("{MODULES_DIR}/{file}"), 0o644, module.content)?;
        list.push_str(&file);
        if !params.is_empty() {
            list.push(' ');
            list.push_str(params);
        }
        list.push('\n');
    }
    archive.file(MODULES_LIST, 0o644, list.as_bytes())?;

    let mut written = BTreeSet::new();
    for (purpose, modules) in on_demand {
        let mut list = String::new();
        for (index, module) in modules.iter().enumerate() {
            let file = format!("{}.ko", module.name);
            if written.insert(module.name) {
                archive.file(&format!("{MODULES_DIR}/{file}"), 0o644, module.content)?;
            }
            if index > 0 && modules[index - 1].wave != module.wave {
                list.push('\n');
            }
            list.push_str(&file);
            list.push('\n');
        }
        archive.file(&format!("{MODULES_DIR}/for-{purpose}"), 0o644, list.as_bytes())?;
    }
    archive.finish()
}
