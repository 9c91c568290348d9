//! Shows what a console says of damage to its kernel:
//! `cargo run -p vmlab --example events < console.log`

use std::io::{Read, Write};

use vmlab::events::EventReader;

fn main() -> std::io::Result<()> {
    let mut reader = EventReader::all();
    let (mut input, mut buffer) = (std::io::stdin().lock(), [0; 64 * 1024]);
    loop {
        let count = input.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        reader.feed(&buffer[..count]);
    }
    let mut output = std::io::stdout().lock();
    for event in reader.into_events() {
        let at = event.at_us.map_or(String::new(), |us| format!("{:.6}", us as f64 / 1e6));
        writeln!(output, "{at:>14} {:>3} x {:<18} {}", event.count, event.kind, event.title)?;
        for line in event.report {
            writeln!(output, "    {line}")?;
        }
    }
    Ok(())
}
