//! `vmlab doctor`.

use anyhow::Result;
use vmlab::doctor::{Status, examine};

use crate::exit::Code;
use crate::kernel::table;
use crate::output;

pub(crate) fn run(json: bool) -> Result<Code> {
    let checks = examine();
    if json {
        output::stdout(format!("{}\n", serde_json::to_string_pretty(&checks)?).as_bytes())?;
    } else {
        let rows: Vec<[String; 3]> = checks
            .iter()
            .map(|check| {
                let mark = match check.status {
                    Status::Good => "ok",
                    Status::Lacking => "--",
                    Status::Bad => "BAD",
                };
                [mark.to_owned(), check.name.to_owned(), check.detail.clone()]
            })
            .collect();
        output::stdout(table(&rows).as_bytes())?;
        let remedies = checks.iter().filter_map(|check| check.remedy.as_ref());
        for remedy in remedies {
            output::stdout(format!("-> {remedy}\n").as_bytes())?;
        }
    }
    let broken = checks.iter().any(|check| check.status == Status::Bad);
    Ok(if broken { Code(1) } else { Code::SUCCESS })
}
