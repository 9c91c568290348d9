use std::collections::BTreeMap;
use std::process::Command;

use super::*;
use crate::base64;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    let little = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let big = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap());
    assert_eq!(little, big, "both byte orders at {at}");
    little as usize
}

/// The files of an image, as one reads them who follows the descriptors.
fn files(image: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let descriptor = &image[16 * SECTOR..17 * SECTOR];
    assert_eq!(&descriptor[..7], b"\x01CD001\x01");
    assert_eq!(&image[17 * SECTOR..17 * SECTOR + 7], b"\xffCD001\x01");
    assert_eq!(u32_at(descriptor, 80) * SECTOR, image.len());
    let root = &descriptor[156..190];
    let directory = &image[u32_at(root, 2) * SECTOR..][..u32_at(root, 10)];
    let mut found = BTreeMap::new();
    let (mut at, mut index) = (0, 0);
    while directory[at] != 0 {
        let record = &directory[at..at + usize::from(directory[at])];
        let name_len = usize::from(record[32]);
        let mut fields = &record[33 + name_len + usize::from(name_len % 2 == 0)..];
        let mut name = None;
        let mut seen = Vec::new();
        while fields.len() >= 4 {
            let (field, rest) = fields.split_at(usize::from(fields[2]));
            seen.push(field[..2].to_vec());
            if &field[..2] == b"NM" {
                name = Some(String::from_utf8(field[5..].to_vec()).unwrap());
            }
            fields = rest;
        }
        assert!(seen.contains(&b"PX".to_vec()));
        // Linux knows names by Rock Ridge only when the first record says so.
        assert_eq!(seen.contains(&b"SP".to_vec()), index == 0);
        assert_eq!(seen.contains(&b"ER".to_vec()), index == 0);
        if let Some(name) = name {
            let content = &image[u32_at(record, 2) * SECTOR..][..u32_at(record, 10)];
            found.insert(name, content.to_vec());
        }
        at += record.len();
        index += 1;
    }
    found
}

fn text(files: &BTreeMap<String, Vec<u8>>, name: &str) -> String {
    String::from_utf8(files[name].clone()).unwrap()
}

#[test]
fn the_seed_has_its_files() {
    let agent: Vec<u8> = (0..10_000_u32).map(|at| at as u8 ^ 0x5a).collect();
    let image = seed_image(&agent, false);
    assert_eq!(&image[16 * SECTOR + 40..][..7], b"cidata ");
    let files = files(&image);
    let names: Vec<_> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["meta-data", "start", "user-data", "vmlab-agent"]);
    assert_eq!(files["vmlab-agent"], agent);
    assert_eq!(text(&files, "start").trim_end(), START_AGENT.trim_end());
    assert!(text(&files, "user-data").starts_with("#cloud-config\n"));
    // No partition table, no boot sector.
    assert!(image[..HEAD_SECTOR * SECTOR].iter().all(|&byte| byte == 0));
}

#[test]
fn an_agent_of_any_size_is_whole() {
    for len in [0, 1, SECTOR - 1, SECTOR, SECTOR + 1] {
        let agent = vec![7; len];
        let image = seed_image(&agent, true);
        assert_eq!(files(&image)["vmlab-agent"], agent, "{len}");
        assert_eq!(image.len() % SECTOR, 0);
    }
}

#[test]
fn the_drive_is_read_without_its_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let drive = dir.path().join("drive");
    std::fs::write(&drive, seed_image(b"agent's content", false)).unwrap();
    let read = |unit: usize, at: usize, count: usize| {
        let image = std::fs::read(&drive).unwrap();
        image[at * unit..(at + count) * unit].to_vec()
    };
    let head = String::from_utf8(read(SECTOR, HEAD_SECTOR, 1)).unwrap();
    let words: Vec<_> = head.trim_end_matches('\0').split_whitespace().collect();
    let &["vmlab-seed", "1", at, count] = words.as_slice() else { panic!("{head}") };
    let agent = read(BLOCK, at.parse().unwrap(), count.parse().unwrap());
    assert!(agent.starts_with(b"agent's content\0"));
    // The loader hands the script on, and no other drive's content.
    let run = |how: &str| {
        let loader = loader(how).replace("/dev/disk/by-label/cidata", &drive.display().to_string());
        let loader = loader.replace("exec sh -c", "printf '%s|%s|%s'");
        String::from_utf8(Command::new("sh").args(["-c", &loader]).output().unwrap().stdout)
            .unwrap()
    };
    assert_eq!(run("here"), format!("{}|start|here", START_AGENT.trim_end()));
    std::fs::write(&drive, vec![b'x'; 40 * SECTOR]).unwrap();
    assert_eq!(run("here"), "");
}

#[test]
fn the_instance_changes_with_what_cloud_init_is_to_do() {
    let id = |agent: &[u8], persist| text(&files(&seed_image(agent, persist)), "meta-data");
    assert_eq!(id(b"one", false), id(b"one", false));
    assert_ne!(id(b"one", false), id(b"two", false));
    // A disk that is kept does not become another machine by a new agent.
    assert_eq!(id(b"one", true), id(b"two", true));
    assert!(id(b"one", true).starts_with("instance-id: vmlab-"));
}

#[test]
fn the_script_is_one_for_every_shell() {
    for shell in [&["sh"][..], &["dash"], &["bash", "--posix"], &["busybox", "sh"]] {
        let mut command = Command::new(shell[0]);
        let Ok(output) = command.args(&shell[1..]).args(["-n", "-c", START_AGENT]).output() else {
            assert_ne!(shell, ["sh"]);
            continue;
        };
        assert!(output.status.success(), "{shell:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn credentials_are_units_that_systemd_takes() {
    let values = smbios_credentials();
    let units: Vec<(String, String)> = values
        .iter()
        .map(|value| {
            let prefix = "io.systemd.credential.binary:";
            let (name, content) = value.strip_prefix(prefix).unwrap().split_once('=').unwrap();
            // A comma would end the value for QEMU.
            assert!(!name.contains(',') && !content.contains(','));
            let content = base64::decode(content).unwrap();
            (name.to_owned(), String::from_utf8(content).unwrap())
        })
        .collect();
    let names: Vec<_> = units.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "systemd.extra-unit.vmlab-agent.service",
            "systemd.unit-dropin.basic.target~vmlab",
            "tmpfiles.extra"
        ]
    );
    let start = units[0].1.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let command = start.strip_prefix("/bin/sh -c '").unwrap().strip_suffix('\'').unwrap();
    assert!(!command.contains('\'') && !command.contains('\\'), "{command}");
    assert_eq!(command.replace("$$", "$").replace("%%", "%"), loader("here"));
    assert!(!command.replace("$$", "").contains('$'), "{command}");
    assert!(units[1].1.contains("Wants=vmlab-agent.service"));
    // An older systemd gets the same unit as a file.
    let files: Vec<Vec<&str>> =
        units[2].1.lines().map(|line| line.split_whitespace().collect()).collect();
    let content = |line: &[&str]| String::from_utf8(base64::decode(line[6]).unwrap()).unwrap();
    assert_eq!(files[0][..2], ["f~", UNIT_FILE]);
    assert_eq!(content(&files[0]), units[0].1);
    assert!(content(&files[1]).contains("ENV{SYSTEMD_WANTS}+=\"vmlab-agent.service\""));
    // Firmware has one table of all strings, in which a length is 16 bits wide.
    assert!(values.iter().map(String::len).sum::<usize>() < 16 * 1024);
}
