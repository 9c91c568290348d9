//! The disks that the description of a virtual machine names (DMTF DSP0243, `Envelope`).

use roxmltree::{Document, Node};

/// The names of the files that the machine's disks are in.
pub(super) fn disks(text: &str) -> Result<Vec<String>, String> {
    // Without a DTD there are no entities that expand without end.
    let document = Document::parse(text).map_err(|e| format!("it is no XML ({e})"))?;
    // Attributes have the namespace of OVF in some, and none in others.
    let attribute = |node: Node<'_, '_>, name: &str| {
        let found = node.attributes().find(|attribute| attribute.name() == name);
        found.map(|attribute| attribute.value().to_owned())
    };
    let elements = |name: &'static str| {
        let all = document.descendants();
        all.filter(move |node| node.is_element() && node.tag_name().name() == name)
    };
    let mut disks: Vec<String> = Vec::new();
    for disk in elements("Disk") {
        // An empty disk, to be made anew, has no file.
        let Some(id) = attribute(disk, "fileRef") else { continue };
        let file = elements("File").find(|file| attribute(*file, "id").as_deref() == Some(&id));
        let Some(name) = file.and_then(|file| attribute(file, "href")) else {
            return Err(format!("a disk has the file `{id}`, and there is none with this id"));
        };
        if !disks.contains(&name) {
            disks.push(name);
        }
    }
    Ok(disks)
}
