//! Runs `uname -a` under the kernel that is given.
#![allow(clippy::print_stdout, reason = "a program prints its result")]

fn main() -> Result<(), vmlab::Error> {
    let kernel = std::env::args().nth(1).unwrap_or_else(|| "debian:6.12".to_owned());
    let vm = vmlab::Vm::builder().kernel(kernel).start()?;
    let output = vm.exec(["uname", "-a"])?;
    vm.shutdown()?;
    print!("{}", output.stdout_text());
    Ok(())
}
