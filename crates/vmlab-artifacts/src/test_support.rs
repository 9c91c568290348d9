//! Packages and kernels made up for tests.

use std::path::{Path, PathBuf};

/// How the archives in a package are compressed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Packing {
    None,
    Gzip,
    Xz,
    Zstd,
}

/// Makes a `.deb`.
pub(crate) struct DebBuilder {
    name: String,
    version: String,
    depends: Option<String>,
    files: Vec<(String, Vec<u8>)>,
    links: Vec<(String, String)>,
    packing: Packing,
}

impl DebBuilder {
    pub(crate) fn new(name: &str, version: &str) -> DebBuilder {
        DebBuilder {
            name: name.to_owned(),
            version: version.to_owned(),
            depends: None,
            files: Vec::new(),
            links: Vec::new(),
            packing: Packing::Zstd,
        }
    }

    pub(crate) fn depends(mut self, depends: &str) -> Self {
        self.depends = Some(depends.to_owned());
        self
    }

    pub(crate) fn file(mut self, path: &str, content: &[u8]) -> Self {
        self.files.push((path.to_owned(), content.to_vec()));
        self
    }

    pub(crate) fn symlink(mut self, path: &str, target: &str) -> Self {
        self.links.push((path.to_owned(), target.to_owned()));
        self
    }

    pub(crate) fn packing(mut self, packing: Packing) -> Self {
        self.packing = packing;
        self
    }

    /// The control file.
    pub(crate) fn control(&self) -> String {
        let depends =
            self.depends.as_ref().map_or(String::new(), |text| format!("Depends: {text}\n"));
        format!(
            "Package: {}\nVersion: {}\nArchitecture: amd64\nMaintainer: T <t@example.org>\n{depends}\
             Description: made up\n",
            self.name, self.version
        )
    }

    /// Writes `NAME_VERSION_amd64.deb` into a directory.
    pub(crate) fn write(&self, dir: &Path) -> PathBuf {
        let mut control = tar::Builder::new(Vec::new());
        append(&mut control, "./control", self.control().as_bytes());
        let mut data = tar::Builder::new(Vec::new());
        for (path, target) in &self.links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            data.append_link(&mut header, path, target).unwrap();
        }
        for (path, content) in &self.files {
            append(&mut data, path, content);
        }
        let mut archive = ar::Builder::new(Vec::new());
        let mut member = |name: String, bytes: &[u8]| {
            let mut header = ar::Header::new(name.into_bytes(), bytes.len() as u64);
            header.set_mode(0o100_644);
            archive.append(&header, bytes).unwrap();
        };
        member("debian-binary".to_owned(), b"2.0\n");
        for (name, tar) in [("control", control), ("data", data)] {
            let (suffix, bytes) = self.pack(tar.into_inner().unwrap());
            member(format!("{name}.tar{suffix}"), &bytes);
        }
        let path = dir.join(format!("{}_{}_amd64.deb", self.name, self.version));
        std::fs::write(&path, archive.into_inner().unwrap()).unwrap();
        path
    }

    fn pack(&self, bytes: Vec<u8>) -> (&'static str, Vec<u8>) {
        use std::io::Read;
        let mut out = Vec::new();
        match self.packing {
            Packing::None => ("", bytes),
            Packing::Gzip => {
                let mut encoder = flate2::read::GzEncoder::new(&bytes[..], Default::default());
                encoder.read_to_end(&mut out).unwrap();
                (".gz", out)
            }
            Packing::Xz => {
                let mut encoder = liblzma::read::XzEncoder::new(&bytes[..], 6);
                encoder.read_to_end(&mut out).unwrap();
                (".xz", out)
            }
            Packing::Zstd => (".zst", zstd::encode_all(&bytes[..], 3).unwrap()),
        }
    }
}

/// Adds a file under exactly this path, which the tar crate's own call would clean up.
fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    archive.append(&header, content).unwrap();
}

/// An error with all its causes, as the command line prints it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// The head of a bzImage that passes validation; there is no kernel inside.
pub(crate) fn bzimage(release: &str) -> Vec<u8> {
    let mut image = vec![0; 1024 + 64];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &4_u32.to_le_bytes()); // syssize, in units of 16 bytes
    put(0x1fe, b"\x55\xaa");
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version of the protocol
    put(0x20e, &0x100_u16.to_le_bytes()); // kernel_version, less 0x200
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x24c, &64_u32.to_le_bytes()); // payload_length
    put(0x300, format!("{release} (t@example.org) #1 SMP test\0").as_bytes());
    put(1024, b"\x1f\x8b\x08");
    image
}
