//! The bzImage format of x86 (`Documentation/arch/x86/boot.rst`).

use object::read::ReadRef;

use super::{BootFormat, Defect, Header, Payload, banner, found};
use crate::Arch;
use crate::compress::Compression;

/// Offsets of the setup header's fields in the file, by their names in the documentation.
mod offset {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const SYSSIZE: usize = 0x1f4;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const KERNEL_VERSION: usize = 0x20e;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const PAYLOAD_OFFSET: usize = 0x248;
    pub(super) const PAYLOAD_LENGTH: usize = 0x24c;
}

/// The end of the last field that is read.
const HEADER_END: u64 = 0x250;

/// The unit of `setup_sects`, in bytes.
const SECTOR: u64 = 512;

/// The unit of `syssize`, in bytes.
const PARAGRAPH: u64 = 16;

/// The oldest boot protocol that is accepted (Linux 2.6.22).
const OLDEST_PROTOCOL: u16 = 0x0206;

/// The boot protocols from which on the header has the payload's place (Linux 2.6.26) and the
/// extended load flags (Linux 3.8).
const PROTOCOL_WITH_PAYLOAD: u16 = 0x0208;
const PROTOCOL_WITH_XLOADFLAGS: u16 = 0x020c;

/// In `loadflags`: the kernel is loaded above 1 MiB, which makes it a bzImage and not a zImage.
const LOADED_HIGH: u8 = 1 << 0;

/// In `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;

fn u16_at(head: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*head.get(at..)?.first_chunk()?))
}

fn u32_at(head: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?))
}

/// Whether the file has a setup header, be it complete or not.
pub(super) fn is_magic(head: &[u8]) -> bool {
    let magic = head.get(offset::HEADER..).unwrap_or(&[]);
    head.get(offset::BOOT_FLAG..offset::HEADER).is_some_and(|flag| flag.starts_with(b"\x55\xaa"))
        && magic.len() >= 4
        && magic.starts_with(b"HdrS")
}

/// Validates a bzImage. `head` is the file's beginning, `len` its whole length in bytes.
pub(super) fn parse<'data, R: ReadRef<'data>>(
    data: R,
    head: &[u8],
    len: u64,
) -> Result<Header, Defect> {
    let short = || Defect::Truncated { part: "the setup header", need: HEADER_END, have: len };
    if (head.len() as u64) < HEADER_END {
        return Err(short());
    }
    let u16_field = |at| u16_at(head, at).ok_or_else(short);
    let u32_field = |at| u32_at(head, at).map(u64::from).ok_or_else(short);

    let protocol = u16_field(offset::VERSION)?;
    if protocol < OLDEST_PROTOCOL {
        return Err(Defect::OldBootProtocol(protocol));
    }
    if head[offset::LOADFLAGS] & LOADED_HIGH == 0 {
        return Err(Defect::NotAKernel("a zImage, which is loaded below 1 MiB".to_owned()));
    }
    if protocol >= PROTOCOL_WITH_XLOADFLAGS && u16_field(offset::XLOADFLAGS)? & XLF_KERNEL_64 == 0 {
        return Err(Defect::ForeignMachine("32-bit x86".to_owned()));
    }

    // The documentation: for backwards compatibility, 0 means 4.
    let setup_sects = match head[offset::SETUP_SECTS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup_len = (setup_sects + 1) * SECTOR;
    let need = setup_len + u32_field(offset::SYSSIZE)? * PARAGRAPH;
    if need > len {
        return Err(Defect::Truncated { part: "the protected-mode kernel", need, have: len });
    }
    if need == setup_len {
        return Err(Defect::BadField { field: "syssize", value: 0 });
    }

    Ok(Header {
        arch: Arch::X86_64,
        format: BootFormat::BzImage,
        version: version(head, u16_field(offset::KERNEL_VERSION)?, setup_len),
        pvh_entry: None,
        payload: payload(data, head, protocol, setup_len, len)?,
        banner_range: None,
    })
}

/// The version string, which stands in the setup code, at 0x200 plus the header's pointer.
fn version(head: &[u8], pointer: u16, setup_len: u64) -> Option<String> {
    if pointer == 0 {
        return None;
    }
    let start = usize::from(pointer) + 0x200;
    let end = head.len().min(setup_len as usize);
    banner::clean(head.get(start..end)?, 0)
}

fn payload<'data, R: ReadRef<'data>>(
    data: R,
    head: &[u8],
    protocol: u16,
    setup_len: u64,
    len: u64,
) -> Result<Payload, Defect> {
    let field = |at| u32_at(head, at).map_or(0, u64::from);
    let (offset, length) = (field(offset::PAYLOAD_OFFSET), field(offset::PAYLOAD_LENGTH));
    if protocol < PROTOCOL_WITH_PAYLOAD {
        return Ok(Payload::Unknown("its boot protocol has no place for it".to_owned()));
    }
    if length == 0 {
        return Err(Defect::BadField { field: "payload_length", value: 0 });
    }
    // 32-bit values cannot overflow the sum.
    let start = setup_len + offset;
    let end = start + length;
    if end > len {
        return Err(Defect::Truncated { part: "the compressed kernel", need: end, have: len });
    }
    let magic_len = length.min(Compression::MAGIC_LEN as u64);
    let magic = data.read_bytes_at(start, magic_len).unwrap_or(&[]);
    Ok(match Compression::sniff(magic) {
        Some(compression) => {
            Payload::Compressed { range: start..end, compression, has_length: true }
        }
        None => Payload::Unknown(format!("it starts with the bytes {}", found::hex(magic))),
    })
}
