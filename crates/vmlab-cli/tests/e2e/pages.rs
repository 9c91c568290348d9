//! Pages of the documentation whose commands are run as they stand there.

use std::process::Command;

use crate::common::{DEBIAN_6_1, DEBIAN_6_12, Site, kernel, need, vmlab_bin};

/// A block of a page: commands, or what the ones before it print.
#[derive(Debug, PartialEq, Eq)]
enum Block {
    Commands(String),
    Prints(Vec<String>),
}

/// The blocks that are marked `sh` and `text`.
fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let mut content = lines.by_ref().take_while(|line| *line != "```");
        match line {
            "```sh" => {
                blocks.push(Block::Commands(content.map(|line| format!("{line}\n")).collect()))
            }
            "```text" => blocks.push(Block::Prints(content.by_ref().map(str::to_owned).collect())),
            other => assert!(!other.starts_with("```"), "{other}"),
        }
    }
    blocks
}

/// The code that a block's last command ends with: `# exit code 1` behind it.
fn code(commands: &str) -> i32 {
    let last = commands.trim_end().lines().last().unwrap_or_default();
    last.rsplit_once(" # exit code ").map_or(0, |(_, code)| code.parse().unwrap())
}

/// Whether a line has all parts of another in their order, which are apart by `…`.
fn has(line: &str, wanted: &str) -> bool {
    let mut rest = line;
    wanted.trim().split('…').all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

#[test]
fn the_page_of_kernel_modules_is_true() {
    kernel(DEBIAN_6_1);
    kernel(DEBIAN_6_12);
    need("make", "make");
    need("gcc", "gcc");
    let site = Site::new();
    // The program that is tested is the one that the page calls vmlab.
    let bin = site.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(vmlab_bin(), bin.join("vmlab")).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut printed = String::new();
    let mut count = 0;
    for block in blocks(include_str!("../../../../docs/kernel-modules.md")) {
        match block {
            Block::Commands(commands) => {
                let mut shell = Command::new("bash");
                shell.args(["-euc", &commands]).current_dir(site.cwd()).env("PATH", &path);
                shell.env("XDG_STATE_HOME", site.state()).env("XDG_RUNTIME_DIR", site.runtime());
                let output = shell.output().unwrap();
                printed = String::from_utf8(output.stdout).unwrap();
                let said = String::from_utf8(output.stderr).unwrap();
                assert_eq!(
                    output.status.code(),
                    Some(code(&commands)),
                    "{commands}{printed}{said}"
                );
                count += 1;
            }
            Block::Prints(wanted) => {
                for wanted in wanted {
                    let plain = printed.replace(['\u{2018}', '\u{2019}'], "'");
                    let wanted = wanted.replace(['\u{2018}', '\u{2019}'], "'");
                    let there = plain.lines().any(|line| has(line, &wanted));
                    assert!(there, "`{wanted}` is not printed: {plain}");
                }
            }
        }
    }
    assert_eq!(count, 8, "blocks of commands on the page");
}

#[test]
fn blocks_of_pages_are_found() {
    let page = "x\n\n```sh\na\nb # exit code 3\n```\ny\n```text\n  c … d\n```\n";
    let found = blocks(page);
    assert_eq!(
        found,
        [
            Block::Commands("a\nb # exit code 3\n".to_owned()),
            Block::Prints(vec!["  c … d".to_owned()])
        ]
    );
    assert_eq!(code("a\nb # exit code 3\n"), 3);
    assert!(has("| c 1 d", "  c … d") && !has("d c", "c … d"));
}
